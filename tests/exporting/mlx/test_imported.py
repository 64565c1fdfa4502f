"""``import-adapter``: what mlx-lm saves, back as PEFT stores it, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loftq_cli
from loftq_cli.errors import (
    CorruptFileError,
    InputError,
    LoftqError,
    OutputConflictError,
    SourceNotFoundError,
    UnsupportedInputError,
)
from tests.exporting.mlx.test_export import converted, pairs
from tests.exporting.test_export import products
from tests.support import checkpoints
from tests.support.contents import stored
from tests.support.exported import decoded


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion ``out`` and its export ``mlx``."""
    where = tmp_path_factory.mktemp("place")
    source = checkpoints.write(where / "model", checkpoints.llama(layers=2))
    loftq_cli.export(converted(source, where, rank=48), where / "mlx", layout="mlx")
    return where


def saved(
    place: Path,
    to: Path,
    change: Mapping[str, Any] = MappingProxyType({}),
    tensors: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """What mlx_lm.lora could have saved: other values, its own arguments in the config."""
    to.mkdir()
    held = {
        name: tensor + 0.01
        for name, tensor in load_file(place / "mlx/adapters/adapters.safetensors").items()
    }
    held |= tensors
    save_file(
        {name: tensor for name, tensor in held.items() if tensor is not None},
        to / "adapters.safetensors",
    )
    config = json.loads((place / "mlx/adapters/adapter_config.json").read_text())
    lora = {**config["lora_parameters"], **change.get("lora", {})}
    told = {**config, "model": "mlx", "iters": 10, "lora_parameters": lora, **change}
    (to / "adapter_config.json").write_text(json.dumps(told))
    return to


def test_the_start_comes_back_as_it_was(place, tmp_path) -> None:
    result = loftq_cli.import_adapter(
        place / "out", tmp_path / "back", adapter=place / "mlx/adapters"
    )
    assert (result["matrices"], result["rank"], result["scale"]) == (14, 48, 1.0)
    ours, theirs = products(tmp_path / "back"), products(place / "out/loftq_init")
    assert ours.keys() == theirs.keys()
    for module, product in theirs.items():
        torch.testing.assert_close(ours[module], product, rtol=1e-5, atol=1e-6)
    config = json.loads((tmp_path / "back/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((place / "out").resolve())
    assert config["task_type"] == "CAUSAL_LM"


def test_what_was_trained_merges_with_mlx_s_own_scale(place, tmp_path) -> None:
    adapter = saved(place, tmp_path / "adapters", {"lora": {"scale": 2.5}})
    loftq_cli.import_adapter(place / "out", tmp_path / "back", adapter=adapter)
    loftq_cli.merge(place / "out", tmp_path / "merged", adapter=tmp_path / "back")
    found = stored(tmp_path / "merged")
    q, deltas = decoded(place / "out"), pairs(adapter)
    assert len(deltas) == 14
    for module, delta in deltas.items():
        expected = q[f"{module}.weight"] + delta
        torch.testing.assert_close(found[f"{module}.weight"], expected, rtol=1e-5, atol=1e-5)


def test_modules_have_their_names_in_memory_and_embeddings_are_such(tmp_path) -> None:
    """Here lm_head is trained by mlx-lm too, and the embedding is quantized."""
    source = checkpoints.write(tmp_path / "model", checkpoints.llama())
    out = converted(source, tmp_path, layout="loftq", scale_dtype="bfloat16", embeddings=True)
    loftq_cli.export(out, tmp_path / "mlx", layout="mlx")
    head = {"lm_head.lora_a": torch.ones(64, 4), "lm_head.lora_b": torch.ones(4, 24)}
    adapter = saved(tmp_path, tmp_path / "adapters", tensors=head)
    loftq_cli.import_adapter(out, tmp_path / "back", adapter=adapter)
    held = load_file(tmp_path / "back/adapter_model.safetensors")
    theirs = load_file(adapter / "adapters.safetensors")
    for module, pattern in (
        ("model.embed_tokens", "lora_embedding_{}"),
        ("lm_head", "lora_{}.weight"),
    ):
        for side in "AB":
            ours = held[f"base_model.model.{module}.{pattern.format(side)}"]
            assert torch.equal(ours, theirs[f"{module}.lora_{side.lower()}"].T)
    loftq_cli.merge(out, tmp_path / "merged", adapter=tmp_path / "back")
    merged = stored(tmp_path / "merged")["model.embed_tokens.weight"]
    loftq_cli.merge(out, tmp_path / "start")
    start = stored(tmp_path / "start")["model.embed_tokens.weight"]
    init = load_file(out / "loftq_init/adapter_model.safetensors")
    prefix = "base_model.model.model.embed_tokens.lora_embedding_"
    before = (init[f"{prefix}B"] @ init[f"{prefix}A"]).T
    assert torch.allclose(
        merged - start, pairs(adapter)["model.embed_tokens"].T - before, atol=1e-5
    )


first = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "tensors", "error", "said"),
    [
        ({"fine_tune_type": "dora"}, {}, UnsupportedInputError, "fine_tune_type is 'dora'"),
        ({"fine_tune_type": "full"}, {}, UnsupportedInputError, "only lora can be taken over"),
        ({"lora": {"scale": "a"}}, {}, CorruptFileError, "scale 'a'"),
        ({"lora": {"scale": float("inf")}}, {}, CorruptFileError, "scale inf"),
        ({"lora": {"rank": 0}}, {}, CorruptFileError, "rank 0"),
        ({"lora_parameters": None}, {}, CorruptFileError, "scale None"),
        ({"lora": {"rank": 8}}, {}, CorruptFileError, "says rank 8"),
        ({}, {f"{first}.m": torch.ones(4)}, UnsupportedInputError, "is DoRA"),
        ({}, {f"{first}.lora_a": torch.ones(2, 3, 4)}, UnsupportedInputError, "of the experts"),
        ({}, {f"{first}.lora_b": None}, CorruptFileError, "lora_b' missing"),
        ({}, {f"{first}.weight": torch.ones(2)}, InputError, "is no part of a pair"),
        (
            {},
            {"model.x.lora_a": torch.ones(4, 48), "model.x.lora_b": torch.ones(48, 4)},
            InputError,
            "has no such tensor",
        ),
        (
            {},
            {f"{first}.lora_a": torch.ones(65, 48)},
            InputError,
            r"for a '.*up_proj\.weight' of \[128, 65\]; .* has \[128, 64\]",
        ),
    ],
)
def test_what_is_no_adapter_of_this_conversion_is_refused(
    place, tmp_path, change, tensors, error, said
) -> None:
    adapter = saved(place, tmp_path / "adapters", change, tensors)
    with pytest.raises(error, match=said):
        loftq_cli.import_adapter(place / "out", tmp_path / "back", adapter=adapter)
    assert not (tmp_path / "back").exists()


def test_places_that_are_empty_or_taken(place, tmp_path) -> None:
    with pytest.raises(SourceNotFoundError, match=r"adapters\.safetensors: no such file"):
        loftq_cli.import_adapter(place / "out", tmp_path / "back", adapter=place / "out")
    adapter = saved(place, tmp_path / "adapters")
    loftq_cli.import_adapter(place / "out", tmp_path / "back", adapter=adapter)
    with pytest.raises(OutputConflictError, match="holds an adapter"):
        loftq_cli.import_adapter(place / "out", tmp_path / "back", adapter=adapter)
    loftq_cli.import_adapter(place / "out", tmp_path / "back", adapter=adapter, overwrite=True)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(SourceNotFoundError, match=r"adapter_config\.json: missing"):
        loftq_cli.import_adapter(place / "out", tmp_path / "again", adapter=adapter)
    (adapter / "adapters.safetensors").write_bytes(b"nothing")
    (adapter / "adapter_config.json").write_text('{"lora_parameters": {"rank": 4, "scale": 1}}')
    with pytest.raises(CorruptFileError, match=r"adapters\.safetensors: "):
        loftq_cli.import_adapter(place / "out", tmp_path / "again", adapter=adapter)


def test_a_command_that_wants_peft_s_form_says_how_to_get_it(place, tmp_path) -> None:
    adapter = saved(place, tmp_path / "adapters")
    with pytest.raises(LoftqError, match="saved by mlx-lm") as found:
        loftq_cli.merge(place / "out", tmp_path / "merged", adapter=adapter)
    assert "loftq import-adapter" in (found.value.hint or "")
