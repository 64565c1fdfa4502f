"""Models to measure, and text."""

from tests.support.conversions import bench, checkpoint, notes
from tests.support.loadable import converted

__all__ = ["bench", "checkpoint", "converted", "notes"]
