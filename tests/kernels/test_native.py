"""The compiled kernels are there wherever there is a compiler: nothing falls back in silence."""

from __future__ import annotations

import os
import shutil

import pytest

from loftq_cli.kernels import native

COMPILER = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")


@pytest.mark.skipif(COMPILER is None, reason="no C compiler here")
def test_with_a_compiler_the_kernels_are_built() -> None:
    assert native.load().reason == ""
    assert native.available()
