"""Tiny random mixture-of-experts models, as transformers makes and saves them, and how they are
loaded, run and trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from loftq_cli.families import experts

_BASE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
    "num_experts_per_tok": 2,
}
_QWEN = {"num_experts": 4, "moe_intermediate_size": 32}
_DEEPSEEK = {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen2_moe": ("Qwen2Moe", {**_QWEN, "shared_expert_intermediate_size": 64}),
    "qwen3_moe": ("Qwen3Moe", {**_QWEN, "head_dim": 16}),
    # With a layer that has no experts.
    "qwen3_moe_mixed": ("Qwen3Moe", {**_QWEN, "head_dim": 16, "mlp_only_layers": [0]}),
    "deepseek_v2": ("DeepseekV2", _DEEPSEEK),
    "deepseek_v3": ("DeepseekV3", _DEEPSEEK),
    "gpt_oss": ("GptOss", {"head_dim": 16, "num_local_experts": 4, "sliding_window": 16}),
    "llama4": (
        "Llama4",
        {
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 128,
            "moe_layers": [1],
        },
    ),
}
KINDS = tuple(_KINDS)


def make(kind: str) -> Any:
    """A causal language model of two blocks with four experts."""
    name, settings = _KINDS[kind]
    config_name = f"{name}TextConfig" if kind == "llama4" else f"{name}Config"
    config = getattr(transformers, config_name)(**_BASE | settings)
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


# Families whose experts are converted, built small: all the names that their configs have.
_SMALL = {
    **{key: value for key, value in _BASE.items() if key != "intermediate_size"},
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"), 1),
    **dict.fromkeys(("num_dense_layers", "num_shared_experts"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "moe_intermediate_size"), 32),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_nope_head_dim"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("index_head_dim", "index_topk"), 16),
    **dict.fromkeys(("linear_num_key_heads", "index_n_heads", "moe_k"), 2),
    "intermediate_size": 96,
    "linear_num_value_heads": 4,
    "qk_rope_head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA4 = {
    **_BASE,
    "head_dim": 16,
    "global_head_dim": 16,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_global_key_value_heads": 2,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 32,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
}
_LATENT = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa")
FUSED_BY_PEFT = experts._FUSED_BY_PEFT
FUSED_BY_US = (
    *(
        "aria_text",
        "gemma4_text",
        "gpt_oss",
        "granitemoe",
        "granitemoeshared",
        "jamba",
        "llama4_text",
    ),
    *("nemotron_h", "phimoe", "qwen2_moe", "qwen3_5_moe_text"),
)
"""Whose adapters are written in PEFT's own form for all experts of a layer; some of those whose
experts are told by what transformers makes of them."""


def family(kind: str) -> Any:
    """A causal language model of the family, of two blocks with four experts each."""
    made = transformers.models.auto.configuration_auto.CONFIG_MAPPING[kind]
    if kind == "gemma4_text":  # whose layers differ in size, and have experts if they are told to
        settings = dict(_GEMMA4)
    else:
        settings = {key: value for key, value in _SMALL.items() if hasattr(made(), key)}
    if kind in _LATENT:  # heads of their own sizes
        settings["num_key_value_heads"] = 4
        settings.pop("head_dim", None)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(made(**settings)).eval()


QUICK: dict[str, Any] = {"bits": 2, "rank": 8, "iters": 1, "threads": 1}
TOKENS = (torch.arange(22).view(2, 11) * 7 + 3) % 90 + 3


def model_class(directory: Path) -> Any:
    config = json.loads((directory / "config.json").read_text())
    return getattr(transformers, config["architectures"][0])


def adapted(directory: Path) -> Any:
    """The output as PEFT's documentation says to load it."""
    backbone = model_class(directory).from_pretrained(directory)
    return peft.PeftModel.from_pretrained(
        backbone, directory, subfolder="loftq_init", is_trainable=True
    )


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS, use_cache=False).logits


def train(model: Any) -> tuple[float, float]:
    """The losses before and after one step; every adapter must get a gradient."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-3)  # a router chooses otherwise after a large step
    before = model(TOKENS, labels=TOKENS, use_cache=False).loss
    before.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".indexer." not in name:  # that chooses, and has no gradient
            assert parameter.grad is not None, name
            assert parameter.grad.any(), name
    optimizer.step()
    return before.item(), model(TOKENS, labels=TOKENS, use_cache=False).loss.item()
