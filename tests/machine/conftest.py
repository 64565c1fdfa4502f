"""Sources, and conversions of them."""

from tests.support.conversions import bench

__all__ = ["bench"]
