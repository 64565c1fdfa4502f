"""``python -m tests.benchmarks.fitting``: what `loftq plan` says that fine-tuning takes, against
what was counted while models were trained a step. Writes docs/results/training-memory.md."""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import loftq_cli
from tests.support import models
from tests.support.counted import Counted, counted

PAGE = Path(__file__).parents[2] / "docs/results/training-memory.md"
MOST = 0.1
_CAUSAL = {"vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1024}
_CAUSAL |= {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64}
_CAUSAL |= {"num_hidden_layers": 8, "max_position_embeddings": 2048, "pad_token_id": 0}


_LLAMA = ("Llama, random, 8 blocks", "Llama")
# (title, what to make, (layout, bits, rank, batch, length, dtype)).
_MADE: tuple[tuple[str, str, tuple[str, int, int, int, int, str]], ...] = (
    ("Qwen3, random, 8 blocks", "Qwen3", ("loftq", 3, 64, 1, 256, "bfloat16")),
    ("Qwen3-MoE, random, 6 blocks of 8", "Qwen3Moe", ("loftq", 4, 8, 1, 256, "bfloat16")),
    ("T5, random, 6 + 6 blocks", "T5", ("loftq", 4, 16, 1, 128, "bfloat16")),
    ("DeBERTa v2, random, 6 blocks", "DebertaV2", ("loftq", 4, 16, 2, 128, "float32")),
    ("Gemma 2, random, 8 blocks", "Gemma2", ("loftq", 4, 16, 1, 256, "bfloat16")),
    ("BART, random, 6 + 6 blocks", "Bart", ("loftq", 4, 16, 2, 128, "bfloat16")),
    (*_LLAMA, ("loftq", 2, 16, 2, 256, "bfloat16")),
    (*_LLAMA, ("bnb", 4, 16, 2, 256, "bfloat16")),
    (*_LLAMA, ("gptq", 4, 16, 2, 256, "bfloat16")),
    (*_LLAMA, ("compressed", 4, 16, 2, 256, "bfloat16")),
    (*_LLAMA, ("dense", 2, 16, 2, 256, "bfloat16")),
)


@dataclass(frozen=True)
class Case:
    """A model, how it is stored, and how it is trained."""

    title: str
    source: Path
    layout: str
    bits: int
    rank: int
    batch: int
    length: int
    dtype: str


def main() -> None:
    """Measure each case in both ways, and write the page."""
    logging.disable()
    rows, wrong = [], []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(Path(folder), sys.argv[1:]):
            for checkpointing in (False, True):
                said, found = compared(case, checkpointing, Path(folder))
                off = said["total"] / found.total - 1
                rows.append(_row(case, checkpointing, said, found, off))
                print(rows[-1], flush=True)
                wrong += [rows[-1]] if abs(off) > MOST else []
    if not sys.argv[1:]:
        PAGE.write_text(_page(rows), "utf-8")
    if wrong:
        raise SystemExit("\n".join(["off by more than a tenth:", *wrong]))


def cases(folder: Path, words: list[str]) -> Iterator[Case]:
    """What is measured; ``words``: parts of titles, none: all."""
    if not words or any(word in "MiniLM" for word in words):
        yield Case("MiniLM, real, 6 blocks", models.minilm(), "loftq", 2, 16, 4, 128, "float32")
    for title, kind, asked in _MADE:
        if not words or any(word in title for word in words):
            source = folder / kind
            if not source.exists():
                model(kind).to(torch.bfloat16).save_pretrained(source)
            yield Case(title, source, *asked)


def model(kind: str) -> Any:
    """A model of its family's own config, with random weights."""
    own = {
        "Qwen3Moe": {"num_hidden_layers": 6, "num_experts": 8, "num_experts_per_tok": 2}
        | {"moe_intermediate_size": 256},
        "Gemma2": {"num_key_value_heads": 6, "sliding_window": 128},
    }
    torch.manual_seed(0)
    if kind == "T5":
        config = transformers.T5Config(
            vocab_size=8192,
            d_model=384,
            d_kv=64,
            d_ff=1024,
            num_layers=6,
            num_heads=6,
            decoder_start_token_id=0,
            feed_forward_proj="gated-gelu",
        )
        return transformers.T5ForConditionalGeneration(config)
    if kind == "Bart":
        config = transformers.BartConfig(
            vocab_size=8192,
            d_model=384,
            encoder_ffn_dim=1536,
            decoder_ffn_dim=1536,
            encoder_layers=6,
            decoder_layers=6,
            encoder_attention_heads=6,
            decoder_attention_heads=6,
            max_position_embeddings=512,
        )
        return transformers.BartForConditionalGeneration(config)
    if kind == "DebertaV2":
        config = transformers.DebertaV2Config(
            vocab_size=8192,
            hidden_size=384,
            intermediate_size=1536,
            num_hidden_layers=6,
            num_attention_heads=6,
            max_position_embeddings=512,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=64,
            share_att_key=True,
            norm_rel_ebd="layer_norm",
            type_vocab_size=0,
        )
        return transformers.DebertaV2ForMaskedLM(config)
    config = getattr(transformers, f"{kind}Config")(**_CAUSAL | own.get(kind, {}))
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def compared(case: Case, checkpointing: bool, folder: Path) -> tuple[dict[str, Any], Counted]:
    """What is said of ``case``, in bytes, and what was counted."""
    out = folder / f"{case.source.name}-{case.layout}-{case.bits}"
    asked: dict[str, Any] = {"bits": case.bits, "rank": case.rank, "layout": case.layout}
    if not out.exists():
        loftq_cli.convert(case.source, out, **asked, iters=1, scale="absmax", threads=1)
    asked |= {"length": case.length, "batch": case.batch, "dtype": case.dtype}
    (row,) = loftq_cli.what_fits(case.source, **asked)["rows"]
    way = "checkpointed_" if checkpointing else ""
    said = {
        "weights": row["weights_bytes"],
        "adapter": row["adapter_bytes"],
        "optimizer": row["optimizer_bytes"],
        "step": row[f"{way}activations_bytes"] + row["gradients_bytes"],
        "total": row[f"{way}train_bytes"],
    }
    found = counted(out, case.batch, case.length, checkpointing=checkpointing, dtype=case.dtype)
    return said, found


def _row(case: Case, checkpointing: bool, said: dict[str, Any], found: Counted, off: float) -> str:
    pairs = [
        f"{said[name] / 2**20:.1f} / {getattr(found, name) / 2**20:.1f}"
        for name in ("weights", "adapter", "optimizer", "step", "total")
    ]
    cells = [
        case.title,
        f"{case.layout}, {case.bits} bits, rank {case.rank}",
        f"{case.batch} x {case.length}, {case.dtype}",
        "yes" if checkpointing else "no",
        *pairs,
        f"{found.saved / 2**20:.1f}",
        f"{off:+.1%}",
    ]
    return f"| {' | '.join(cells)} |"


def _page(rows: list[str]) -> str:
    head = (
        "| model | stored | trained with | checkpointing | weights | adapter | optimizer | step | "
        "total | saved | off |"
    )
    return "\n".join([_TEXT, head, "|" + " --- |" * 11, *rows, ""])


_TEXT = f"""# What fine-tuning takes: said and counted

`make memory-check` writes this page. Each model was converted, loaded with `loftq_cli.load` and
trained two steps with AdamW on a CPU. What `loftq plan` says of it from headers stands before the
stroke, what was counted in the second step after it, in MiB (2²⁰ bytes).

- **Counted**: weights, adapter and optimizer are the bytes of their tensors. A step is the most
  that torch's allocator had given out beyond them, as torch's profiler recorded it: activations,
  gradients, the loss, decoded weights, and what kernels asked the allocator for. **saved** is what
  autograd kept of the forward, by `saved_tensors_hooks`.
- **Said**: the step is that of the classes of transformers and PEFT on tensors that have shapes and
  no memory: of a few blocks of each kind, and the others added.
- 16 bits are trained with autocast. The loss is the model's own; of models without a head, a mean
  of hidden states.
- The totals may be a tenth apart; if they are more, the command fails.
- **Not measured**: a GPU. Its kernels save other things in places (fused attention and optimizers),
  its allocator rounds and fragments, and CUDA itself takes some hundred MiB. Leave a tenth of the
  card free.
- Versions: torch {torch.__version__}, transformers {transformers.__version__}.
"""


if __name__ == "__main__":
    main()
