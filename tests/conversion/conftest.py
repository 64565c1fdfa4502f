"""Sources, and conversions of them."""

from tests.support.conversions import bench, checkpoint, commit, converted, files, notes
from tests.support.hub_fixtures import cache, server

__all__ = ["bench", "cache", "checkpoint", "commit", "converted", "files", "notes", "server"]
