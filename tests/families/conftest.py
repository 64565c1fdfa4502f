"""Small conversions that the tests here load."""

from tests.support.loadable import converted

__all__ = ["converted"]
