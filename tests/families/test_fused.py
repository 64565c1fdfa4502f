"""Which layers servers fuse, by their names."""

from __future__ import annotations

from loftq_cli.families.fused import fused_parts


def test_parts_of_one_parent_come_together_and_what_is_alone_does_not():
    names = [
        f"model.layers.{k}.{n}.weight"
        for k in (0, 1)
        for n in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj")
    ]
    names += ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"]
    assert fused_parts(names) == [
        ["model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"],
        ["model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"],
        ["model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight"],
    ]
