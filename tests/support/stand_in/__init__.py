"""CUDA devices that are none, for tests: see :mod:`tests.support.stand_in.tensor`."""
