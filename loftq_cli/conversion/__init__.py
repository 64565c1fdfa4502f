"""Carrying a plan out, durably: what is finished survives whatever happens."""
