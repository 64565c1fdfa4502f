"""Space, memory and permissions are asked for before anything is written."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from loftq_cli.conversion import room
from loftq_cli.errors import EnvironmentFailure
from loftq_cli.machine import resources
from loftq_cli.machine.observer import Observer
from loftq_cli.merging.merge import merge
from loftq_cli.settings.file import check_writable
from tests.support import checkpoints
from tests.support.bench import KEY, QUERY, Bench, Recorder

CPU = torch.device("cpu")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of which nothing is known: its /proc and /sys, to be filled."""
    root = tmp_path / "machine"

    def moved(path: str) -> Path:
        return root / path.lstrip("/")

    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("")
    monkeypatch.setattr(resources, "Path", moved)
    monkeypatch.setattr(resources, "_CGROUPS", root / "sys/fs/cgroup")
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda which: unlimited)
    return root


def group(machine: Path, path: str, files: dict[str, object]) -> None:
    """A control group with these files."""
    directory = machine / "sys/fs/cgroup" / path
    directory.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (directory / name).write_text(f"{value}\n")


def test_where_nothing_is_known_nothing_is_refused(machine: Path) -> None:
    assert resources.available_memory(CPU) is None
    resources.check_memory(1 << 60, "tensor 'x'", CPU)


def test_the_machine_has_memory_and_swap(machine: Path) -> None:
    text = "MemTotal: 9000 kB\nMemAvailable: 1000 kB\nSwapFree: 24 kB\nHugePages_Total: 0\n"
    (machine / "proc/meminfo").write_text(text)
    assert resources.available_memory(CPU) == 1024 * 1024
    assert resources.available_memory(CPU, swap=False) == 1000 * 1024


def test_every_control_group_around_the_process_counts(machine: Path) -> None:
    (machine / "proc/meminfo").write_text("MemAvailable: 1000000 kB\n")
    (machine / "proc/self/cgroup").write_text("1:cpu:/x\n0::/outer/inner\n")
    group(machine, "outer", {"memory.max": 5000, "memory.current": 3000})
    group(machine, "outer/inner", {"memory.max": "max", "memory.current": 2000})
    assert resources.available_memory(CPU) == 2000
    # What is only cached can be had.
    group(machine, "outer", {"memory.stat": "anon 7\ninactive_file 500"})
    assert resources.available_memory(CPU) == 2500


def test_control_groups_of_version_1_whose_path_is_not_visible(machine: Path) -> None:
    (machine / "proc/self/cgroup").write_text("4:memory:/docker/abc\n")
    files = {"memory.limit_in_bytes": 9000, "memory.usage_in_bytes": 4000}
    group(machine, "memory", files | {"memory.stat": "cache 1\ntotal_inactive_file 100"})
    assert resources.available_memory(CPU) == 5100


def test_a_limit_of_the_process_counts(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine / "proc/self/status").write_text("Name: python\nVmSize: 3 kB\n")
    monkeypatch.setattr(resource, "getrlimit", lambda which: (10240, 10240))
    assert resources.available_memory(CPU) == 10240 - 3 * 1024


def test_a_device_has_what_is_free_and_what_the_process_keeps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    device = torch.device("cuda:1")
    assert resources.available_memory(device) == 1300
    with pytest.raises(EnvironmentFailure, match=r"0\.00 MB available \(cuda:1\)"):
        resources.check_memory(1301, "tensor 'x'", device)
    resources.check_memory(1300, "tensor 'x'", device)


def test_this_machine_says_something_sensible() -> None:
    available = resources.available_memory(CPU)
    assert available is None or 0 < available < 1 << 50


def test_too_little_memory_is_found_out_before_anything_is_written(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.write(checkpoints.llama(hidden=64, intermediate=192), cuts=(5,))
    monkeypatch.setattr(resources, "available_memory", lambda device: 1000)
    output = bench.directory / "a/b/out"
    said = (
        r"tensor 'model\.layers\.0\.mlp\.\w+\.weight': 0\.\d\d MB of memory needed, 0\.00 MB avail"
    )
    with pytest.raises(EnvironmentFailure, match=said) as caught:
        bench.convert(output=output)
    assert caught.value.exit_code == 5
    assert "--exclude" in caught.value.hint
    assert bench.names() == {"model"}


def test_what_is_needed_is_what_the_dry_run_says(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(room, "check_memory", lambda *arguments: asked.append(arguments))
    bench.convert()
    ((needed, _, device),) = asked
    # The matrices are 128 x 64 in float32: itself, the next one, and nine bytes for each weight.
    assert needed > 128 * 64 * (4 + 4 + 9)
    assert device == CPU


def test_space_for_the_tokenizer_is_counted(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(room, "check_disks", lambda source, path, needed: asked.append(needed))
    bench.interrupt(KEY)
    (bench.source / "tokenizer.json").write_bytes(b"x" * 1_000_000)
    bench.convert(overwrite=True)
    assert asked[1] - asked[0] > 900_000


def refusing(monkeypatch: pytest.MonkeyPatch, *closed: Path) -> None:
    """Nothing may be written in these directories, whoever asks: the superuser may, otherwise."""
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) not in closed)


@pytest.mark.parametrize("which", ["parent", "old output", "partial"])
def test_places_that_may_not_be_written_are_found_out_first(
    which: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    if which == "old output":
        bench.convert(rank=3)
    if which == "partial":
        bench.interrupt(QUERY)
    closed = {"parent": bench.directory, "old output": bench.output, "partial": bench.partial}
    before = bench.names()
    refusing(monkeypatch, closed[which])
    recorder = Recorder()
    with pytest.raises(EnvironmentFailure, match=rf"{closed[which].name}: not writable"):
        bench.convert(recorder, overwrite=which == "old output")
    assert not recorder.named("converted")
    assert bench.names() == before


def test_a_merge_asks_first_too(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.convert()
    refusing(monkeypatch, bench.directory)
    with pytest.raises(EnvironmentFailure, match="not writable"):
        merge(bench.output, bench.directory / "deep/merged", observer=Observer())
    assert bench.names() == {"model", "out"}


def test_a_merge_asks_for_memory_too(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.convert()
    monkeypatch.setattr(resources, "available_memory", lambda device: 60_000)
    # Two times 128 x 64 in float32.
    with pytest.raises(EnvironmentFailure, match=r"mlp.*0\.07 MB of memory needed, 0\.06 MB avail"):
        merge(bench.output, bench.directory / "deep/merged", observer=Observer())
    assert bench.names() == {"model", "out"}


def test_the_place_of_a_saved_recipe_is_looked_at_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_writable(tmp_path / "recipe.toml", dry_run=False)
    refusing(monkeypatch, tmp_path)
    with pytest.raises(EnvironmentFailure, match="not writable"):
        check_writable(tmp_path / "recipe.toml", dry_run=False)


def test_an_output_that_is_complete_needs_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.convert()
    monkeypatch.setattr(resources, "available_memory", lambda device: 0)
    assert bench.convert().nothing_to_do
