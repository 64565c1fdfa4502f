"""Layout bnb against bitsandbytes' own quantizer, and under a task model's heads."""

from __future__ import annotations

import torch
import transformers
from bitsandbytes import functional
from safetensors.torch import load_file

from tests.whole.interop.cases import CASES


def _case(source: str, **settings):
    wanted = {"bits": 4, "method": "nf", **settings}
    return next(c for c in CASES if (c.source, c.layout, c.settings) == (source, "bnb", wanted))


def test_absmax_codes_and_scales_are_those_of_bitsandbytes(output) -> None:
    converted = output(_case("llama", scale="absmax", iters=0))
    weights = load_file(converted.source / "model.safetensors")
    for matrix in converted.matrices():
        packed, state = functional.quantize_4bit(
            weights[matrix.name], blocksize=64, quant_type="nf4"
        )
        assert torch.equal(converted.tensors[matrix.name], packed)
        assert torch.equal(converted.tensors[f"{matrix.name}.absmax"], state.absmax)


def test_a_bare_models_modules_are_kept_as_in_the_task_model(output) -> None:
    directory = output(_case("classifier")).directory
    model, info = transformers.BertModel.from_pretrained(directory, output_loading_info=True)
    assert type(model.pooler.dense) is torch.nn.Linear
    assert type(model.encoder.layer[1].output.dense).__name__ == "Linear4bit"
    assert not info["missing_keys"]


def test_a_task_models_heads_are_not_quantized(output) -> None:
    directory = output(_case("bert")).directory
    model, info = transformers.BertForSequenceClassification.from_pretrained(
        directory, output_loading_info=True
    )
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert kinds["classifier"] == kinds["bert.pooler.dense"] == "Linear"
    assert kinds["bert.encoder.layer.1.output.dense"] == "Linear4bit"
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert not info["unexpected_keys"]
