"""The adapter's files, read by PEFT itself."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from loftq_cli.checkpoint.header import TensorSpec
from loftq_cli.checkpoint.writer import spec_of
from loftq_cli.families.tasks import task_type
from loftq_cli.layouts import adapter
from loftq_cli.layouts.base import Matrix


class Model(nn.Module):
    """Two blocks of a wide and a narrow layer, and a head that is left alone."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList(
            nn.ModuleDict({"wide": nn.Linear(12, 10), "narrow": nn.Linear(10, 3)}) for _ in range(2)
        )
        self.head = nn.Linear(3, 2)


RANKS = {"h.0.wide": 8, "h.0.narrow": 3, "h.1.wide": 8, "h.1.narrow": 3}
SHAPES = {name: (10, 12) if "wide" in name else (3, 10) for name in RANKS}


def matrix(name: str) -> Matrix:
    return Matrix(f"{name}.weight", SHAPES[name], "F32", "nf", 4, 64)


def drawn_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, rank in RANKS.items():
        rows, columns = SHAPES[name]
        lora_A = torch.randn(rank, columns, generator=generator)
        lora_B = torch.randn(rows, rank, generator=generator)
        tensors |= adapter.tensors(matrix(name), lora_A, lora_B)
    return tensors


def test_specs_foretell_the_tensors():
    expected = [spec_of(name, tensor) for name, tensor in drawn_tensors().items()]
    actual: list[TensorSpec] = []
    for name, rank in RANKS.items():
        actual += adapter.specs(matrix(name), rank, "F32")
    assert actual == expected


@pytest.mark.parametrize(
    ("alpha", "scalings"), [(None, (1.0, 1.0)), (16.0, (2.0, 16 / 3)), (2.0, (0.25, 2 / 3))]
)
def test_peft_attaches_it_with_the_ranks_and_scalings_meant(tmp_path, alpha, scalings):
    tensors = drawn_tensors()
    save_file(tensors, tmp_path / adapter.WEIGHTS)
    config = adapter.config(RANKS, 8, alpha, None)
    (tmp_path / adapter.CONFIG).write_text(json.dumps(config))
    model = peft.PeftModel.from_pretrained(Model(), tmp_path, is_trainable=True)
    loaded = peft.get_peft_model_state_dict(model)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    for name, rank in RANKS.items():
        layer = model.get_submodule(f"base_model.model.{name}")
        assert layer.r["default"] == rank
        assert layer.scaling["default"] == pytest.approx(scalings["narrow" in name], rel=1e-12)
    assert type(model.get_submodule("base_model.model.head")) is nn.Linear


def test_peft_knows_every_field(tmp_path):
    config = adapter.config(RANKS, 8, None, "CAUSAL_LM")
    (tmp_path / adapter.CONFIG).write_text(json.dumps(config))
    read = peft.LoraConfig.from_pretrained(tmp_path).to_dict()
    assert set(config) <= set(read)
    assert read["r"] == read["lora_alpha"] == 8
    assert read["init_lora_weights"] is True
    assert set(read["target_modules"]) == set(RANKS)
    patterns = {r"h\.0\.narrow": 3, r"h\.1\.narrow": 3}
    assert read["rank_pattern"] == read["alpha_pattern"] == patterns


def test_patterns_are_empty_where_no_rank_was_clamped():
    config = adapter.config({"a": 4, "b": 4}, 4, None, None)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})


def test_an_alpha_of_the_users_is_one_for_all():
    config = adapter.config(RANKS, 8, 32.0, None)
    assert config["lora_alpha"] == 32.0
    assert config["alpha_pattern"] == {}
    assert set(config["rank_pattern"].values()) == {3}


@pytest.mark.parametrize(
    ("architectures", "expected"),
    [
        (["LlamaForCausalLM"], "CAUSAL_LM"),
        (["GPT2LMHeadModel"], "CAUSAL_LM"),
        (["BartForConditionalGeneration"], "SEQ_2_SEQ_LM"),
        (["BertModel"], "FEATURE_EXTRACTION"),
        (["BertForSequenceClassification"], None),
        (["BertForMaskedLM"], None),
        (["BertModel", "LlamaForCausalLM"], "FEATURE_EXTRACTION"),
        ([], None),
    ],
)
def test_task_types_are_pefts(architectures, expected):
    actual = task_type(architectures)
    assert actual == expected
    assert actual is None or actual in set(peft.TaskType)
