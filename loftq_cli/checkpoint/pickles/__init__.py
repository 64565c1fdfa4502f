"""Pickled weights, read without running anything in them."""
