"""Quantized sources, read as what they mean: one format a module."""
