"""The table of dtypes, against torch and the reader."""

from __future__ import annotations

import pytest
import torch

from loftq_cli.checkpoint.dtypes import FLOATS, TAGS, computed, resolve
from loftq_cli.checkpoint.header import DTYPE_BITS
from loftq_cli.checkpoint.reader import TORCH_DTYPES
from loftq_cli.settings.table import DTYPES


@pytest.mark.parametrize("tag", FLOATS)
def test_a_tag_and_a_name_are_those_of_one_dtype_of_torch(tag):
    dtype = TORCH_DTYPES[tag]
    assert dtype == getattr(torch, FLOATS[tag])
    assert dtype.itemsize * 8 == DTYPE_BITS[tag]
    assert TAGS[FLOATS[tag]] == tag


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
    assert {*DTYPES} <= {"source", *TAGS}
