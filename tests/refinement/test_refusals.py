"""What is not refined: one line, and nothing is written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import loftq_cli
from loftq_cli.errors import (
    EnvironmentFailure,
    InputError,
    SourceChangedError,
    UnsupportedInputError,
    UsageError,
)
from loftq_cli.refinement import cost, room
from tests.support import models
from tests.support.refined import ASKED, SETTINGS, refine

QUERY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def test_what_is_refused(place: Path, tmp_path: Path) -> None:
    start = "llama-out"
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"samples": 1}, "--samples 1: must be a whole number from 2"),
        ({"epochs": 0, "end_to_end": 0}, "leave nothing to do"),
        ({"end_to_end": -1}, "--end-to-end -1"),
        ({"length": 900}, "takes 64 tokens at most"),
    )
    for options, said in cases:
        with pytest.raises(UsageError, match=said):
            refine(place, start, "refused", **options)
    with pytest.raises(InputError, match=r"short: \d+ tokens are needed, and it has \d+"):
        refine(place, start, "refused", samples=500)
    (tmp_path / "short.txt").write_text("Once. " * 5)
    with pytest.raises(InputError, match="1 window of 20 tokens, 2 are needed"):
        loftq_cli.refine(
            place / start, place / "refused", source=place / "llama",
            text=tmp_path / "short.txt", length=20, device="cpu",
        )  # fmt: skip
    with pytest.raises(InputError, match="no such tensor, the conversion"):
        refine(place, start, "refused", kind="bert")
    with pytest.raises(UsageError, match=r"is the input|inside the input"):
        refine(place, start, "llama-out/inside")
    shutil.copytree(place / "llama", tmp_path / "other")
    file = tmp_path / "other/model.safetensors"
    save_file({name: t * 1.01 for name, t in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(SourceChangedError, match="not the file that was converted"):
        loftq_cli.refine(
            place / start, place / "refused", source=tmp_path / "other",
            text=place / "text.txt", **ASKED,
        )  # fmt: skip
    assert not list(place.glob("*refused*"))
    assert not list(place.glob(".refused*"))


def test_other_adapters_are_refused(place: Path, tmp_path: Path) -> None:
    adapter = place / "llama-out/loftq_init"
    for name, change, said in (
        ("full", {"base_model.model.model.norm.weight": torch.ones(64)}, "was trained too"),
        ("less", None, "no pair of rank 4 for"),
        ("diverged", {QUERY: torch.full((4, 64), torch.nan)}, "q_proj.lora_A.* holds nan at"),
    ):
        shutil.copytree(adapter, tmp_path / name)
        file = tmp_path / name / "adapter_model.safetensors"
        held = load_file(file)
        if change is None:
            held = {key: t for key, t in held.items() if "layers.1" not in key}
        save_file(held | (change or {}), file)
        with pytest.raises(InputError, match=said):
            refine(place, "llama-out", "refused", adapter=tmp_path / name)


def test_a_conversion_without_a_start_is_refused(place: Path) -> None:
    adapter = place / "llama-out/loftq_init"
    loftq_cli.export(
        place / "llama-out", place / "no-start", layout="loftq", merge=True, adapter=adapter
    )
    with pytest.raises(UnsupportedInputError, match="it has no start"):
        refine(place, "no-start", "refused")


def test_too_little_memory_and_disk_are_told_before_anything_is_written(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "_OF_BLOCK", 1 << 40)
    monkeypatch.setattr(cost, "_OF_WHOLE", 1 << 40)
    with pytest.raises(EnvironmentFailure, match=r"the largest block: .* of memory needed"):
        refine(place, "llama-out", "refused")
    with pytest.raises(EnvironmentFailure, match=r"the whole model, end to end: .* needed"):
        refine(place, "llama-out", "refused", end_to_end=1)
    monkeypatch.undo()
    monkeypatch.setattr(room, "_MARGIN", 1 << 60)
    with pytest.raises(EnvironmentFailure, match=r"needed, .* free"):
        refine(place, "llama-out", "refused")
    assert not list(place.glob(".refused*"))


def test_blocks_that_do_not_run_in_turn_are_refined_end_to_end_only(place: Path) -> None:
    """ALBERT calls one block several times."""
    config = transformers.AlbertConfig(
        vocab_size=96, embedding_size=32, hidden_size=64, num_hidden_layers=3,
        num_attention_heads=4, intermediate_size=128, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    models.save_tokenizer(models.save(transformers.AlbertModel(config), place / "albert"))
    loftq_cli.convert(place / "albert", place / "albert-out", layout="loftq", **SETTINGS)
    with pytest.raises(UnsupportedInputError, match="do not run in turn"):
        refine(place, "albert-out", "refused", "albert", epochs=1, end_to_end=0)
    assert not list(place.glob("*refused*"))
    told = refine(place, "albert-out", "albert-refined", "albert", epochs=1, end_to_end=10)
    assert told["blocks"] == []
    assert told["end_to_end"]["held_after"] < 0.95 * told["end_to_end"]["held_before"]
