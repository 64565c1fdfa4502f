"""Every family of docs/models.md: a small random model is converted, loaded with transformers and
PEFT, compared with a dense model that carries Q + BA, and trained for a step."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import loftq_cli
from loftq_cli.checkpoint.output import open_output
from loftq_cli.conversion.merge import merge
from loftq_cli.conversion.observer import Observer
from loftq_cli.conversion.run import prepare
from loftq_cli.integrations.names import RenamedModules
from loftq_cli.layouts import layout_of
from loftq_cli.layouts.base import matrix_of
from loftq_cli.recipe import Options
from loftq_cli.reporting.inspect import auto_class
from tests import models

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is:FutureWarning")

QUICK: dict[str, Any] = {"bits": 2, "rank": 8, "iters": 1, "threads": 1, "layout": "loftq"}
TOKENS = (torch.arange(22).view(2, 11) * 7 + 3) % 90 + 3
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SOUND = torch.randn(2, 80, 32, generator=torch.Generator().manual_seed(0))

LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4}
WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1}
PLAIN: dict[str, Any] = {"vocab_size": 96, "pad_token_id": 0, **LAYERS, **WIDTHS}
GROUPED = {**PLAIN, "num_key_value_heads": 2, "head_dim": 16}
IMAGE = {"image_size": 16, "patch_size": 8, **LAYERS, **WIDTHS}
TWO_STACKS = {
    "vocab_size": 96,
    "d_model": 64,
    "decoder_start_token_id": 2,
    "pad_token_id": 0,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "init_std": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Name in docs/models.md: model_type, class, config, how many matrices are selected.
FAMILIES: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "Llama": ("llama", "LlamaForCausalLM", GROUPED, 14),
    "Mistral": ("mistral", "MistralForCausalLM", GROUPED, 14),
    "Qwen2": ("qwen2", "Qwen2ForCausalLM", GROUPED, 14),
    "Qwen3": ("qwen3", "Qwen3ForCausalLM", GROUPED, 14),
    "Gemma": ("gemma", "GemmaForCausalLM", GROUPED, 14),
    "Gemma 2": ("gemma2", "Gemma2ForCausalLM", GROUPED, 14),
    "Gemma 3": ("gemma3_text", "Gemma3ForCausalLM", GROUPED, 14),
    "Phi": ("phi", "PhiForCausalLM", PLAIN, 12),
    "Phi-3": ("phi3", "Phi3ForCausalLM", PLAIN, 8),
    "Falcon": ("falcon", "FalconForCausalLM", PLAIN, 8),
    "GPT-2": (
        "gpt2",
        "GPT2LMHeadModel",
        {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.1},
        8,
    ),
    "OpenAI GPT": (
        "openai-gpt",
        "OpenAIGPTLMHeadModel",
        {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.1},
        8,
    ),
    "GPT-NeoX": ("gpt_neox", "GPTNeoXForCausalLM", PLAIN, 8),
    "OPT": ("opt", "OPTForCausalLM", {**PLAIN, "ffn_dim": 128, "word_embed_proj_dim": 64}, 12),
    "BERT": ("bert", "BertModel", PLAIN, 12),
    "RoBERTa": ("roberta", "RobertaModel", PLAIN, 12),
    "DistilBERT": (
        "distilbert",
        "DistilBertModel",
        {"vocab_size": 96, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4},
        12,
    ),
    "DeBERTa-v2, v3": (
        "deberta-v2",
        "DebertaV2Model",
        {**PLAIN, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        16,
    ),
    "BART": ("bart", "BartForConditionalGeneration", TWO_STACKS, 32),
    "T5": (
        "t5",
        "T5ForConditionalGeneration",
        {
            "vocab_size": 96,
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 128,
            "num_heads": 4,
            "num_layers": 2,
            "decoder_start_token_id": 0,
        },
        28,
    ),
    "ViT": ("vit", "ViTModel", IMAGE, 12),
    "Whisper": (
        "whisper",
        "WhisperForConditionalGeneration",
        {**TWO_STACKS, "max_source_positions": 16, "num_mel_bins": 80},
        32,
    ),
    "CLIP": (
        "clip",
        "CLIPModel",
        {"text_config": {**PLAIN, "eos_token_id": 2}, "vision_config": IMAGE},
        24,
    ),
    "Llava": (
        "llava",
        "LlavaForConditionalGeneration",
        {
            "text_config": {"model_type": "llama", **GROUPED},
            "vision_config": {"model_type": "clip_vision_model", **IMAGE},
            "image_token_index": 95,
            "vision_feature_layer": -1,
        },
        26,
    ),
}
# transformers has other names for layers of these in memory than there are on disk.
RENAMED = {"ViT": r"Target modules .* not found", "Llava": "Found missing adapter keys"}
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of a family's small model; biases and norms are random, too."""
    made: dict[str, Path] = {}

    def source(family: str) -> Path:
        if family not in made:
            kind, name, settings, _ = FAMILIES[family]
            made[family] = make(kind, name, settings, tmp_path_factory.mktemp(kind))
        return made[family]

    return source


