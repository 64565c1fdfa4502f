"""The families of docs/models.md as small random models, and what each conversion is held to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

import loftq_cli
from loftq_cli.checkpoint.small_file import read_json
from loftq_cli.families.classes import auto_class
from loftq_cli.layouts.base import matrix_of
from loftq_cli.layouts.registry import layout_of
from tests.support import models

QUICK: dict[str, Any] = {"bits": 2, "rank": 8, "iters": 1, "threads": 1, "layout": "loftq"}
TOKENS = (torch.arange(22).view(2, 11) * 7 + 3) % 90 + 3
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SOUND = torch.randn(2, 80, 32, generator=torch.Generator().manual_seed(0))

LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4}
WIDTHS = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1}
PLAIN: dict[str, Any] = {"vocab_size": 96, "pad_token_id": 0, **LAYERS, **WIDTHS}
GROUPED = {**PLAIN, "num_key_value_heads": 2, "head_dim": 16}
IMAGE = {"image_size": 16, "patch_size": 8, **LAYERS, **WIDTHS}
GPT = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.1}
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
    "GPT-2": ("gpt2", "GPT2LMHeadModel", GPT, 8),
    "OpenAI GPT": ("openai-gpt", "OpenAIGPTLMHeadModel", GPT, 8),
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
        stem = f"base_model.model.{record.get('in_memory', record['module'])}"
        if f"{stem}.lora_embedding_A" in pairs:
            product = pairs[f"{stem}.lora_embedding_B"] @ pairs[f"{stem}.lora_embedding_A"]
            value = value + product.T
        elif "cut" in record:
            cut, part = record["cut"], value + of_expert(pairs, stem, record["rank"])
            tensors[cut["tensor"]][cut["index"]] = part.T if cut["transposed"] else part
            continue
        else:
            value = value + pairs[f"{stem}.lora_B.weight"] @ pairs[f"{stem}.lora_A.weight"]
        conv1d = record.get("kind") == "conv1d"
        tensors[record["name"]] = value.T.contiguous() if conv1d else value
    work.mkdir()
    save_file(tensors, work / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(source / "config.json", work)
    return model_class(source).from_pretrained(work).eval()


def of_expert(pairs: dict[str, torch.Tensor], stem: str, rank: int) -> torch.Tensor:
    """B A of an expert whose parameter is one tensor of the checkpoint: PEFT stacks all A of a
    layer, and has the expert last in B."""
    experts, number, leaf = stem.rsplit(".", 2)
    path = experts if leaf == "down_proj" else f"{experts}.base_layer"
    lora_A, lora_B = (pairs[f"{path}.lora_{side}.weight"] for side in "AB")
    count, expert = len(lora_A) // rank, int(number)
    return lora_B.view(-1, rank, count)[:, :, expert] @ lora_A.view(count, rank, -1)[expert]


def model_class(directory: Path) -> Any:
    config = json.loads((directory / "config.json").read_text())
    return getattr(transformers, config["architectures"][0])


def the_plain_way(directory: Path) -> Any:
    """As ``loftq inspect`` shows it."""
    backbone = getattr(
        transformers, auto_class(read_json(directory / "config.json").content)
    ).from_pretrained(directory)
    return peft.PeftModel.from_pretrained(
        backbone, directory, subfolder="loftq_init", is_trainable=True
    )


def check(source: Path, tmp_path: Path, load: Any, **settings: Any) -> dict[str, Any]:
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
