"""Kinds of models that are more than a stack of blocks behind word embeddings."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from loftq_cli.calibration.calibrate import Measuring, calibrate
from loftq_cli.checkpoint.request import Request
from loftq_cli.checkpoint.source import open_source
from loftq_cli.errors import InputError, UnsupportedInputError, UsageError
from loftq_cli.families.experts import is_expert
from loftq_cli.families.lengths import limits
from loftq_cli.machine.observer import Observer
from loftq_cli.planning.make import anatomy_of
from loftq_cli.planning.selection import select
from tests.support import models
from tests.support.calibrated import LENGTH, TEXT, measured
from tests.support.models import CHARACTERS, FIRST_CHARACTER
from tests.whole.interop.architectures import FAMILIES, PLAIN
from tests.whole.interop.published import CASES, Published, save

WORDS = {"vocab_size": models.VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHORT = {**PLAIN, **WORDS, "max_position_embeddings": 20}
PADDED = {**SHORT, "pad_token_id": 1}  # positions start behind it
TWO_STACKS = {
    **WORDS,
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "init_std": 0.1,
}


def made(kind: str, name: str, settings: dict[str, Any], directory: Path) -> Path:
    """A checkpoint of a random model of class ``name``, with a tokenizer."""
    return models.save_tokenizer(save(Published(kind, name, settings, 0), directory))


def plain_hooks(model: Any, read: Any, length: int) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
    """The weight, E[x x^T] in float64 and the count of tokens of every linear layer of ``model``
    that is called while ``read`` gets the text."""
    seen: dict[Any, list[torch.Tensor]] = {}
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, transformers.pytorch_utils.Conv1D)):
            module.register_forward_pre_hook(
                lambda module, args: seen.setdefault(module, []).append(args[0].flatten(0, -2))
            )
    ids = [FIRST_CHARACTER + CHARACTERS.index(character) for character in TEXT]
    room = length - 2
    for start in range(0, len(ids) - room + 1, room):
        with torch.no_grad():
            read(input_ids=torch.tensor([[1, *ids[start : start + room], 2]]))
    moments = []
    for module, inputs in seen.items():
        rows = torch.cat(inputs).double()
        moments.append((module.weight, rows.T @ rows / len(rows), len(rows)))
    return moments


NOTHING = "^$"
# Of published files: the matrices that text does not go through.
UNREACHED = {
    "Gemma 3": r"^vision_tower\.vision_model\.",
    "Qwen2-VL": r"^visual\.(?:blocks\.\d\.|merger\.mlp\.)",
    "Llava": r"^vision_tower\.vision_model\.",
    "Mistral 3": r"^vision_tower\.",
    "CLIP": r"^vision_model\.",
    "GPT-2 without a prefix": NOTHING,
    "Falcon-H1": NOTHING,
    "Zamba, which shares blocks": NOTHING,
    "Gemma 3n": NOTHING,
    "Granite with experts": NOTHING,
}
CLIP = Published(*FAMILIES["CLIP"])


@pytest.mark.parametrize("kind", UNREACHED)
def test_text_goes_through_its_part_of_a_model_as_in_the_plain_model(kind, tmp_path, notes):
    case = CLIP if kind == "CLIP" else CASES[kind]
    directory = models.save_tokenizer(save(case, tmp_path / "model"))
    found = measured(directory, notes, moments="full")
    source = open_source(directory)
    selection = select(source.tensors, source.config.content, anatomy=anatomy_of(source))
    selected = {tensor.name for tensor in selection.matrices}
    reached = {name for name in selected if not re.search(UNREACHED[kind], name)}
    assert {name for name in found.matrices if not is_expert(name)} == reached
    assert (reached == selected) == (UNREACHED[kind] == NOTHING)
    model_class = getattr(transformers, case.architecture)
    model = model_class.from_pretrained(directory, dtype=torch.float32).eval()
    expected = plain_hooks(model, model.text_model if kind == "CLIP" else model, LENGTH)
    stored = load_file(directory / "model.safetensors")
    for matrix in reached:
        wanted: Any
        ((wanted, tokens),) = (
            moments for weight, *moments in expected if torch.equal(weight, stored[matrix])
        )
        assert found.tokens(matrix) == tokens
        scale = float(wanted.abs().max())
        torch.testing.assert_close(
            found.moments(matrix).double(), wanted, rtol=1e-4, atol=1e-5 * scale
        )


@pytest.mark.parametrize(
    ("family", "name", "settings", "room"),
    [
        (
            "roberta",
            "RobertaModel",
            PADDED,
            18,
        ),
        ("mpnet", "MPNetModel", PADDED, 18),
        (
            "longformer",
            "LongformerModel",
            {**PADDED, "max_position_embeddings": 22, "attention_window": 4},
            20,
        ),
        (
            "opt",
            "OPTForCausalLM",
            {**SHORT, "ffn_dim": 128, "word_embed_proj_dim": 64},
            20,
        ),
        ("mbart", "MBartModel", {**TWO_STACKS, "max_position_embeddings": 20}, 20),
        (
            "led",  # pads what its encoder reads to whole windows
            "LEDModel",
            {
                **TWO_STACKS,
                "attention_window": 4,
                "max_encoder_position_embeddings": 19,
                "max_decoder_position_embeddings": 18,
            },
            16,
        ),
    ],
)
def test_windows_are_as_long_as_the_table_of_positions_has_room_for(
    family, name, settings, room, tmp_path, notes
):
    directory = made(family, name, settings, tmp_path / "model")
    assert transformers.AutoTokenizer.from_pretrained(directory).model_max_length > 1e6
    result = calibrate(
        Request(str(directory)),
        tmp_path / "stats",
        [notes],
        Measuring(device="cpu"),
        observer=Observer(),
    )
    assert result["length"] == room
    with pytest.raises(UsageError, match=f"--length {room + 1}: the model takes {room} tokens"):
        measured(directory, notes, length=room + 1)


@pytest.mark.parametrize("part", ["text_config", "llm_config", "encoder", "decoder"])
def test_limits_are_found_in_the_parts_of_a_config_that_are_of_text(part):
    image = {"vision_config": {"max_position_embeddings": 7}}
    audio = {"audio_encoder": {"n_ctx": 5}, "depth_decoder_config": {"n_ctx": 9}}  # Moshi's
    told = {"thinker_config": {part: {"max_position_embeddings": 40}, **image}, **audio}
    assert [*limits(told), *limits({part: {"n_positions": 30}, **image})] == [40, 30]
    assert list(limits({"max_position_embeddings": 10**9, "n_ctx": None})) == []


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (CASES["ViT with a head"], "it takes pixel_values"),
        (CASES["CLIP, the vision model"], "it takes pixel_values"),
        (CASES["WavLM"], "it takes input_values"),
        (Published(*FAMILIES["Whisper"]), "it takes input_features"),
    ],
)
def test_models_that_take_no_text_are_refused_before_they_are_loaded(
    case, said, tmp_path, notes, monkeypatch
):
    directory = save(case, tmp_path / "model")
    monkeypatch.delattr(transformers.PreTrainedModel, "from_pretrained")
    with pytest.raises(
        UnsupportedInputError, match=f"cannot be run on text alone: {said}"
    ) as found:
        measured(directory, notes)
    assert "loftq_cli.Moments, see docs/statistics.md" in found.value.hint


NO_WORDS = {**CLIP.settings, "text_config": {**CLIP.settings["text_config"], "vocab_size": 40}}


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (CASES["BLIP-2 with T5"], "cannot be run on text alone: .*'pixel_values'"),
        (
            Published("lxmert", "LxmertModel", {**SHORT, "l_layers": 1, "r_layers": 1}, 0),
            "cannot be run on text alone: .visual_feats. cannot be .None.",
        ),
        # CLIP's model does not say which its embeddings of words are.
        (
            Published("clip", "CLIPModel", NO_WORDS, 0),
            "the tokenizer gives token 70, the model has 40",
        ),
    ],
)
def test_models_that_text_alone_does_not_run_say_so(case, said, tmp_path, notes):
    directory = models.save_tokenizer(save(case, tmp_path / "model"))
    with pytest.raises(InputError, match=said):
        measured(directory, notes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "notes.txt"]


def test_a_model_without_architectures_is_that_of_its_type(tmp_path, notes):
    """In config.json as some write it; the class is then the bare model."""
    directory = models.save_tokenizer(models.save(models.llama(), tmp_path / "model"))
    expected = measured(directory, notes)
    file = directory / "config.json"
    config = json.loads(file.read_text())
    del config["architectures"]
    file.write_text(json.dumps(config))
    found = measured(directory, notes)
    assert set(found.matrices) == set(expected.matrices)
    for name in found.matrices:
        assert torch.equal(found.moments(name), expected.moments(name))


def test_a_table_too_small_for_any_text_says_so(tmp_path, notes):
    settings = {**PADDED, "max_position_embeddings": 5}
    directory = made("roberta", "RobertaModel", settings, tmp_path / "model")
    with pytest.raises(InputError, match="a table of the model has 5 rows, and is asked for row 6"):
        measured(directory, notes, length=4)
