"""A hub for the tests of the hub."""

from tests.support.hub_fixtures import cache, nobody, server

__all__ = ["cache", "nobody", "server"]
