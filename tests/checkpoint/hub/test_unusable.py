"""Models on a hub that hold no weights that can be used: said before any are downloaded."""

from __future__ import annotations

import pytest

from loftq_cli.errors import CorruptFileError, SourceNotFoundError, UnsupportedInputError
from tests.support.hub_models import (
    INDEX,
    SHARDS,
    SINGLE,
    SMALL,
    UNWANTED,
    contents,
    failure,
    fetch,
    index,
    shard,
    silent,
    weights,
)
from tests.support.hub_server import HubServer


def test_only_pickles(server: HubServer) -> None:
    server.publish("org/model", {**SMALL, "pytorch_model-00001-of-00002.bin": b"a pickle"})
    error = failure()
    assert isinstance(error, UnsupportedInputError)
    assert error.exit_code == 3
    assert "--revision refs/pr/N" in error.hint
    assert "--allow-pickle" in error.hint
    assert f"{server.url}/org/model/discussions" in error.hint
    server.publish("org/model", {**SMALL, SINGLE: weights(0)}, branch="refs/pr/9")
    server.publish("org/model", {**SMALL, SINGLE: weights(0)}, branch="refs/pr/10")
    server.publish("org/model", {**SMALL, "README.md": b"better"}, branch="refs/pr/11")
    hint = (
        "use --revision refs/pr/10, a pull request that has safetensors; or download it "
        "(hf download org/model --local-dir DIR) and convert the directory with --allow-pickle"
    )
    assert failure().hint == hint
    assert contents(fetch("org/model", "refs/pr/10", say=silent))[SINGLE] == weights(0)


def test_no_configuration(server: HubServer) -> None:
    server.publish("org/model", {"tokenizer.json": b"{}", SINGLE: weights(0)})
    error = failure()
    assert isinstance(error, SourceNotFoundError)
    assert "no config.json" in error.message


def test_a_cache_that_shares_its_blobs_with_others(server: HubServer) -> None:
    """As with huggingface_hub's shared store, whose files have names of another hash."""
    server.publish("org/model", {**SMALL, SINGLE: weights(0)})
    found = fetch("org/model", say=silent)
    blob = (found.directory / SINGLE).resolve()
    store = blob.parents[2] / "store"
    store.mkdir()
    blob.rename(store / ("0" * 64))
    blob.symlink_to(store / ("0" * 64))
    assert fetch("org/model", offline=True, say=silent) == found


@pytest.mark.parametrize("others", [{}, {"other.safetensors": b"", "model.gguf": b""}])
def test_no_weights(server: HubServer, others: dict[str, bytes]) -> None:
    server.publish("org/model", {**SMALL, **others})
    error = failure()
    assert isinstance(error, SourceNotFoundError)
    assert f"neither {SINGLE} nor {INDEX}" in error.message


@pytest.mark.parametrize(
    "name",
    [
        "../../evil.safetensors",
        "/evil.safetensors",
        "onnx/model.safetensors",
        "onnx\\model.safetensors",
        "nul\0.safetensors",
        "modeling_llama.py",
        "pytorch_model.bin",
        "..",
        "",
        7,
        None,
    ],
)
def test_an_index_that_names_no_shard(server: HubServer, name: object) -> None:
    nested = {"onnx/model.safetensors": weights(0)}
    files = {**SMALL, **UNWANTED, **SHARDS, **nested, INDEX: index(shard(1), name)}
    server.publish("org/model", files)
    error = failure()
    assert isinstance(error, CorruptFileError)
    assert f"{INDEX} must name safetensors files" in error.message
    assert sorted(server.downloads()) == sorted([*SMALL, INDEX])


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b'{"weight_map": 3}',
        b'{"weight_map": {}}',
        b'{"weight_map": {"t": ["a"]}}',
    ],
)
def test_an_index_that_is_none(server: HubServer, content: bytes) -> None:
    server.publish("org/model", {**SMALL, **SHARDS, INDEX: content})
    error = failure()
    assert isinstance(error, CorruptFileError)
    assert INDEX in error.message


def test_missing_shards_are_all_listed_before_any_is_downloaded(server: HubServer) -> None:
    files = {**SMALL, shard(1): weights(1), INDEX: index(shard(1), shard(2), shard(3))}
    server.publish("org/model", files)
    error = failure()
    assert isinstance(error, CorruptFileError)
    assert error.message.endswith(f"{shard(2)}, {shard(3)}")
    assert shard(1) not in server.downloads()
