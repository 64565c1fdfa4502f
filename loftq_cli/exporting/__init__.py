"""The codes of a finished conversion in another container."""
