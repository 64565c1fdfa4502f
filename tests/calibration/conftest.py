"""Models to measure, and text."""

from tests.support.conversions import bench, checkpoint, notes
from tests.support.hub_fixtures import cache, server
from tests.support.loadable import converted

__all__ = ["bench", "cache", "checkpoint", "converted", "notes", "server"]
