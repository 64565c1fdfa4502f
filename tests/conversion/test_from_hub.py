"""Conversions of models on a hub, shard by shard, with the real client and a hub on 127.0.0.1."""

from __future__ import annotations

import json
import shutil
import threading
from collections import namedtuple
from itertools import pairwise
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

import loftq_cli
from loftq_cli.conversion.describe import describe
from loftq_cli.conversion.run import Outcome, prepare, run
from loftq_cli.errors import (
    CorruptFileError,
    EnvironmentFailure,
    OutputConflictError,
    SourceChangedError,
    UsageError,
)
from loftq_cli.recipe import Options
from tests import checkpoints
from tests.conversion.bench import MANIFEST, Recorder
from tests.hub_server import Fault, HubServer

MODEL = "org/model"
LAST = "model.layers.3.mlp.down_proj.weight"


def shard(number: int) -> str:
    return f"model-{number:05}-of-00004.safetensors"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    """A small Llama in four shards."""
    tensors = checkpoints.llama(layers=4)
    return checkpoints.files(checkpoints.write(tmp_path / "model", tensors, cuts=(9, 17, 25)))


@pytest.fixture
def commit(server: HubServer, files: dict[str, bytes]) -> str:
    return server.publish(MODEL, files)


def plan_of(output: Path, recorder: Recorder | None = None, **options: Any) -> Any:
    chosen: dict[str, Any] = {
        name: options.pop(name) for name in ("bits", "target_bpw") if name in options
    }
    settings = Options.from_settings({"threads": 1, "rank": 4, "iters": 2, **chosen})
    return prepare(MODEL, output, settings, observer=recorder or Recorder(), **options)


def convert(output: Path, recorder: Recorder | None = None, **options: Any) -> Outcome:
    recorder = recorder or Recorder()
    plan, path = plan_of(output, recorder, **options)
    return run(plan, path, overwrite=options.get("overwrite", False), observer=recorder)


def expected(tmp_path: Path, files: dict[str, bytes], **settings: Any) -> dict[str, bytes]:
    """What a conversion of the same files from a directory gives, but for the manifest."""
    key = str((files, settings))
    if key not in _EXPECTED:
        source = tmp_path / "expected-model"
        source.mkdir()
        for name, content in files.items():
            (source / name).write_bytes(content)
        output = tmp_path / "expected"
        loftq_cli.convert(source, output, threads=1, rank=4, iters=2, **settings)
        _EXPECTED[key] = but_the_manifest(output)
    return _EXPECTED[key]


_EXPECTED: dict[str, dict[str, bytes]] = {}


def but_the_manifest(output: Path) -> dict[str, bytes]:
    return {name: data for name, data in checkpoints.files(output).items() if name != MANIFEST}


def weights_in(directory: Path) -> set[str]:
    return {path.name for path in directory.rglob("*.safetensors")}


class Watcher(Recorder):
    """Notes which shards of the source lie on the disk whenever a tensor is begun."""

    def __init__(self, *places: Path, stop_before: str | None = None) -> None:
        super().__init__(stop_before)
        self.places = places
        self.seen: list[set[str]] = []
        self.total = 0
        self.arrived = 0

    def working_on(self, name: str) -> None:
        self.seen.append(set().union(*(weights_in(place) for place in self.places)))
        super().working_on(name)

    def begin_download(self, total_bytes: int) -> None:
        self.total = total_bytes

    def downloaded(self, nbytes: int) -> None:
        self.arrived += nbytes


# Planning


def test_a_plan_reads_headers_and_downloads_no_shard(
    server: HubServer, commit: str, files: dict[str, bytes], tmp_path: Path
) -> None:
    plan, path = plan_of(tmp_path / "out")
    assert sorted(server.ranges) == [shard(number) for number in (1, 2, 3, 4)]
    assert not [name for name in server.downloads() if name.endswith(".safetensors")]
    assert weights_in(tmp_path / "cache") == set()
    sizes = [len(files[shard(number)]) for number in (1, 2, 3, 4)]
    found = describe(plan, path)
    assert found["source"] == {"id": MODEL, "revision": commit}
    directory = tmp_path / "cache/models--org--model/snapshots" / commit
    assert found["download"] == {
        "files": 4,
        "bytes": sum(sizes),
        "disk_bytes": sum(sizes),
        "directory": str(directory),
    }
    passing = describe(*plan_of(tmp_path / "out", discard_shards=True))["download"]
    assert passing["bytes"] == sum(sizes)
    assert passing["disk_bytes"] == max(map(sum, pairwise(sizes)))
    assert passing["directory"] == str(tmp_path / ".out.loftq-partial/shards" / commit)
    assert not (tmp_path / ".out.loftq-partial").exists()


