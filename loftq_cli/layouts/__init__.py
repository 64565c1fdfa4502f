"""How quantized matrices are stored: bnb, gptq, loftq, dense, and the PEFT adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loftq_cli.layouts.base import Layout
from loftq_cli.layouts.bnb import BnbLayout
from loftq_cli.layouts.dense import DenseLayout
from loftq_cli.layouts.gptq import GptqLayout
from loftq_cli.layouts.loftq import PackedLayout
from loftq_cli.numerics.quantizers.scale_storage import ScaleDtype


def make_layout(
    name: str, dense_dtype: str = "source", scale_dtype: ScaleDtype = "float32"
) -> Layout:
    """The layout of that name; ``dense_dtype`` concerns ``dense`` only, ``scale_dtype`` ``loftq``
    only."""
    if name == "dense":
        return DenseLayout(dense_dtype)
    layouts: dict[str, Layout] = {
        "bnb": BnbLayout(),
        "gptq": GptqLayout(),
        "loftq": PackedLayout(scale_dtype),
    }
    return layouts[name]


def layout_of(record: Mapping[str, Any], recipe: Mapping[str, Any]) -> Layout:
    """The layout of an entry of the manifest's ``matrices``, given the manifest's ``recipe``."""
    # A manifest from before there was the choice does not name it.
    scale_dtype = recipe.get("scale_dtype", "float32")
    return make_layout(record["layout"], recipe["dense_dtype"], scale_dtype)


__all__ = ["Layout", "layout_of", "make_layout"]
