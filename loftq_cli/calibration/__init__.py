"""The source model, run on text, to activation statistics."""
