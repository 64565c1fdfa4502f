"""Repositories on the hub, read and written."""
