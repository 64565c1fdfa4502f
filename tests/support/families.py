"""Model families: their transformers classes, and what of their checkpoints is quantized."""

from __future__ import annotations

from typing import Any

SIZES = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
MOE = {**SIZES, "num_key_value_heads": 2}
LLAMA_BLOCK = {
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}
BERT_BLOCK = {
    *("attention.self.query", "attention.self.key", "attention.self.value"),
    *("attention.output.dense", "intermediate.dense", "output.dense"),
}
NEOX_MLP = {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"}
OPT_MLP = {"fc1", "fc2"}

# Model class, what its config needs, and per stack of blocks the linear layers of every block.
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, set[str]]]] = {
    "llama": ("LlamaForCausalLM", SIZES, {"model.layers": LLAMA_BLOCK}),
    "mistral": ("MistralForCausalLM", MOE, {"model.layers": LLAMA_BLOCK}),
    "qwen2": ("Qwen2ForCausalLM", MOE, {"model.layers": LLAMA_BLOCK}),
    "phi": (
        "PhiForCausalLM",
        SIZES,
        {
            "model.layers": {
                *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense"),
                *("mlp.fc1", "mlp.fc2"),
            }
        },
    ),
    "opt": (
        "OPTForCausalLM",
        {**SIZES, "ffn_dim": 32, "word_embed_proj_dim": 8},
        {
            "model.decoder.layers": {
                *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                *("self_attn.out_proj", *OPT_MLP),
            }
        },
    ),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        SIZES,
        {"gpt_neox.layers": {"attention.query_key_value", "attention.dense", *NEOX_MLP}},
    ),
    "falcon": (
        "FalconForCausalLM",
        SIZES,
        {"transformer.h": {"self_attention.query_key_value", "self_attention.dense", *NEOX_MLP}},
    ),
    "bert": ("BertForSequenceClassification", SIZES, {"bert.encoder.layer": BERT_BLOCK}),
    "roberta": ("RobertaForMaskedLM", SIZES, {"roberta.encoder.layer": BERT_BLOCK}),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"vocab_size": 24, "dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 4},
        {
            "distilbert.transformer.layer": {
                *("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin"),
                *("ffn.lin1", "ffn.lin2"),
            }
        },
    ),
    "deberta-v2": (
        "DebertaV2ForSequenceClassification",
        {
            **SIZES,
            "relative_attention": True,
            "position_buckets": 4,
            "pos_att_type": ["p2c", "c2p"],
            "conv_kernel_size": 3,
        },
        {
            "deberta.encoder.layer": {
                *("attention.self.query_proj", "attention.self.key_proj"),
                *("attention.self.value_proj", "attention.self.pos_key_proj"),
                *("attention.self.pos_query_proj", "attention.output.dense"),
                *("intermediate.dense", "output.dense"),
            }
        },
    ),
    "bart": (
        "BartForSequenceClassification",
        {
            "vocab_size": 24,
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
        },
        {
            f"model.{stack}.layers": {
                f"{attention}.{side}_proj"
                for attention in attentions
                for side in ("q", "k", "v", "out")
            }
            | OPT_MLP
            for stack, attentions in (
                ("encoder", ["self_attn"]),
                ("decoder", ["self_attn", "encoder_attn"]),
            )
        },
    ),
    "t5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 24, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4},
        {
            "encoder.block": {
                *(f"layer.0.SelfAttention.{side}" for side in "qkvo"),
                *("layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wo"),
            },
            "decoder.block": {
                *(f"layer.0.SelfAttention.{side}" for side in "qkvo"),
                *(f"layer.1.EncDecAttention.{side}" for side in "qkvo"),
                *("layer.2.DenseReluDense.wi", "layer.2.DenseReluDense.wo"),
            },
        },
    ),
    "vit": (
        "ViTForImageClassification",
        {**SIZES, "image_size": 8, "patch_size": 4},
        {
            "vit.encoder.layer": {
                *(f"attention.attention.{side}" for side in ("query", "key", "value")),
                *("attention.output.dense", "intermediate.dense", "output.dense"),
            }
        },
    ),
    "mixtral": (
        "MixtralForCausalLM",
        {**MOE, "num_local_experts": 2},
        {"model.layers": {name for name in LLAMA_BLOCK if name.startswith("self_attn")}},
    ),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        {
            **MOE,
            "num_experts": 2,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 8,
        },
        {
            "model.layers": {
                name.replace("mlp.", "mlp.shared_expert.") for name in sorted(LLAMA_BLOCK)
            }
        },
    ),
}

# (family, a tensor that is passed through, the reason)
KEPT = [
    ("llama", "model.embed_tokens.weight", "embedding"),
    ("llama", "model.norm.weight", "1-dimensional"),
    ("llama", "lm_head.weight", "head"),
    ("qwen2", "model.layers.0.self_attn.q_proj.bias", "not a weight"),
    ("opt", "model.decoder.embed_positions.weight", "embedding"),
    ("opt", "model.decoder.project_in.weight", "outside the repeated blocks"),
    ("gpt_neox", "gpt_neox.embed_in.weight", "embedding"),
    ("gpt_neox", "embed_out.weight", "head"),
    ("falcon", "transformer.word_embeddings.weight", "embedding"),
    ("bert", "bert.embeddings.token_type_embeddings.weight", "embedding"),
    ("bert", "bert.pooler.dense.weight", "head"),
    ("bert", "classifier.weight", "head"),
    ("roberta", "lm_head.dense.weight", "head"),
    ("distilbert", "pre_classifier.weight", "outside the repeated blocks"),
    ("deberta-v2", "deberta.encoder.rel_embeddings.weight", "embedding"),
    ("deberta-v2", "deberta.encoder.conv.conv.weight", "3-dimensional"),
    ("bart", "model.shared.weight", "embedding"),
    ("bart", "model.decoder.embed_positions.weight", "embedding"),
    ("bart", "classification_head.dense.weight", "head"),
    (
        "t5",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "embedding",
    ),
    ("vit", "vit.embeddings.position_embeddings", "not a weight"),
    ("vit", "vit.embeddings.patch_embeddings.projection.weight", "4-dimensional"),
    ("mixtral", "model.layers.0.block_sparse_moe.gate.weight", "router"),
    (
        "mixtral",
        "model.layers.1.block_sparse_moe.experts.0.w1.weight",
        "expert: consumers fuse these in memory",
    ),
    ("qwen2_moe", "model.layers.0.mlp.gate.weight", "router"),
    ("qwen2_moe", "model.layers.0.mlp.shared_expert_gate.weight", "router"),
]
