"""How quantized matrices are stored: bnb, gptq, loftq, dense, and the PEFT adapter."""

from __future__ import annotations

from loftq_cli.layouts.base import Layout
from loftq_cli.layouts.bnb import BnbLayout
from loftq_cli.layouts.dense import DenseLayout
from loftq_cli.layouts.gptq import GptqLayout
from loftq_cli.layouts.packed import PackedLayout


def make_layout(name: str, dense_dtype: str = "source") -> Layout:
    """The layout of that name; ``dense_dtype`` concerns ``dense`` only."""
    if name == "dense":
        return DenseLayout(dense_dtype)
    layouts: dict[str, Layout] = {
        "bnb": BnbLayout(),
        "gptq": GptqLayout(),
        "loftq": PackedLayout(),
    }
    return layouts[name]


__all__ = ["Layout", "make_layout"]
