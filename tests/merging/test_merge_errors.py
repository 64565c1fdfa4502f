"""Merges that are refused: which adapter, which tensor, which output; and nothing is left."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loftq_cli
from loftq_cli.errors import (
    CorruptFileError,
    EnvironmentFailure,
    InputError,
    LoftqError,
    NonFiniteWeightError,
    OutputConflictError,
    SourceNotFoundError,
    UnsupportedInputError,
    UsageError,
    VerificationError,
)
from loftq_cli.machine.observer import Observer
from loftq_cli.merging import merge as merging
from loftq_cli.merging.merge import MARKER, merge
from tests.support import checkpoints
from tests.support.contents import FAST

PREFIX = "base_model.model."
LAYER = "model.layers.0"
QUERY = f"{PREFIX}{LAYER}.self_attn.q_proj"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def _made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("made")
    model = checkpoints.write(directory / "model", checkpoints.llama(), cuts=(5,))
    loftq_cli.convert(model, directory / "out", bits=2, layout="loftq", **FAST)
    return directory / "out"


@pytest.fixture
def out(_made: Path, tmp_path: Path) -> Path:
    """A conversion, to be spoiled."""
    return Path(shutil.copytree(_made, tmp_path / "out"))


@pytest.fixture
def adapter(out: Path, tmp_path: Path) -> Path:
    """A copy of its adapter, to be spoiled."""
    return Path(shutil.copytree(out / "loftq_init", tmp_path / "adapter"))


def refused(
    kind: type[LoftqError], message: str, out: Path, target: str = "merged", **options: Any
) -> LoftqError:
    """Merging raises exactly ``kind`` and changes nothing on disk."""
    before = checkpoints.files(out.parent)
    with pytest.raises(kind, match=message) as caught:
        merge(out, out.parent / target, observer=Observer(), **options)
    assert type(caught.value) is kind
    assert checkpoints.files(out.parent) == before
    return caught.value


def alter(adapter: Path, change: Callable[[Tensors], object]) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def configure(adapter: Path, **settings: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"peft_type": "LOHA"}, UnsupportedInputError, "peft_type is 'LOHA'"),
        ({"use_dora": True}, UnsupportedInputError, "use_dora is True"),
        ({"lora_bias": True}, UnsupportedInputError, "lora_bias is True"),
        ({"trainable_token_indices": [1]}, CorruptFileError, "holds no such tokens"),
        ({"trainable_token_indices": [-1]}, CorruptFileError, r"\[-1\] is not a list of tokens"),
        ({"trainable_token_indices": {"a": 1}}, CorruptFileError, "is not a list of tokens"),
        ({"layer_replication": [[0, 1]]}, UnsupportedInputError, "layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, UnsupportedInputError, "init_lora_weights"),
        ({"init_lora_weights": "loftq"}, UnsupportedInputError, "init_lora_weights"),
        ({"r": None}, CorruptFileError, "r is None"),
        ({"r": "8"}, CorruptFileError, "r is '8'"),
        ({"lora_alpha": math.nan}, CorruptFileError, "lora_alpha nan"),
        ({"rank_pattern": {"q_proj": "8"}}, CorruptFileError, "rank_pattern"),
        ({"rank_pattern": [8]}, CorruptFileError, "rank_pattern"),
        ({"alpha_pattern": {"(": 8}}, CorruptFileError, r"alpha_pattern: '\(' is not a pattern"),
        ({"target_modules": "("}, CorruptFileError, "target_modules"),
        ({"r": 5}, CorruptFileError, r"lora_A.weight' is of rank 4, adapter_config.json says 5"),
        ({"rank_pattern": {"q_proj": 5}}, CorruptFileError, "q_proj.lora_A.weight' is of rank 4"),
    ],
)
def test_configs_that_cannot_be_merged(
    settings: dict[str, Any], kind: type[LoftqError], message: str, out: Path, adapter: Path
) -> None:
    configure(adapter, **settings)
    error = refused(kind, message, out, adapter=adapter)
    assert str(adapter) in error.message


def pop(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def put(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: torch.ones(*shape, dtype=dtype)})


def only(part: str) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if part not in name]:
            del tensors[name]

    return change


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (pop(f"{QUERY}.lora_A.weight"), CorruptFileError, f"'{QUERY}.lora_A.weight' missing"),
        (pop(f"{QUERY}.lora_B.weight"), CorruptFileError, f"'{QUERY}.lora_B.weight' missing"),
        (only("mlp"), InputError, r"self_attn.k_proj.lora_A.weight' and 3 more missing"),
        (lambda tensors: tensors.clear(), InputError, "no LoRA tensors"),
        (put(f"{QUERY}.lora_A.weight", 4, 32), InputError, r"is \[64, 64\], .* \[64, 32\]"),
        (put(f"{QUERY}.lora_B.weight", 32, 4), InputError, r"\[32, 64\]"),
        (put(f"{QUERY}.lora_A.weight", 8, 64), CorruptFileError, "is of rank 8, .* says 4"),
        (put(f"{QUERY}.lora_A.weight", 4, 64, 1), UnsupportedInputError, "not a floating-point"),
        (
            put(f"{QUERY}.lora_A.weight", 4, 64, dtype=torch.int32),
            UnsupportedInputError,
            "is I32",
        ),
        (put("lora_A.weight", 4, 64), InputError, "'lora_A.weight': the name does not begin"),
        (put(f"{QUERY}.lora_A.default.weight", 4, 64), InputError, "no place for .*default"),
        (put(f"{QUERY}.lora_magnitude_vector", 64), UnsupportedInputError, "DoRA"),
        (
            put(f"{PREFIX}model.embed_tokens.lora_embedding_A", 4, 24),
            CorruptFileError,
            "embed_tokens.lora_embedding_B' missing",
        ),
        (put(f"{PREFIX}score.weight", 3, 64), InputError, "no place for '.*score.weight'"),
        (put(f"{PREFIX}lm_head.weight", 24, 32), InputError, r"is \[24, 32\], 'lm_head.weight'"),
        (put(f"{PREFIX}lm_head.weight", 25, 64), InputError, "24 rows and 'lm_head.weight' 25"),
        (put(f"{PREFIX}{LAYER}.self_attn.q_proj.bias", 64), InputError, "no place for .*bias"),
        (put(f"{QUERY}.weight", 64, 64), InputError, "a whole tensor and a pair"),
    ],
)
def test_tensors_that_have_no_place(
    change: Callable[[Tensors], object],
    kind: type[LoftqError],
    message: str,
    out: Path,
    adapter: Path,
) -> None:
    alter(adapter, change)
    error = refused(kind, message, out, adapter=adapter)
    assert "adapter_model.safetensors" in error.message


def test_every_tensor_that_has_no_place_is_counted(out: Path, adapter: Path) -> None:
    def change(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[name.replace("layers.0", "layers.7")] = tensors[name].clone()

    alter(adapter, change)
    assert "and 9 more" in refused(InputError, "no place", out, adapter=adapter).message


def test_an_adapter_of_another_model(out: Path, tmp_path: Path) -> None:
    model = checkpoints.write(tmp_path / "bert", checkpoints.bert(), checkpoints.BERT)
    loftq_cli.convert(model, tmp_path / "other", **FAST)
    start = tmp_path / "other/loftq_init"
    refused(InputError, "the start of .*another conversion than", out, adapter=start)
    refused(InputError, "no place for", out, adapter=start.rename(tmp_path / "alone"))


def test_an_adapter_that_names_another_conversion(out: Path, adapter: Path, tmp_path: Path) -> None:
    loftq_cli.convert(
        checkpoints.write(tmp_path / "model", checkpoints.llama()), tmp_path / "other", **FAST
    )
    configure(adapter, base_model_name_or_path=str(tmp_path / "other"))
    refused(InputError, "another conversion than", out, adapter=adapter)
    for number, base in enumerate((str(out), "no/such/place", "", None)):
        configure(adapter, base_model_name_or_path=base)
        merge(out, tmp_path / str(number), adapter=adapter, observer=Observer())


def test_a_module_that_could_be_two(out: Path, adapter: Path, tmp_path: Path) -> None:
    model = {f"{side}.{name}": t for side in "ab" for name, t in checkpoints.llama().items()}
    loftq_cli.convert(checkpoints.write(tmp_path / "two", model), tmp_path / "both", **FAST)
    error = refused(InputError, "more than one module", tmp_path / "both", adapter=adapter)
    assert QUERY in error.message or ".lora_A.weight" in error.message


def test_adapters_that_are_not_there(out: Path, adapter: Path, tmp_path: Path) -> None:
    refused(SourceNotFoundError, "none: no such file", out, adapter=tmp_path / "none")
    (adapter / "adapter_config.json").unlink()
    refused(SourceNotFoundError, r"adapter_config\.json: missing", out, adapter=adapter)
    weights = adapter / "adapter_model.safetensors"
    weights.rename(adapter / "adapter_model.bin")
    refused(UnsupportedInputError, "pickled", out, adapter=adapter)
    (adapter / "adapter_model.bin").unlink()
    refused(SourceNotFoundError, r"adapter_model\.safetensors: no such file", out, adapter=adapter)


def test_adapters_that_are_broken(out: Path, adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    refused(
        CorruptFileError, r"adapter_model\.safetensors: the file is cut short", out, adapter=adapter
    )
    (adapter / "adapter_config.json").write_text("{")
    refused(CorruptFileError, r"adapter_config\.json: not valid JSON", out, adapter=adapter)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_no_numbers(value: float, out: Path, adapter: Path) -> None:
    alter(adapter, lambda tensors: tensors[f"{QUERY}.lora_B.weight"].fill_(value))
    refused(
        NonFiniteWeightError, f"'{LAYER}.self_attn.q_proj.weight' becomes", out, adapter=adapter
    )


def test_values_that_do_not_fit_the_dtype(out: Path, adapter: Path, tmp_path: Path) -> None:
    alter(adapter, lambda tensors: tensors[f"{QUERY}.lora_B.weight"].mul_(1e8))
    error = refused(
        UsageError, "q_proj.weight': .* does not fit float16", out, adapter=adapter, dtype="float16"
    )
    assert "--dtype bfloat16" in error.hint
    assert "--dtype float32" in error.hint
    for dtype in ("bfloat16", "float32"):
        merge(out, tmp_path / dtype, adapter=adapter, dtype=dtype, observer=Observer())


def test_a_backbone_that_is_not_what_its_manifest_says(out: Path) -> None:
    file = out / "model-00002-of-00002.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][1:].contiguous()
    save_file(tensors, file)
    refused(VerificationError, r"'lm_head.weight' is F32 \[23, 64\], not F32 \[24, 64\]", out)
    file.write_bytes(b"")
    refused(CorruptFileError, "00002-of-00002.safetensors: 0 bytes are too few", out)
    (out / "loftq_manifest.json").unlink()
    refused(SourceNotFoundError, "no loftq_manifest.json", out)


@pytest.mark.parametrize("target", ["out", "out/merged", "out/loftq_init/merged", "."])
def test_an_output_inside_the_input_or_around_it(target: str, out: Path) -> None:
    assert refused(UsageError, "the input", out, target, overwrite=True).exit_code == 2


def test_an_output_that_holds_the_adapter(out: Path, adapter: Path, tmp_path: Path) -> None:
    merge(out, tmp_path / "merged", observer=Observer())
    inside = adapter.rename(tmp_path / "merged/adapter")
    refused(UsageError, "holds the adapter", out, adapter=inside, overwrite=True)


def test_what_is_in_the_way(out: Path, tmp_path: Path) -> None:
    target = tmp_path / "merged"
    target.write_text("mine")
    refused(OutputConflictError, "exists and is not a merged checkpoint", out, overwrite=True)
    target.unlink()
    target.mkdir()
    merge(out, target, observer=Observer())  # an empty directory is as good as none
    refused(OutputConflictError, "holds a merged checkpoint", out)
    (target / "stale").touch()
    merge(out, target, dtype="bfloat16", overwrite=True, observer=Observer())
    assert json.loads((target / MARKER).read_text())["dtype"] == "bfloat16"
    assert not (target / "stale").exists()
    (target / MARKER).unlink()
    refused(OutputConflictError, "exists and is not a merged checkpoint", out, overwrite=True)
    other = Path(shutil.copytree(out, tmp_path / "other"))
    refused(OutputConflictError, "not a merged checkpoint", out, other.name, overwrite=True)


def test_a_failed_overwrite_keeps_the_old_output(out: Path, adapter: Path, tmp_path: Path) -> None:
    merge(out, tmp_path / "merged", observer=Observer())
    alter(
        adapter,
        lambda tensors: tensors[f"{PREFIX}{LAYER}.mlp.down_proj.lora_B.weight"].fill_(math.nan),
    )
    refused(NonFiniteWeightError, "down_proj", out, adapter=adapter, overwrite=True)


def test_a_full_disk(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 1))
    assert refused(EnvironmentFailure, "MB needed", out).exit_code == 5


def test_out_of_memory(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*arguments: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")

    monkeypatch.setattr(merging, "merged_value", exhausted)
    error = refused(EnvironmentFailure, "out of memory", out)
    assert f"'{LAYER}." in error.message


def test_an_interruption_leaves_nothing_and_the_next_run_starts_anew(
    out: Path, tmp_path: Path
) -> None:
    class Interrupt(Observer):
        def working_on(self, name: str) -> None:
            assert not (tmp_path / "merged").exists()
            if name == "lm_head.weight":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(out, tmp_path / "merged", observer=Interrupt())
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    left = tmp_path / ".merged.loftq-merge/output"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"what a crash left")
    merge(out, tmp_path / "merged", observer=Observer())
    assert {path.name for path in tmp_path.iterdir()} == {"out", "merged"}
    assert not (tmp_path / "merged/model.safetensors").exists()


def test_two_at_once(out: Path, tmp_path: Path) -> None:
    class Second(Observer):
        def begin(self, total: int, *_: str) -> None:
            with pytest.raises(OutputConflictError, match="another process"):
                merge(out, tmp_path / "merged", observer=Observer())

    merge(out, tmp_path / "merged", observer=Second())


def test_an_unfinished_conversion_of_that_name_is_left_alone(out: Path, tmp_path: Path) -> None:
    partial = tmp_path / ".merged.loftq-partial"
    partial.mkdir()
    (partial / "journal").write_text("somebody's work")
    merge(out, tmp_path / "merged", observer=Observer())
    assert (partial / "journal").read_text() == "somebody's work"
