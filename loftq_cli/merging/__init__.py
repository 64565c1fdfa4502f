"""A backbone and an adapter to an ordinary checkpoint."""
