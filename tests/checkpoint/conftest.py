"""A hub for the tests of the hub."""

from tests.hub_fixtures import cache, server

__all__ = ["cache", "server"]
