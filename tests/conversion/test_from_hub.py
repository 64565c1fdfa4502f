"""Conversions of models on a hub, shard by shard, with the real client and a hub on 127.0.0.1."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from itertools import pairwise
from pathlib import Path

import huggingface_hub
import pytest

import loftq_cli
from loftq_cli.conversion.run import run
from loftq_cli.errors import CorruptFileError, EnvironmentFailure, UsageError
from loftq_cli.planning.describe import describe
from tests.support import checkpoints
from tests.support.bench import MANIFEST, Recorder
from tests.support.hub_conversions import (
    LAST,
    MODEL,
    Watcher,
    but_the_manifest,
    convert,
    expected,
    plan_of,
    shard,
    weights_in,
)
from tests.support.hub_server import Fault, HubServer

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
