"""Conversions of models on a hub that were stopped and go on, though the branch may have moved."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import huggingface_hub
import pytest

from loftq_cli.errors import EnvironmentFailure, OutputConflictError, SourceChangedError
from tests.support.bench import Recorder
from tests.support.hub_conversions import LAST, MODEL, but_the_manifest, convert, expected, shard
from tests.support.hub_server import Fault, HubServer


@pytest.mark.parametrize("discard", [False, True])
def test_an_interrupted_conversion_goes_on_where_it_was(
    server: HubServer, commit: str, files: dict[str, bytes], tmp_path: Path, discard: bool
) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "out", Recorder(LAST), discard_shards=discard)
    server.requests.clear()
    convert(tmp_path / "out", discard_shards=discard)
    assert but_the_manifest(tmp_path / "out") == expected(tmp_path, files)
    # The last one was there already when its matrix was reached.
    assert not [name for name in server.downloads() if name.endswith(".safetensors")]


def test_an_interruption_ends_the_download_and_leaves_nothing_of_it(
    server: HubServer, commit: str, tmp_path: Path
) -> None:
    slow = Fault("resolve", delay=0.02, file=shard(2))  # 20 seconds for the whole shard
    server.repositories[MODEL].fault = slow

    class Interrupted(Recorder):
        def downloaded(self, nbytes: int) -> None:
            arrived.set()

        def working_on(self, name: str) -> None:
            if "layers.0.mlp" in name:
                while shard(2) not in server.downloads():
                    arrived.wait(0.01)
                raise KeyboardInterrupt

    arrived = threading.Event()
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "out", Interrupted())
    assert "loftq-download" not in {thread.name for thread in threading.enumerate()}
    assert not list((tmp_path / "cache").rglob("*.incomplete"))


def test_what_a_crash_left_of_a_download_is_cleared_away(
    server: HubServer, commit: str, files: dict[str, bytes], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "out", Recorder(LAST), discard_shards=True)
    shards = tmp_path / ".out.loftq-partial/shards"
    left = shards / commit / ".cache/huggingface/download/x.incomplete"
    left.parent.mkdir(parents=True, exist_ok=True)
    left.write_bytes(b"half")
    other = shards / ("0" * 40)
    other.mkdir()
    (other / shard(1)).write_bytes(b"of another commit")
    content = files[shard(4)]
    (shards / commit / shard(4)).write_bytes(content[:-10] + bytes(10))  # as after a power cut

    class Clear(Recorder):
        def working_on(self, name: str) -> None:
            assert not left.exists()
            assert not other.exists()

    convert(tmp_path / "out", Clear(), discard_shards=True)
    assert but_the_manifest(tmp_path / "out") == expected(tmp_path, files)


def moved(files: dict[str, bytes]) -> dict[str, bytes]:
    """The model after somebody pushed: the same headers, other weights."""
    content = files[shard(1)]
    return {**files, shard(1): content[:-4] + bytes(4)}


@pytest.mark.parametrize("discard", [False, True])
def test_a_branch_that_moves_does_not_move_the_conversion(
    server: HubServer, commit: str, files: dict[str, bytes], tmp_path: Path, discard: bool
) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "out", Recorder(LAST), discard_shards=discard)
    other = server.publish(MODEL, moved(files))
    recorder = Recorder()
    manifest = convert(tmp_path / "out", recorder, discard_shards=discard).manifest
    assert manifest["source"]["revision"] == commit
    assert but_the_manifest(tmp_path / "out") == expected(tmp_path, files)
    (note,) = [note for note in recorder.notes if commit in note]
    assert other in note
    assert "--overwrite" in note


def test_overwrite_takes_the_branch_as_it_is_now(
    server: HubServer, commit: str, files: dict[str, bytes], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "out", Recorder(LAST))
    other = server.publish(MODEL, moved(files))
    assert convert(tmp_path / "out", overwrite=True).manifest["source"]["revision"] == other
    assert but_the_manifest(tmp_path / "out") == expected(tmp_path, moved(files))


def test_a_finished_output_of_what_the_branch_was_is_another_one(
    server: HubServer, commit: str, files: dict[str, bytes], tmp_path: Path
) -> None:
    convert(tmp_path / "out")
    assert convert(tmp_path / "out").nothing_to_do
    server.publish(MODEL, moved(files))
    with pytest.raises(OutputConflictError, match="another source"):
        convert(tmp_path / "out")
    assert convert(tmp_path / "out", revision=commit).nothing_to_do


def test_unfinished_work_on_one_branch_is_not_mixed_with_another(
    server: HubServer, commit: str, files: dict[str, bytes], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "out", Recorder(LAST))
    server.publish(MODEL, moved(files), branch="v2")  # the same headers
    with pytest.raises(SourceChangedError):
        convert(tmp_path / "out", revision="v2")
    convert(tmp_path / "out")
    assert but_the_manifest(tmp_path / "out") == expected(tmp_path, files)


def test_another_revision_is_another_conversion(
    server: HubServer, commit: str, files: dict[str, bytes], tmp_path: Path
) -> None:
    content = files[shard(1)]
    renamed = content.replace(b"embed_tokens", b"embedtokens_")
    index = files["model.safetensors.index.json"].replace(b"embed_tokens", b"embedtokens_")
    server.publish(
        MODEL, {**files, shard(1): renamed, "model.safetensors.index.json": index}, branch="v2"
    )
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "out", Recorder(LAST))
    with pytest.raises(OutputConflictError, match="source file"):
        convert(tmp_path / "out", revision="v2")


def test_a_pinned_commit_that_is_gone(
    server: HubServer, commit: str, files: dict[str, bytes], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "out", Recorder(LAST))
    server.publish(MODEL, moved(files))
    shutil.rmtree(server.root / MODEL / commit)
    with pytest.raises(EnvironmentFailure, match=f"{MODEL} has no revision '{commit}'"):
        convert(tmp_path / "out")


def test_offline_with_a_filled_cache_and_a_pinned_commit(
    server: HubServer, commit: str, files: dict[str, bytes], tmp_path: Path
) -> None:
    convert(tmp_path / "first")
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "out", Recorder(LAST), offline=True)
    server.publish(MODEL, moved(files))
    huggingface_hub.hf_hub_download(MODEL, "config.json")  # the cache's main is another now
    server.requests.clear()
    convert(tmp_path / "out", offline=True)
    assert server.requests == []
    assert but_the_manifest(tmp_path / "out") == expected(tmp_path, files)
