"""Sources, and conversions of them."""

from tests.support.conversions import bench, checkpoint, converted, notes

__all__ = ["bench", "checkpoint", "converted", "notes"]
