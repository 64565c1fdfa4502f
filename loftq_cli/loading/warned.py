"""What loading warns of, by class, so that a filter can tell them apart."""

from __future__ import annotations


class DetachedAdapter(UserWarning):
    """A backbone computes, or will, without the adapter that makes up for its quantization."""


class UnsavedEmbeddings(UserWarning):
    """Embeddings were resized, and PEFT will not save them by itself."""
