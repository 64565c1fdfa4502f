"""The name of the inner loops' variant, as recipes hold it."""

from __future__ import annotations

import pytest
import torch

from loftq_cli.numerics.variant import REVISION, Variant


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
def test_a_variant_is_read_back_from_its_name(native, products):
    variant = Variant(native, products)
    assert Variant.parse(str(variant)) == variant


def test_the_name_says_revision_search_and_products():
    assert str(Variant(True, torch.bfloat16)) == f"{REVISION}:native+bfloat16"


def test_another_revision_is_understood():
    assert Variant.parse("99:tensor+float32") == Variant(False, torch.float32)


@pytest.mark.parametrize(
    "text", ["", "1:", "native+float32", "1:native", "1:gpu+float32", "1:native+x"]
)
def test_what_is_no_variant_is_refused(text):
    with pytest.raises(ValueError, match="unknown kernels"):
        Variant.parse(text)