def test_a_server_that_ignores_ranges_is_not_read_to_the_end(
    server: HubServer, files: dict[str, bytes], tmp_path: Path
) -> None:
    server.publish(MODEL, files)
    expected_plan, _ = plan_of(tmp_path / "out")
    server.repositories[MODEL].fault = Fault("range", whole=True)
    plan, _ = plan_of(tmp_path / "out")
    assert plan.shards == expected_plan.shards
    assert plan.fingerprint == expected_plan.fingerprint


def test_a_header_survives_a_connection_that_drops_again_and_again(
    server: HubServer, files: dict[str, bytes], tmp_path: Path
) -> None:
    server.publish(MODEL, files)
    server.repositories[MODEL].fault = Fault("range", drop_after=20_000, file=shard(2))
    plan_of(tmp_path / "out")
    assert server.ranges.count(shard(2)) == 100_000 // 20_000


def test_a_header_that_never_comes(server: HubServer, commit: str, tmp_path: Path) -> None:
    server.repositories[MODEL].fault = Fault("range", drop_after=0, file=shard(2))
    with pytest.raises(EnvironmentFailure, match=rf"{shard(2)} of {MODEL} could not be read"):
        plan_of(tmp_path / "out")


def test_a_header_longer_than_the_first_range(
    server: HubServer, tmp_path: Path, files: dict[str, bytes]
) -> None:
    tensors = checkpoints.llama() | {
        f"t{n:0100}.weight": checkpoints.llama()["model.norm.weight"] for n in range(800)
    }
    many = checkpoints.files(checkpoints.write(tmp_path / "many", tensors))
    header = int.from_bytes(many["model.safetensors"][:8], "little")
    assert header > 100_000
    server.publish(MODEL, many)
    for fault in (None, Fault("range", whole=True), Fault("range", drop_after=70_000)):
        server.repositories[MODEL].fault = fault
        plan, _ = plan_of(tmp_path / "out")
        assert {tensor.name for tensor in plan.source.tensors} == set(tensors)


def test_broken_headers_are_all_listed_before_anything_is_downloaded(
    server: HubServer, files: dict[str, bytes], tmp_path: Path
) -> None:
    files[shard(2)] = b"\xff" * 50
    files[shard(3)] = files[shard(3)][:-1]
    server.publish(MODEL, files)
    with pytest.raises(CorruptFileError, match="2 faults") as caught:
        plan_of(tmp_path / "out")
    assert shard(2) in caught.value.message
    assert shard(3) in caught.value.message
    assert not [name for name in server.downloads() if name.endswith(".safetensors")]


# Streaming


def test_from_the_hub_as_from_a_directory(
    server: HubServer, commit: str, files: dict[str, bytes], tmp_path: Path
) -> None:
    watcher = Watcher(tmp_path / "cache")
    manifest = convert(tmp_path / "out", watcher).manifest
    assert but_the_manifest(tmp_path / "out") == expected(tmp_path, files)
    assert (manifest["source"]["id"], manifest["source"]["revision"]) == (MODEL, commit)
    size = sum(len(content) for name, content in files.items() if name.startswith("model-"))
    assert watcher.arrived == watcher.total == size
    # Other tools find everything in the cache, by the branch's name and without a connection.
    found = huggingface_hub.snapshot_download(MODEL, local_files_only=True)
    assert checkpoints.files(Path(found)) == files


def test_a_shard_is_asked_for_one_ahead_and_no_more(
    server: HubServer, commit: str, tmp_path: Path
) -> None:
    watcher = Watcher(tmp_path / "cache")
    convert(tmp_path / "out", watcher)
    for seen in watcher.seen:
        number = len(seen)
        assert seen == {shard(each) for each in range(1, number + 1)}
    order = [name for name in server.downloads() if name.endswith(".safetensors")]
    assert order == [shard(number) for number in (1, 2, 3, 4)]


def test_discarded_shards_take_the_room_of_two(
    server: HubServer, commit: str, files: dict[str, bytes], tmp_path: Path
) -> None:
    partial = tmp_path / ".out.loftq-partial"
    watcher = Watcher(partial / "shards")
    convert(tmp_path / "out", watcher, discard_shards=True)
    assert max(map(len, watcher.seen)) <= 2
    assert weights_in(tmp_path / "cache") == set()
    assert not partial.exists()
    assert but_the_manifest(tmp_path / "out") == expected(tmp_path, files)


def test_what_was_in_the_cache_is_used_and_never_discarded(
    server: HubServer, commit: str, tmp_path: Path
) -> None:
    huggingface_hub.hf_hub_download(MODEL, shard(2))
    convert(tmp_path / "out", discard_shards=True)
    assert weights_in(tmp_path / "cache") == {shard(2)}
    assert server.downloads().count(shard(2)) == 1


