"""The table of dtypes, against torch and the reader."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import loftq_cli
from loftq_cli.checkpoint.dtypes import (
    BITS,
    FLOATS,
    computed,
    name_of,
    resolve,
    tag_named,
    tag_of,
    torch_dtype,
)
from loftq_cli.settings.table import DTYPES


@pytest.mark.parametrize("tag", FLOATS)
def test_a_tag_and_a_name_are_those_of_one_dtype_of_torch(tag):
    dtype = torch_dtype(tag)
    assert dtype == getattr(torch, name_of(tag))
    assert dtype.itemsize * 8 == BITS[tag]
    assert tag_named(name_of(tag)) == tag


@pytest.mark.parametrize(
    ("setting", "source", "expected"),
    [
        ("source", "BF16", "BF16"),
        ("source", "F64", "F32"),
        ("float32", "BF16", "F32"),
        ("float16", "F32", "F16"),
        ("bfloat16", "F64", "BF16"),
    ],
)
def test_a_setting_and_a_matrix_have_one_dtype(setting, source, expected):
    assert resolve(setting, source) == expected


def test_only_float64_is_computed_in_another_dtype():
    assert {tag: computed(tag) for tag in FLOATS if computed(tag) != tag} == {"F64": "F32"}


def test_every_setting_has_a_tag():
    assert [tag_named(name) for name in DTYPES if name != "source"] == ["F32", "F16", "BF16"]


def test_the_table_is_the_format_s_own() -> None:
    from safetensors.torch import _SIZE, _TYPES

    for tag, dtype in _TYPES.items():
        assert torch_dtype(tag) == dtype
        assert tag_of(dtype) == tag
        assert BITS[tag] == 8 * _SIZE[dtype]


def test_there_is_no_other_table_of_tags() -> None:
    """Facts about a dtype are asked for, and not written down a second time."""
    root = Path(loftq_cli.__file__).parent
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Dict) and path.name != "dtypes.py":
                keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
                names = [*BITS, *("float64", "float32", "float16", "bfloat16")]
                assert sum(key in names for key in keys) < 2, path
