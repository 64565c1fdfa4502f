"""Small random models with the names that published files have, which are not always those that
``save_pretrained`` writes, and with what files hold beside the model's own tensors."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.support import models
from tests.whole.interop.architectures import FAMILIES, GPT, GROUPED, IMAGE, IMAGES, PLAIN, TOKENS

READ = "the model's code reads this weight itself"
WAVES = torch.randn(2, 400, generator=torch.Generator().manual_seed(0))
IMAGE_TOKENS = torch.cat([torch.full((2, 4), 95), TOKENS], dim=1)

_VISION = {**IMAGE, "hidden_size": 32, "intermediate_size": 64}
_SECTIONS = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
_VL_TEXT = {**GROUPED, "rope_parameters": _SECTIONS}
_MOE = {**GROUPED, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_PROJECTED = {**_VISION, "patch_size": 4, "out_hidden_size": 64}


@dataclass(frozen=True)
class Published:
    """``renames``: (pattern, replacement) from the names that ``save_pretrained`` writes to those
    of published files. ``copied``: (name, name of the copy) patterns of tensors that files hold
    twice. ``reasons``: why matrices are passed through, by the end of their names. ``converted``:
    how many are not."""

    kind: str
    architecture: str
    settings: dict[str, Any]
    converted: int
    renames: tuple[tuple[str, str], ...] = ()
    copied: tuple[str, str] | None = None
    reasons: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, torch.Tensor] = field(default_factory=lambda: {"input_ids": TOKENS})


def save(case: Published, directory: Path) -> Path:
    """The checkpoint of ``case``."""
    config = transformers.AutoConfig.for_model(case.kind, **case.settings)
    models.save(models._randomised(getattr(transformers, case.architecture), config), directory)
    file = directory / "model.safetensors"
    tensors = {}
    for name, tensor in load_file(file).items():
        for pattern, replacement in case.renames:
            name = re.sub(pattern, replacement, name)
        tensors[name] = tensor
    if case.copied is not None:
        for name, tensor in list(tensors.items()):
            if re.search(case.copied[0], name):
                tensors[re.sub(*case.copied, name)] = tensor.clone()
    save_file(tensors, file, metadata={"format": "pt"})
    config_file = directory / "config.json"
    assert json.loads(config_file.read_text())["architectures"] == [case.architecture]
    return directory


_QWEN_VL = ((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual."))

CASES: dict[str, Published] = {
    "Qwen2-VL": Published(
        "qwen2_vl",
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": _VL_TEXT,
            "vision_config": {
                "depth": 2,
                "embed_dim": 32,
                "hidden_size": 64,
                "num_heads": 4,
                "mlp_ratio": 2,
                "patch_size": 4,
            },
        },
        23,
        _QWEN_VL,
        reasons={
            "visual.blocks.0.mlp.fc2.weight": "the model's code casts to the dtype of this weight"
        },
    ),
    "Qwen2.5-VL": Published(
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        {"text_config": _VL_TEXT, "vision_config": {"depth": 2, "num_heads": 4, **_PROJECTED}},
        26,
        _QWEN_VL,
    ),
    "Llava": Published(
        "llava",
        "LlavaForConditionalGeneration",
        FAMILIES["Llava"][2],
        26,
        ((r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model."),),
        inputs={"input_ids": IMAGE_TOKENS, "pixel_values": IMAGES},
    ),
    "Gemma 3": Published(
        "gemma3",
        "Gemma3ForConditionalGeneration",
        {"text_config": GROUPED, "vision_config": _VISION, "mm_tokens_per_image": 4},
        26,
        ((r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model."),),
    ),
    "Mistral 3": Published(
        "mistral3",
        "Mistral3ForConditionalGeneration",
        {
            "text_config": {"model_type": "mistral", **GROUPED},
            "vision_config": {"model_type": "pixtral", **_VISION, "head_dim": 8},
            "spatial_merge_size": 1,
        },
        28,
    ),
    "PaliGemma": Published(
        "paligemma",
        "PaliGemmaForConditionalGeneration",
        {
            "text_config": {"model_type": "gemma", **GROUPED},
            "vision_config": {"model_type": "siglip_vision_model", **_VISION},
            "projection_dim": 64,
            "image_token_index": 95,
        },
        26,
        ((r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model."),),
    ),
    "CLIP, the vision model": Published(
        "clip_vision_model",
        "CLIPVisionModel",
        IMAGE,
        12,
        ((r"^(?!vision_model)", "vision_model."),),
        inputs={"pixel_values": IMAGES},
    ),
    "ViT with a head": Published(
        "vit", "ViTForImageClassification", IMAGE, 12, inputs={"pixel_values": IMAGES}
    ),
    "GPT-2 without a prefix": Published(
        "gpt2", "GPT2LMHeadModel", GPT, 8, ((r"^transformer\.", ""),)
    ),
    "DINOv2 with SwiGLU": Published(
        "dinov2",
        "Dinov2Model",
        {**IMAGE, "use_swiglu_ffn": True},
        10,
        reasons={"weights_in.weight": "transformers splits or fuses it while it loads"},
        inputs={"pixel_values": IMAGES},
    ),
    "WavLM": Published(
        "wavlm",
        "WavLMModel",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "conv_dim": [16, 16],
            "conv_stride": [2, 2],
            "conv_kernel": [3, 3],
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
        },
        6,
        reasons={f"attention.{side}_proj.weight": READ for side in ("q", "k", "v", "out")},
        inputs={"input_values": WAVES},
    ),
    "Mamba 2": Published(
        "mamba2",
        "Mamba2ForCausalLM",
        {
            "vocab_size": 96,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 16,
            "state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
            "pad_token_id": 0,
        },
        2,
        reasons={
            "mixer.out_proj.weight": "kernels of Mamba take the weight itself, and PEFT refuses it"
        },
    ),
    "Falcon-H1": Published(
        "falcon_h1",
        "FalconH1ForCausalLM",
        {
            **GROUPED,
            "mamba_d_ssm": 128,
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
        },
        16,
        reasons={
            "mamba.out_proj.weight": "kernels of Mamba take the weight itself, and PEFT refuses it"
        },
    ),
    "Zamba, which shares blocks": Published(
        "zamba",
        "ZambaForCausalLM",
        {
            "vocab_size": 96,
            "hidden_size": 64,
            "attention_hidden_size": 128,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "n_mamba_heads": 2,
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "pad_token_id": 0,
        },
        10,
        reasons={
            f"1.shared_transf.{name}.weight": f"shared with model.layers.3.shared_transf.{name}"
            for name in ("self_attn.q_proj", "self_attn.o_proj", "feed_forward.down_proj")
        },
    ),
    "ALBERT, which is one block": Published(
        "albert", "AlbertModel", {**PLAIN, "embedding_size": 32}, 6
    ),
    "Granite with experts": Published(
        "granitemoe",
        "GraniteMoeForCausalLM",
        {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
        8,
        reasons={"router.layer.weight": "router"},
    ),
    "Gemma 3n": Published(
        "gemma3n_text",
        "Gemma3nForCausalLM",
        {
            **GROUPED,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": 96,
            "hidden_size_per_layer_input": 16,
            "altup_active_idx": 0,
            "altup_num_inputs": 2,
            "laurel_rank": 8,
            "intermediate_size": [128] * 4,
            "layer_types": ["full_attention"] * 4,
            "activation_sparsity_pattern": [0.0] * 4,
        },
        42,
        copied=(r"layers\.1\.self_attn\.([kv])_proj", r"layers.3.self_attn.\1_proj"),
        reasons={
            "altup.prediction_coefs.weight": READ,
            "altup.correction_coefs.weight": READ,
            "layers.3.self_attn.k_proj.weight": "Gemma3nForCausalLM does not load it",
        },
    ),
    "BLIP-2 with T5": Published(
        "blip-2",
        "Blip2ForConditionalGeneration",
        {
            "vision_config": {"model_type": "blip_2_vision_model", **_VISION},
            "qformer_config": {"model_type": "blip_2_qformer", **PLAIN, "encoder_hidden_size": 32},
            "text_config": {**FAMILIES["T5"][2], "model_type": "t5", "pad_token_id": 0},
            "num_query_tokens": 4,
            "image_token_index": 95,
        },
        52,
        reasons={"DenseReluDense.wo.weight": "kept in floating point by transformers"},
        inputs={
            "pixel_values": IMAGES,
            "input_ids": IMAGE_TOKENS,
            "decoder_input_ids": TOKENS[:, :5],
        },
    ),
    "GLM-4 with experts and a further block": Published(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        {
            **_MOE,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
        8,
        copied=(r"layers\.1\.", "layers.2."),
        reasons={"layers.2.self_attn.q_proj.weight": "beyond the blocks that config.json counts"},
    ),
    "Qwen3-Next with a prediction head": Published(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        {
            **_MOE,
            "layer_types": ["full_attention"] * 2,
            "num_experts": 4,
            "shared_expert_intermediate_size": 32,
            "linear_num_value_heads": 2,
            "linear_num_key_heads": 2,
        },
        8,
        copied=(r"model\.layers\.1\.", "mtp.layers.0."),
        reasons={
            "mtp.layers.0.self_attn.q_proj.weight": "beyond the blocks that config.json counts"
        },
    ),
}
