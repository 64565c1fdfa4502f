"""Adapters of experts in PEFT's own form, against PEFT's formula for it."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from loftq_cli.layouts.adapter import names
from loftq_cli.layouts.base import Matrix
from loftq_cli.layouts.fused import FusedAdapter, Member, fused_adapters, is_fused

EXPERTS = "model.layers.0.mlp.experts"


def matrix(part: str, shape: tuple[int, int], home: str | None = EXPERTS) -> Matrix:
    name = f"{EXPERTS}.{part}.weight"
    return Matrix(name, shape, "F32", "uniform", 2, 64, in_memory=home and f"{home}.{part}")


def adapters(leaves: tuple[str, ...], count: int, rank: int) -> list[FusedAdapter]:
    shapes = {"down_proj": (6, 4)}
    members = [
        Member(matrix(f"{expert}.{leaf}", shapes.get(leaf, (4, 6))), rank, "F32")
        for leaf in leaves  # not in the order in which they are fused
        for expert in reversed(range(count))
    ]
    return fused_adapters(members)


@given(
    st.integers(1, 5),
    st.integers(1, 4),
    st.sampled_from([("gate_proj", "up_proj"), ("w1", "w3"), ("up_proj",), ("gate_up_proj",)]),
    st.integers(0, 9),
)
def test_pefts_delta_is_the_product_of_each_expert(count, rank, ups, seed) -> None:
    """PEFT 0.21, ParamWrapper.get_delta_weight: A (E, r, in), B (out, r, E), "ore,eri->eoi"."""
    down = "w2" if "w1" in ups else "down_proj"
    generator = torch.Generator().manual_seed(seed)
    held: dict[str, torch.Tensor] = {}
    found = adapters((down, *ups), count, rank)
    for adapter in found:
        for member in adapter.members:
            rows, columns = member.matrix.shape
            for name, shape in zip(
                names(member.matrix), ((rank, columns), (rows, rank)), strict=True
            ):
                held[name] = torch.randn(shape, generator=generator)
    first, last = found
    assert first.leaves == ups
    assert last.parameter == "down_proj"
    for adapter in found:
        made = adapter.tensors(held.__getitem__)
        lora_A, lora_B = (made[name] for name in adapter.names)
        assert [tuple(made[spec.name].shape) for spec in adapter.specs()] == [
            spec.shape for spec in adapter.specs()
        ]
        stacked, split = (
            lora_A.view(count, -1, lora_A.shape[1]),
            lora_B.view(len(lora_B), -1, count),
        )
        delta = torch.einsum("ore,eri->eoi", split, stacked)
        for expert in range(count):
            expected = [
                held[names(matrix(f"{expert}.{leaf}", (1, 1)))[1]]
                @ held[names(matrix(f"{expert}.{leaf}", (1, 1)))[0]]
                for leaf in adapter.leaves
            ]
            torch.testing.assert_close(delta[expert], torch.cat(expected))
        for number, member in enumerate(adapter.members):
            own_a, own_b = adapter.pair(number, lora_A, lora_B)
            name_a, name_b = names(member.matrix)
            assert torch.equal(own_a, held[name_a])
            assert torch.equal(own_b, held[name_b])


def test_the_pair_of_the_down_lies_around_that_of_the_first() -> None:
    first, last = adapters(("gate_proj", "up_proj", "down_proj"), 2, 3)
    prefix = f"base_model.model.{EXPERTS}"
    assert first.names == (
        f"{prefix}.base_layer.lora_A.weight",
        f"{prefix}.base_layer.lora_B.weight",
    )
    assert last.names == (f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight")
    assert (first.target, first.rank) == (f"{EXPERTS}.gate_up_proj", 6)
    assert (last.target, last.rank) == (f"{EXPERTS}.down_proj", 3)


def test_experts_that_peft_fuses_have_no_name_in_memory() -> None:
    assert is_fused(matrix("0.w1", (4, 6)))
    assert not is_fused(matrix("0.w1", (4, 6), None))
