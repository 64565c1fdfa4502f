"""The values of a merged tensor."""

from __future__ import annotations

import torch

from loftq_cli.checkpoint.dtypes import name_of, torch_dtype
from loftq_cli.checkpoint.reader import TensorFile
from loftq_cli.errors import NonFiniteWeightError, UsageError
from loftq_cli.layouts.trained_parts import Pair
from loftq_cli.merging.plan import Merged, MergePlan
from loftq_cli.numerics.metrics import first_non_finite


def product_of(pair: Pair, file: TensorFile) -> torch.Tensor:
    """B A, float32, unscaled, of a ``pair`` in the adapter's ``file``."""
    lora_A, lora_B = pair.read(file)
    return lora_B @ lora_A


def summed(plan: MergePlan, item: Merged) -> torch.Tensor:
    """The sum of what ``item`` is made of, float32, as the source stores it. Raises
    NonFiniteWeightError."""
    name, directory = item.spec.name, plan.output.directory
    value = item.weight.read_base()
    pair, tokens = item.weight.pair, item.weight.tokens
    with TensorFile(plan.adapter.file) as file:
        if pair is not None:
            # Product, scaling and sum are rounded one by one, as PEFT does.
            product = product_of(pair, file)
            value += (product.T if item.transposed else product).mul_(pair.scaling)
        if tokens is not None:
            value[list(tokens.indices)] = file.read(tokens.values).float()
    bad = first_non_finite(value)
    if bad is not None:
        raise NonFiniteWeightError(
            f"{directory} and {plan.adapter.file}: tensor {name!r} becomes {bad[1]} "
            f"at {list(bad[0])}",
            hint="the backbone or the adapter is damaged, or its training diverged",
        )
    return value


def merged_value(plan: MergePlan, item: Merged) -> torch.Tensor:
    """:func:`summed` in its final dtype. Raises UsageError for a value that this cannot hold."""
    value = summed(plan, item)
    result = value.to(torch_dtype(item.spec.dtype))
    bad = first_non_finite(result)
    if bad is not None:
        raise UsageError(
            f"tensor {item.spec.name!r}: {float(value[bad[0]]):.6g} at {list(bad[0])} does not fit "
            f"{name_of(item.spec.dtype)}",
            hint="use --dtype float32, or for values up to 3e38 --dtype bfloat16",
        )
    return result
