"""The text part of a model for images and text is loaded from its conversion, as transformers loads
it from the model itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import loftq_cli
from loftq_cli.errors import UnsupportedInputError
from loftq_cli.families.parts import config_for, left_out
from tests.whole.zoo import small
from tests.whole.zoo.inputs import TOKENS

QUICK: dict[str, Any] = {"bits": 4, "rank": 4, "iters": 1, "threads": 1}
CAUSAL = transformers.AutoModelForCausalLM
MODELS = {
    "llama4": ("Llama4ForConditionalGeneration", transformers.Llama4ForCausalLM),
    "mllama": ("MllamaForConditionalGeneration", transformers.MllamaForCausalLM),
    "qwen3_5": ("Qwen3_5ForConditionalGeneration", transformers.Qwen3_5ForCausalLM),
}

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers', about what it leaves out


@pytest.fixture(scope="module")
def conversion(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``conversion(kind, layout)``: with the merged model beside it, in ``merged``."""
    made: dict[tuple[str, str], Path] = {}

    def get(kind: str, layout: str = "loftq") -> Path:
        if (kind, layout) not in made:
            work = tmp_path_factory.mktemp("parts")
            names = {**MODELS, "gemma3": ("Gemma3ForConditionalGeneration", None)}
            small.build(kind, names[kind][0]).save_pretrained(work / "source")
            odd = ("*in_proj_[ab].*", "*down_proj*", "*fc2*") if layout == "compressed" else ()
            loftq_cli.convert(
                work / "source", output=work / "out", layout=layout, exclude=odd, **QUICK
            )
            loftq_cli.merge(work / "out", output=work / "merged")
            made[kind, layout] = work / "out"
        return made[kind, layout]

    return get


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=TOKENS, use_cache=False).logits
    return found


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("qwen3_5", "loftq"), ("qwen3_5", "dense"), ("qwen3_5", "compressed"), ("mllama", "loftq")],
)
@pytest.mark.parametrize("named", [True, False])
def test_the_text_part_computes_what_it_does_in_the_whole(kind, layout, named, conversion) -> None:
    directory, (whole, part) = conversion(kind, layout), MODELS[kind]
    model = loftq_cli.load(directory, auto_class=part if named else CAUSAL, dtype="float32")
    assert type(model.get_base_model()) is part
    merged = getattr(transformers, whole).from_pretrained(
        directory.parent / "merged", dtype="float32"
    )
    wanted = logits(merged)
    assert (logits(model) - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert all(p.any() for name, p in model.named_parameters() if ".lora_B." in name)


def test_a_trained_text_part_is_loaded_again(conversion, tmp_path) -> None:
    directory = conversion("qwen3_5")
    model = loftq_cli.load(directory, auto_class=CAUSAL, dtype="float32")
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            nn.init.normal_(parameter.data)
    model.save_pretrained(tmp_path / "trained")
    again = loftq_cli.load(
        directory, auto_class=CAUSAL, adapter=tmp_path / "trained", dtype="float32"
    )
    assert torch.equal(logits(again), logits(model))


def test_a_class_that_transformers_would_draw_at_random_is_refused(conversion) -> None:
    """Gemma3ForCausalLM finds nothing in a checkpoint of the whole; the auto class takes it all."""
    directory = conversion("gemma3")
    with pytest.raises(UnsupportedInputError, match="Gemma3ForCausalLM has no linear layer"):
        loftq_cli.load(directory, auto_class=transformers.Gemma3ForCausalLM)
    model = loftq_cli.load(directory, auto_class=CAUSAL)
    assert type(model.get_base_model()) is transformers.Gemma3ForConditionalGeneration


class Stacks(nn.Module):
    """Stacks of blocks by these names, one linear layer in each of two."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]))


WHOLE = {f"{stack}.{number}" for stack in ("text", "images") for number in range(2)}


@pytest.mark.parametrize(
    ("stacks", "found", "outside"),
    [
        (("text", "images"), WHOLE, set()),
        (("text",), {"text.0", "text.1"}, {"images.0", "images.1"}),
        (("text",), {"text.0"}, {"images.0", "images.1"}),  # text.1 is lost, not left out
        (("text", "other"), {"text.0", "text.1"}, set()),  # nothing goes to a stack of its own
        (("other",), set(), set()),
    ],
)
def test_what_a_part_leaves_out_is_whole_stacks(stacks, found, outside) -> None:
    assert left_out(Stacks(*stacks), WHOLE, {name: name for name in found}) == outside


def test_the_config_of_a_part_says_how_the_whole_is_quantized() -> None:
    config = copy.deepcopy(small.config_of("qwen3_5"))
    config.quantization_config = {"quant_method": "loftq"}
    part = config_for(transformers.Qwen3_5ForCausalLM, config)
    assert part is config.text_config
    assert part.quantization_config == {"quant_method": "loftq"}
    assert config_for(transformers.Qwen3_5ForConditionalGeneration, config) is None
    assert config_for(CAUSAL, config) is None
    assert config_for(transformers.LlamaForCausalLM, config) is None
