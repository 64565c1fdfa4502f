"""Pickled checkpoints: read only where they are allowed, without running what is in them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import loftq_cli
from loftq_cli.checkpoint.pickles.reader import read_header
from loftq_cli.checkpoint.reader import ShardReader
from loftq_cli.checkpoint.source import open_source
from loftq_cli.errors import CorruptFileError, InputError, UnsupportedInputError
from tests.support import checkpoints, models

QUICK: dict[str, Any] = {"rank": 4, "iters": 1, "threads": 1, "bits": 2}


def deberta() -> Any:
    config = transformers.DebertaV2Config(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
    )
    return models._randomised(transformers.DebertaV2Model, config)


def pickled(directory: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> Path:
    """A checkpoint of ``tensors`` in pickles, with the config of tests.support.checkpoints."""
    checkpoints.write(directory, {"a.0.b.weight": torch.randn(4, 4)})
    (directory / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, directory / "pytorch_model.bin")
        return directory
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        part = names[number::shards]
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        torch.save({name: tensors[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = directory / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def written(output: Path) -> dict[str, torch.Tensor]:
    """Every tensor of an output."""
    found: dict[str, torch.Tensor] = {}
    for file in output.rglob("*.safetensors"):
        found |= load_file(file)
    return found


def test_a_real_architecture_becomes_what_it_becomes_from_safetensors(tmp_path: Path) -> None:
    model, plain = deberta(), tmp_path / "plain"
    models.save(model, plain)
    other = tmp_path / "pickled"
    other.mkdir()
    shutil.copy(plain / "config.json", other)
    torch.save(model.state_dict(), other / "pytorch_model.bin")
    first = loftq_cli.convert(plain, output=tmp_path / "a", **QUICK)
    second = loftq_cli.convert(other, output=tmp_path / "b", allow_pickle=True, **QUICK)
    expected, found = written(tmp_path / "a"), written(tmp_path / "b")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert second["totals"] == first["totals"]
    digest = hashlib.sha256((other / "pytorch_model.bin").read_bytes()).hexdigest()
    hashes = {entry["name"]: entry["sha256"] for entry in second["source"]["files"]}
    assert hashes["pytorch_model.bin"] == digest


@pytest.mark.parametrize("shards", [1, 2])
def test_tensors_are_read_from_their_places(shards: int, tmp_path: Path) -> None:
    tensors = checkpoints.llama(layers=1)
    source = open_source(pickled(tmp_path / "model", tensors, shards), allow_pickle=True)
    found: dict[str, torch.Tensor] = {}
    for shard in source.shards:
        with ShardReader(shard) as reader:
            found |= {tensor.name: reader.read(tensor) for tensor in shard.header.tensors}
            reader.finish()
            assert reader.sha256 == hashlib.sha256(shard.path.read_bytes()).hexdigest()
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_tensors_that_share_memory_are_each_written(tmp_path: Path) -> None:
    whole = torch.randn(8, 16)
    tensors = {
        "x.0.first.weight": whole[:4],
        "x.0.second.weight": whole[2:6],
        "x.0.tied.weight": whole[:4],
        "flag": torch.tensor([True, False]),
        "step": torch.tensor(3, dtype=torch.int16),
    }
    directory = pickled(tmp_path / "model", tensors)
    settings = {**QUICK, "include": [], "exclude": ["*.second.*"], "layout": "dense"}
    manifest = loftq_cli.convert(directory, output=tmp_path / "a", allow_pickle=True, **settings)
    digest = hashlib.sha256((directory / "pytorch_model.bin").read_bytes()).hexdigest()
    assert digest in {entry["sha256"] for entry in manifest["source"]["files"]}
    found = written(tmp_path / "a")
    assert torch.equal(found["x.0.second.weight"], whole[2:6])
    assert torch.equal(found["x.0.first.weight"], found["x.0.tied.weight"])
    assert (found["flag"].tolist(), found["step"].item()) == ([True, False], 3)


def test_without_the_option_it_is_refused_and_the_option_named(tmp_path: Path) -> None:
    directory = pickled(tmp_path / "model", checkpoints.llama(layers=1))
    with pytest.raises(UnsupportedInputError) as caught:
        loftq_cli.convert(directory, output=tmp_path / "out", **QUICK)
    assert "--allow-pickle" in (caught.value.hint or "")
    assert caught.value.exit_code == 3


def test_safetensors_win(tmp_path: Path) -> None:
    directory = pickled(tmp_path / "model", {"a.0.b.weight": torch.zeros(4, 4)})
    save_file({"a.0.c.weight": torch.ones(4, 4)}, directory / "model.safetensors")
    source = open_source(directory, allow_pickle=True)
    assert [tensor.name for tensor in source.tensors] == ["a.0.c.weight"]


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.target,)


def test_a_payload_is_never_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    tensors: dict[str, Any] = {"a.0.b.weight": torch.ones(4, 4), "evil": Payload(trace)}
    directory = pickled(tmp_path / "model", tensors)
    for allowed in (False, True):
        with pytest.raises(InputError) as caught:
            loftq_cli.convert(directory, output=tmp_path / "out", allow_pickle=allowed, **QUICK)
        shown = f"{caught.value.message} {caught.value.hint}"
        assert "pytorch_model.bin" in shown
        assert "weights_only" not in shown  # torch's text advises to switch it off
        assert "\x1b" not in shown
    assert not trace.exists()
    assert not (tmp_path / "out").exists()


def legacy(path: Path) -> None:
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)


def compressed(path: Path) -> None:
    with zipfile.ZipFile(path) as source:
        entries = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name, content in entries.items():
            target.writestr(name, content)


def bomb(name: str) -> Callable[[Path], None]:
    """Adds a gibibyte of zeros under ``name``, in about a megabyte."""

    def add(path: Path) -> None:
        with (
            zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive,
            archive.open(f"pytorch_model/{name}", "w") as entry,
        ):
            for _ in range(64):
                entry.write(bytes(1 << 24))

    return add


def much(path: Path) -> None:
    with (
        zipfile.ZipFile(path, "a") as archive,
        archive.open("pytorch_model/DATA.PKL", "w") as entry,
    ):
        for _ in range(2):
            entry.write(bytes(1 << 24))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
    ("content", "change", "message"),
    [
        ({"a": torch.ones(2)}, legacy, "not a zip file"),
        ({"a": torch.ones(64)}, compressed, "is compressed"),
        ({"a": torch.ones(64)}, bomb("notes"), "notes.* is compressed"),
        ({"a": torch.ones(64)}, much, "larger than 32 MB"),
        ({"a": torch.ones(64)}, cut, "zip file"),
        ({"a": torch.ones(4, 3).T}, None, "'a' is not contiguous"),
        ({"a": torch.ones(1).expand(4)}, None, "'a' is not contiguous"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, None, "'a' is torch.complex64"),
        ({"a": torch.eye(2).to_sparse()}, None, "_rebuild_sparse_tensor"),
        ({"a": 1}, None, "entry 'a' is int"),
        ({"model": {"a": torch.ones(2)}}, None, "entry 'model' is dict"),
        ([torch.ones(2)], None, "holds list, not a state dict"),
        ({}, None, "no tensors"),
        ({1: torch.ones(2)}, None, "entry 1"),
    ],
)
def test_what_is_no_plain_state_dict_is_refused(
    content: Any, change: Callable[[Path], None] | None, message: str, tmp_path: Path
) -> None:
    directory = pickled(tmp_path / "model", {})
    file = directory / "pytorch_model.bin"
    torch.save(content, file)
    if change is not None:
        change(file)
    with pytest.raises(CorruptFileError, match=message) as caught:
        open_source(directory, allow_pickle=True)
    assert "pytorch_model.bin" in caught.value.message


def test_a_pickle_under_another_name_is_refused(tmp_path: Path) -> None:
    directory = pickled(tmp_path / "model", {"a.0.b.weight": torch.ones(4, 4)})
    (directory / "pytorch_model.bin").rename(directory / "model.safetensors")
    with pytest.raises(CorruptFileError, match=r"model\.safetensors"):
        open_source(directory, allow_pickle=True)


@pytest.mark.parametrize("name", ["model.safetensors", "../pytorch_model.bin"])
def test_an_index_leads_to_pickles_beside_it_only(name: str, tmp_path: Path) -> None:
    directory = pickled(tmp_path / "model", checkpoints.llama(layers=1), shards=2)
    index = directory / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CorruptFileError, match=r"pytorch_model\.bin\.index\.json"):
        open_source(directory, allow_pickle=True)


def test_a_header_reads_no_data(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(1 << 20)}, file)
    header = read_header(file)
    (tensor,) = header.tensors
    assert (tensor.dtype, tensor.shape, header.size) == ("F32", (1 << 20,), file.stat().st_size)
    assert header.data_start == tensor.start < 4096
