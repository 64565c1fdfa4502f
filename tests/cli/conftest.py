"""Commands as a user types them."""

from tests.support.terminal import converted, converted_once, loftq, out, place

__all__ = ["converted", "converted_once", "loftq", "out", "place"]
