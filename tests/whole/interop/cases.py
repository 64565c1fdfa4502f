"""What is converted and handed to the consumers: one case per line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

LIBRARY = {
    "bnb": "bitsandbytes",
    "gptq": "gptqmodel",
    "awq": "gptqmodel",
    "loftq": "loftq_cli",
    "dense": "torch",
}
CLASSES = {
    "llama": "LlamaForCausalLM",
    "bert": "BertModel",
    "classifier": "BertForSequenceClassification",
    "bart": "BartForConditionalGeneration",
    "t5": "T5ForConditionalGeneration",
    "falcon": "FalconForCausalLM",
    "minilm": "BertModel",
}


# Ranks above a matrix's small side are clamped, matrix by matrix.
_CLAMPED = {"rank": 48}
_ALPHA = {"rank": 48, "lora_alpha": 8}
_BF16, _F16 = ("bfloat16", 4e-2), ("float16", 5e-3)


@dataclass(frozen=True)
class Case:
    """A source, how it is converted, and the dtype the consumer loads it in.

    ``source`` is the model's kind, its sizes where they are not the default (``64x128``: hidden x
    intermediate), and the dtype it is saved in. ``tolerance`` bounds the outputs' error relative to
    the largest output; what a library computes in 16 bit cannot be closer.
    """

    source: str
    layout: str
    settings: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    tolerance: float = 5e-6

    @property
    def kind(self) -> str:
        return self.source.split("-")[0]

    @property
    def model_class(self) -> str:
        return CLASSES[self.kind]

    @property
    def name(self) -> str:
        settings = [f"{key}={value}" for key, value in self.settings.items()]
        return "_".join([self.layout, self.source, *settings, self.dtype]).replace("*", "")


def _bnb(source: str, **settings: Any) -> Case:
    return Case(source, "bnb", {"bits": 4, "method": "nf", **settings})


def _gptq(source: str, bits: int, block_size: int, **settings: Any) -> Case:
    chosen = {"bits": bits, "method": "uniform", "block_size": block_size, **settings}
    return Case(source, "gptq", chosen, tolerance=2e-3)


def _awq(source: str, block_size: int, **settings: Any) -> Case:
    """Evaluated in bfloat16 on a CPU, whatever the model's dtype."""
    chosen = {"bits": 4, "method": "uniform", "block_size": block_size, **settings}
    return Case(source, "awq", chosen, tolerance=_BF16[1])


def _loftq(source: str, bits: int, method: str, block_size: int, **settings: Any) -> Case:
    chosen = {"bits": bits, "method": method, "block_size": block_size, **settings}
    return Case(source, "loftq", chosen)


def _with(case: Case, dtype: str, tolerance: float) -> Case:
    return Case(case.source, case.layout, case.settings, dtype, tolerance)


