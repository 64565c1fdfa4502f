"""Sources, and conversions of them."""

from tests.support.conversions import bench, converted

__all__ = ["bench", "converted"]