def test_a_target_has_every_shard_brought_twice_where_none_stays(
    server: HubServer, commit: str, files: dict[str, bytes], tmp_path: Path
) -> None:
    convert(tmp_path / "out", target_bpw=3.0, discard_shards=True)
    assert but_the_manifest(tmp_path / "out") == expected(tmp_path, files, target_bpw=3.0)
    assert [server.downloads().count(shard(number)) for number in (1, 2, 3, 4)] == [2] * 4


def test_a_layout_that_gives_way_begins_again_with_the_same_shards(
    server: HubServer, tmp_path: Path
) -> None:
    tensors = checkpoints.llama(layers=4)
    tensors[LAST] = tensors[LAST] * 1e9
    source = checkpoints.write(tmp_path / "model", tensors, cuts=(9, 17, 25))
    server.publish(MODEL, checkpoints.files(source))
    manifest = convert(tmp_path / "out", bits=2, discard_shards=True).manifest
    assert manifest["recipe"]["layout_fallback"] == "float16-range"
    loftq_cli.error_report(tmp_path / "out", source=source)


def test_a_report_and_the_cache(server: HubServer, commit: str, tmp_path: Path) -> None:
    convert(tmp_path / "out", discard_shards=True)
    report = loftq_cli.error_report(tmp_path / "out", source=MODEL)
    assert report["recomputed"]
    assert len(weights_in(tmp_path / "cache")) == 4


def test_a_directory_is_never_discarded(files: dict[str, bytes], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--discard-shards"):
        loftq_cli.convert(tmp_path / "model", tmp_path / "out", discard_shards=True)
    assert checkpoints.files(tmp_path / "model") == files


@pytest.mark.parametrize("discard", [False, True])
def test_a_disk_without_room_for_the_download(
    server: HubServer,
    commit: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    discard: bool,
) -> None:
    plan, path = plan_of(tmp_path / "out", discard_shards=discard)
    # Enough for the output and the margin of the check, but not for the shards as well.
    free = plan.disk_bytes + (4 << 20) + describe(plan, path)["download"]["disk_bytes"] - 1
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, free))
    with pytest.raises(EnvironmentFailure, match="B needed") as caught:
        run(plan, path, overwrite=False, observer=Recorder())
    assert "--discard-shards" in caught.value.hint
    assert not [name for name in server.downloads() if name.endswith(".safetensors")]


# Stopped, and gone on with


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


# What arrives


def test_a_shard_that_arrives_damaged_stops_the_conversion_and_keeps_the_work(
    server: HubServer, commit: str, files: dict[str, bytes], tmp_path: Path
) -> None:
    server.repositories[MODEL].fault = Fault("resolve", corrupt=True, file=shard(3))
    recorder = Recorder()
    with pytest.raises(CorruptFileError, match=f"{shard(3)} of {MODEL} arrived damaged"):
        convert(tmp_path / "out", recorder, discard_shards=True)
    assert len(recorder.named("converted")) == 2 * 7
    server.repositories[MODEL].fault = None
    recorder = Recorder()
    convert(tmp_path / "out", recorder, discard_shards=True)
    assert len(recorder.named("kept")) >= 2 * 7
    assert but_the_manifest(tmp_path / "out") == expected(tmp_path, files)


@pytest.mark.parametrize("offset", [0, 1, 8, 30_000])
def test_a_connection_that_drops_at_any_offset(
    server: HubServer,
    commit: str,
    files: dict[str, bytes],
    tmp_path: Path,
    offset: int,
) -> None:
    fault = Fault("resolve", drop_after=offset, file=shard(2), times=3)
    server.repositories[MODEL].fault = fault
    convert(tmp_path / "out", discard_shards=True)
    assert but_the_manifest(tmp_path / "out") == expected(tmp_path, files)


def test_a_server_that_begins_anew_instead_of_going_on(
    server: HubServer, commit: str, files: dict[str, bytes], tmp_path: Path
) -> None:
    server.repositories[MODEL].fault = Fault(
        "resolve", drop_after=30_000, whole=True, file=shard(2), times=2
    )
    watcher = Watcher()
    convert(tmp_path / "out", watcher)
    assert but_the_manifest(tmp_path / "out") == expected(tmp_path, files)
    assert watcher.arrived == watcher.total


def test_the_manifest_lists_the_hubs_hashes(
    server: HubServer, commit: str, files: dict[str, bytes], tmp_path: Path
) -> None:
    convert(tmp_path / "out", discard_shards=True)
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    listed = {file["name"]: file["sha256"] for file in manifest["source"]["files"]}
    found = huggingface_hub.HfApi().model_info(MODEL, files_metadata=True).siblings or []
    for sibling in found:
        if sibling.lfs:
            assert listed[sibling.rfilename] == sibling.lfs.sha256