def make(kind: str, name: str, settings: dict[str, Any], directory: Path) -> Path:
    """A checkpoint of a random model of class ``name``."""
    config = transformers.AutoConfig.for_model(kind, **settings)
    return models.save(models._randomised(getattr(transformers, name), config), directory)


def arguments(model: Any) -> dict[str, torch.Tensor]:
    """What the forward pass of a family takes."""
    kind = model.config.model_type
    if kind == "vit":
        return {"pixel_values": IMAGES}
    if kind == "whisper":
        return {"input_features": SOUND, "decoder_input_ids": TOKENS}
    tokens = {"input_ids": TOKENS}
    if model.config.is_encoder_decoder:
        return {**tokens, "decoder_input_ids": TOKENS[:, :5]}
    if kind == "llava":  # an image is four tokens
        tokens = {"input_ids": torch.cat([torch.full((2, 4), 95), TOKENS], dim=1)}
    return {**tokens, "pixel_values": IMAGES} if kind in ("clip", "llava") else tokens


def outputs(model: Any, taken: dict[str, torch.Tensor]) -> torch.Tensor:
    """Everything that the model returns."""
    returned = model(**taken).to_tuple()
    return torch.cat([item.flatten() for item in returned if isinstance(item, torch.Tensor)])


def dense(source: Path, output: Path, manifest: dict[str, Any], work: Path) -> Any:
    """The source's model with Q + BA in the place of every matrix."""
    stored = load_file(output / "model.safetensors")
    pairs = load_file(output / "loftq_init" / "adapter_model.safetensors")
    tensors = load_file(source / "model.safetensors")
    for record in manifest["matrices"]:
        matrix = matrix_of(record)
        value = layout_of(record, manifest["recipe"]).decode(matrix, stored)
        stem = f"base_model.model.{record['module']}"
        if f"{stem}.lora_embedding_A" in pairs:
            product = pairs[f"{stem}.lora_embedding_B"] @ pairs[f"{stem}.lora_embedding_A"]
            value = value + product.T
        else:
            value = value + pairs[f"{stem}.lora_B.weight"] @ pairs[f"{stem}.lora_A.weight"]
        conv1d = record.get("kind") == "conv1d"
        tensors[record["name"]] = value.T.contiguous() if conv1d else value
    work.mkdir()
    save_file(tensors, work / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(source / "config.json", work)
    return model_class(source).from_pretrained(work).eval()


def model_class(directory: Path) -> Any:
    config = json.loads((directory / "config.json").read_text())
    return getattr(transformers, config["architectures"][0])


def the_plain_way(directory: Path) -> Any:
    """As ``loftq inspect`` shows it."""
    backbone = getattr(transformers, auto_class(open_output(directory))).from_pretrained(directory)
    return peft.PeftModel.from_pretrained(
        backbone, directory, subfolder="loftq_init", is_trainable=True
    )


def check(family: str, source: Path, tmp_path: Path, load: Any, **settings: Any) -> dict[str, Any]:
    """Convert, load, compare, train a step; the manifest."""
    output = tmp_path / "out"
    manifest = loftq_cli.convert(source, output=output, **{**QUICK, **settings})
    reference = dense(source, output, manifest, tmp_path / "dense")
    model = load(output).eval()
    taken = arguments(reference)
    with torch.no_grad():
        wanted, found = outputs(reference, taken), outputs(model, taken)
        original = outputs(model_class(source).from_pretrained(source).eval(), taken)
    assert (found - wanted).abs().max() < 2e-5 * wanted.abs().max()
    assert (original - wanted).abs().max() > 1e-3 * wanted.abs().max()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(manifest["matrices"])
    optimizer = torch.optim.SGD(trained, lr=1e-5)
    before = (outputs(model, taken) - original).square().sum()
    before.backward()
    optimizer.step()
    with torch.no_grad():
        assert (outputs(model, taken) - original).square().sum() < before
    return manifest


@every_family
def test_it_is_converted_loaded_compared_and_trained(
    family: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    manifest = check(family, saved(family), tmp_path, loftq_cli.load)
    assert len(manifest["matrices"]) == FAMILIES[family][3]


@pytest.mark.parametrize("layout", ["loftq", "dense"])
@every_family
def test_the_plain_way(
    family: str, layout: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    if family not in RENAMED:
        check(family, saved(family), tmp_path, the_plain_way, layout=layout)
    elif layout == "loftq":
        with pytest.raises(RenamedModules, match=r"use loftq_cli\.load"):
            check(family, saved(family), tmp_path, the_plain_way)
    else:
        with pytest.raises((ValueError, UserWarning), match=RENAMED[family]):
            check(family, saved(family), tmp_path, the_plain_way, layout=layout)


@pytest.mark.parametrize("layout", ["loftq", "dense"])
@pytest.mark.parametrize("method", ["nf", "uniform"])
@pytest.mark.parametrize("load", [loftq_cli.load, the_plain_way])
def test_word_embeddings(
    layout: str, method: str, load: Any, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    source = saved("DeBERTa-v2, v3")
    settings = {"embeddings": True, "layout": layout, "method": method}
    manifest = check("DeBERTa-v2, v3", source, tmp_path, load, **settings)
    kinds = {e["name"]: e.get("kind") for e in manifest["matrices"] if e.get("kind")}
    assert kinds == {"embeddings.word_embeddings.weight": "embedding"}
    report = loftq_cli.error_report(tmp_path / "out", source=source)
    assert report["recomputed"]


# PEFT may save the table along with its pair.
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("layout", ["loftq", "dense"])
@pytest.mark.parametrize(
    ("kind", "name", "settings"),
    [
        # The root of the width is the factor, and no whole number.
        ("gemma2", "Gemma2ForCausalLM", {**GROUPED, "hidden_size": 96}),
        ("bart", "BartForCausalLM", {**TWO_STACKS, "d_model": 96, "scale_embedding": True}),
    ],
)
def test_embeddings_that_the_model_scales(
    kind: str, name: str, settings: Any, layout: str, tmp_path: Path
) -> None:
    source = make(kind, name, {**settings, "tie_word_embeddings": False}, tmp_path / "source")
    check(name, source, tmp_path, loftq_cli.load, layout=layout, embeddings=True)
    model = loftq_cli.load(tmp_path / "out").eval()
    with torch.no_grad():
        expected = outputs(model, arguments(model))
    model.save_pretrained(tmp_path / "trained")
    model_class(source).from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "backbone")
    for directory in ("out", "backbone"):
        backbone = model_class(source).from_pretrained(tmp_path / directory)
        again = peft.PeftModel.from_pretrained(backbone, tmp_path / "trained").eval()
        with torch.no_grad():
            assert torch.equal(outputs(again, arguments(again)), expected)


@pytest.mark.parametrize(
    ("family", "settings"), [("GPT-2", {}), ("DeBERTa-v2, v3", {"embeddings": True})]
)
@pytest.mark.parametrize("layout", ["loftq", "dense"])
def test_merged_it_is_the_dense_model(
    family: str, settings: Any, layout: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    source, output = saved(family), tmp_path / "out"
    manifest = loftq_cli.convert(source, output=output, **{**QUICK, **settings, "layout": layout})
    merge(output, tmp_path / "merged", observer=Observer())
    reference = dense(source, output, manifest, tmp_path / "dense")
    merged = model_class(source).from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        wanted = outputs(reference, arguments(reference))
        found = outputs(merged, arguments(merged))
    assert (found - wanted).abs().max() < 2e-5 * wanted.abs().max()


@pytest.mark.parametrize(
    ("family", "settings"), [("GPT-2", {}), ("DeBERTa-v2, v3", {"embeddings": True})]
)
def test_reports_are_of_the_matrix_as_the_model_has_it(
    family: str, settings: Any, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    source, output = saved(family), tmp_path / "out"
    manifest = loftq_cli.convert(source, output=output, **{**QUICK, **settings})
    approximation = dense(source, output, manifest, tmp_path / "dense").state_dict()
    original = model_class(source).from_pretrained(source).state_dict()
    report = loftq_cli.error_report(output, source=source)
    assert report["recomputed"]
    for layer in report["layers"]:
        difference = original[layer["name"]] - approximation[layer["name"]]
        assert layer["final"] == pytest.approx(float(difference.double().norm()), rel=1e-5)
        assert layer["weight"] == pytest.approx(float(original[layer["name"]].norm()), rel=1e-5)
    found = loftq_cli.inspect(output, verify=True)
    assert found["verified_files"]
    adapter = load_file(output / "loftq_init" / "adapter_model.safetensors")
    for layer in found["layers"]:
        module = layer["name"].removesuffix(".weight")
        held = [t.nbytes for name, t in adapter.items() if f".{module}.lora_" in name]
        assert (len(held), layer["adapter_bytes"]) == (2, sum(held))
        sides = list(original[layer["name"]].shape)
        assert layer["shape"] == (sides[::-1] if family == "GPT-2" else sides)


def test_the_table_in_the_manual_has_these_families_and_their_layouts(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    text = (Path(__file__).parents[2] / "docs/models.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| `.* \| (\w+(?:, \w+)?) \|$", text, re.MULTILINE)
    found = []
    for family in FAMILIES:
        layouts = []
        for bits in (4, 2):
            options = Options(bits=bits, rank=8, threads=1)
            plan, _ = prepare(str(saved(family)), tmp_path / "out", options, observer=Observer())
            layouts.append(plan.layout.name)
        found.append((family, ", ".join(dict.fromkeys(layouts))))
    assert rows == found