CASES = [
    _bnb("llama"),
    _bnb("llama-128x192", exclude=("*.0.mlp.*", "*.v_proj.*")),
    _bnb("llama-sharded"),
    _bnb("llama", **_CLAMPED),
    _bnb("llama", **_ALPHA),
    _bnb("llama", scale="absmax", iters=0),
    _bnb("bert"),
    _bnb("classifier"),
    _bnb("bart"),
    _bnb("t5"),
    _bnb("minilm"),
    _with(_bnb("llama-bfloat16"), *_BF16),
    _with(_bnb("llama-float16"), *_F16),
    *(_gptq("llama", bits, size) for bits in (2, 3, 4, 8) for size in (32, 64)),
    _gptq("llama-128x192", 2, 128),
    *(_gptq("llama", bits, 32, method="uniform-symmetric") for bits in (4, 8)),
    _gptq("llama", 3, 64, exclude=("*.0.mlp.*", "*.v_proj.*")),
    _gptq("llama", 2, 64, **_CLAMPED),
    _gptq("llama", 2, 64, **_ALPHA),
    _gptq("bert", 3, 32),
    _gptq("bert", 4, 64, exclude=("*.1.output.*",)),
    _gptq("classifier", 2, 64),
    _with(_gptq("llama-bfloat16", 2, 64), *_BF16),
    _with(_gptq("llama-float16", 4, 64), *_F16),
    *(_awq("llama-64x128", size) for size in (32, 64)),
    _awq("llama-128x128", 128, method="uniform-symmetric"),
    _awq("llama-64x128", 32, exclude=("*.0.mlp.*", "*.v_proj.*"), **_CLAMPED),
    _awq("bert-64x128", 64),
    _awq("classifier-64x128", 32, **_ALPHA),
    _awq("bart-64x128", 32),
    _with(_awq("llama-64x128-bfloat16", 64), *_BF16),
    _with(_awq("llama-64x128-float16", 64), "float16", _BF16[1]),
    _loftq("llama-40x100", 2, "nf", 64),
    _loftq("llama-40x100", 3, "nf", 32),
    _loftq("llama-40x100", 4, "nf", 128),
    _loftq("llama-40x100", 8, "nf", 256),
    _loftq("llama-40x100", 2, "uniform", 32),
    _loftq("llama-40x100", 3, "uniform", 64),
    _loftq("llama-40x100", 4, "uniform", 256),
    _loftq("llama-40x100", 8, "uniform", 128),
    _loftq("llama-40x100", 2, "nf", 32, scale_dtype="bfloat16"),
    _loftq("llama-40x100", 2, "nf", 32, scale_dtype="int8"),
    _loftq("llama-40x100", 3, "uniform", 32, scale_dtype="int8"),
    _loftq("llama-40x100", 2, "trellis", 64),
    _loftq("bert-36x75", 2, "trellis", 32, scale_dtype="bfloat16"),
    _loftq("bert-36x75", 2, "nf-symmetric", 64),
    _loftq("bert-36x75", 3, "nf-symmetric", 256),
    _loftq("bert-36x75", 4, "nf-symmetric", 32),
    _loftq("bert-36x75", 8, "nf-symmetric", 64),
    _loftq("llama", 2, "uniform-block", 64, preset="paper"),
    _loftq("llama", 2, "uniform-tensor", 64, preset="paper"),
    _loftq("llama", 2, "nf", 64, **_CLAMPED),
    _loftq("llama", 2, "uniform", 64, **_ALPHA),
    _loftq("llama-sharded", 3, "nf", 64, exclude=("*.0.mlp.*", "*.v_proj.*")),
    _loftq("llama", 3, "nf", 64, include=("lm_head.weight",)),
    Case(
        "llama", "loftq", {"bits": 2.5, "bits_map": "*.down_proj.*=3", "rank_map": "*.q_proj.*=8"}
    ),
    Case("bart", "loftq", {"bits": 3.5, "method": "nf", "rank_map": "*.fc1.*=8", "lora_alpha": 8}),
    _loftq("classifier", 2, "nf", 64, include=("classifier.weight",)),
    _loftq("bart", 2, "uniform", 64),
    _loftq("t5", 3, "nf", 64),
    _loftq("falcon", 2, "uniform", 64),
    _loftq("minilm", 2, "uniform", 64),
    _loftq("llama-bfloat16", 2, "nf", 64),
    _loftq("llama-float16", 3, "uniform", 64),
    _with(_loftq("llama-bfloat16", 2, "nf", 64), *_BF16),
    _with(_loftq("llama-float16", 2, "fitted", 64, scale_dtype="int8"), *_F16),
    _with(_loftq("llama-float16", 3, "uniform", 64), *_F16),
    Case("llama", "dense", {"bits": 2, "method": "nf"}),
    Case("llama-sharded", "dense", {"bits": 2, **_ALPHA}),
    Case("classifier", "dense", {"bits": 3}),
    Case("bart", "dense", {"bits": 3}),
    Case("minilm", "dense", {"bits": 2}),
    Case("llama-bfloat16", "dense", {"bits": 2}),
    Case("llama-bfloat16", "dense", {"bits": 2, "dense_dtype": "float32"}),
    Case("llama-float16", "dense", {"bits": 4}, *_F16),
]


def parameters(cases: list[Case]) -> list[Any]:
    """``cases`` as pytest parameters, those for gptqmodel marked."""
    return [
        pytest.param(
            case, id=case.name, marks=[pytest.mark.gptq] * (LIBRARY[case.layout] == "gptqmodel")
        )
        for case in cases
    ]
