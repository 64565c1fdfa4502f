"""Names of files that come from other files."""

from __future__ import annotations

import pytest

from loftq_cli.checkpoint.names import is_plain_name


@pytest.mark.parametrize(
    ("name", "plain"),
    [("model.safetensors", True), ("..a", True), ("ü", True), ("a/b", False), ("..", False)],
)
def test_plain_names(name, plain):
    assert is_plain_name(name) is plain
