"""What kind of layer a matrix is of, by the names that models give."""

from __future__ import annotations

import pytest

from loftq_cli.families.spots import spots


@pytest.mark.parametrize(
    ("expected"),
    [
        {
            "model.layers.0.self_attn.q_proj": ("q_proj", 0),
            "model.layers.11.self_attn.q_proj": ("q_proj", 11),
            "model.layers.0.mlp.down_proj": ("down_proj", 0),
            "lm_head": ("lm_head", None),
        },
        {  # of which two end alike
            "encoder.layer.0.attention.self.query": ("query", 0),
            "encoder.layer.0.attention.output.dense": ("attention.output.dense", 0),
            "encoder.layer.0.intermediate.dense": ("intermediate.dense", 0),
            "encoder.layer.0.output.dense": ("output.dense", 0),
        },
        {  # experts, beside dense layers and shared experts
            "model.layers.0.mlp.gate_proj": ("mlp.gate_proj", 0),
            "model.layers.1.mlp.experts.0.gate_proj": ("experts.gate_proj", 1),
            "model.layers.1.mlp.experts.17.gate_proj": ("experts.gate_proj", 1),
            "model.layers.1.mlp.shared_experts.gate_proj": ("shared_experts.gate_proj", 1),
        },
        {"model.layers.1.block_sparse_moe.experts.3.w2": ("experts.w2", 1)},
        {  # two stacks
            "encoder.block.0.layer.0.SelfAttention.q": ("encoder q", 0),
            "decoder.block.2.layer.0.SelfAttention.q": ("decoder SelfAttention.q", 2),
            "decoder.block.2.layer.1.EncDecAttention.q": ("decoder EncDecAttention.q", 2),
        },
        {
            "model.layers.0.self_attn.q_proj": ("q_proj", 0),
            "model.mtp.layers.0.self_attn.q_proj": ("mtp q_proj", 0),
        },
        {  # numbers that are names
            "h.0.mlp.0": ("mlp.0", 0),
            "h.0.mlp.2": ("mlp.2", 0),
            "proj.1": ("proj.1", None),
        },
        {"0.weight.1": ("weight.1", 0), "a": ("a", None)},
    ],
)
def test_kind_and_block(expected):
    found = spots(expected)
    assert {module: (spot.kind, spot.block) for module, spot in found.items()} == expected


def test_kinds_come_in_the_order_in_which_a_block_computes():
    names = ("mlp.down_proj", "mlp.gate_proj", "self_attn.k_proj", "self_attn.q_proj")
    modules = ["lm_head", *(f"model.layers.{n}.{name}" for n in range(2) for name in names)]
    kinds = list(dict.fromkeys(spot.kind for spot in spots(modules).values()))
    assert kinds == ["q_proj", "k_proj", "gate_proj", "down_proj", "lm_head"]


def test_nothing_has_no_kinds():
    assert spots([]) == {}
