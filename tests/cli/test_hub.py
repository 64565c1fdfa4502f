"""``loftq convert HUB_ID``, end to end: the real client, a hub on 127.0.0.1, a process each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import checkpoints, models
from tests.support.commands import Command
from tests.support.hub_fixtures import cache, server
from tests.support.hub_server import HubServer

__all__ = ["cache", "server"]

SETTINGS = ("--bits", "2", "--rank", "4", "--iters", "2", "-t", "1", "--json")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-m", "loftq_cli", *arguments],
        env={**kept, "NO_PROXY": "127.0.0.1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return checkpoints.write(tmp_path / "sharded", checkpoints.llama(layers=2), cuts=[9])


def test_a_twin_on_the_hub_converts_as_the_same_files_on_disk_do(
    model: Path, tmp_path: Path
) -> None:
    meta = {"consolidated.00.pth": b"not read", "params.json": b"{}"}
    with HubServer(tmp_path / "hub") as hub:
        hub.publish("org/model", meta)
        commit = hub.publish("org/model-hf", checkpoints.files(model))
        home = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url}
        online = run("convert", "org/model", "-o", str(tmp_path / "online"), *SETTINGS, **home)
    assert online.returncode == 0, online.stderr
    assert "using its twin org/model-hf" in online.stderr
    source = json.loads(online.stdout)["source"]
    assert (source["id"], source["revision"]) == ("org/model-hf", commit)
    assert source["resolved_from"] == "org/model"

    offline = run(
        *("convert", "org/model-hf", "-o", str(tmp_path / "offline"), "--offline", *SETTINGS),
        **home,
    )
    assert offline.returncode == 0, offline.stderr
    local = run("convert", str(model), "-o", str(tmp_path / "local"), *SETTINGS)
    assert local.returncode == 0, local.stderr
    outputs = [
        {
            name: content
            for name, content in checkpoints.files(tmp_path / where).items()
            if name != "loftq_manifest.json"
        }
        for where in ("online", "offline", "local")
    ]
    assert outputs[0] == outputs[1] == outputs[2]
    fingerprints = {
        json.loads((tmp_path / where / "loftq_manifest.json").read_text())["fingerprint"]
        for where in ("online", "offline", "local")
    }
    assert len(fingerprints) == 1


def test_a_repository_that_is_not_there_exits_with_5(tmp_path: Path) -> None:
    with HubServer(tmp_path / "hub") as hub:
        home = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url}
        result = run("convert", "org/none", "-o", str(tmp_path / "out"), **home)
    assert (result.returncode, result.stdout) == (5, "")
    (line,) = result.stderr.splitlines()
    assert "org/none" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("discard", [False, True])
def test_a_dry_run_says_what_would_be_downloaded_and_downloads_no_shard(
    server: HubServer, model: Path, cache: Path, loftq: Command, discard: bool
) -> None:
    commit = server.publish("org/model", checkpoints.files(model))
    words = ["--dry-run", *(["--discard-shards"] if discard else [])]
    result = loftq("convert", "org/model", "-o", "new", *words)
    assert result.exit_code == 0, result.stderr
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("  download ")]
    assert "kB in 2 files to " in line
    place = f".new.loftq-partial/shards/{commit}" if discard else f"{cache}/models--org--model"
    assert place in line
    assert not [name for name in server.downloads() if name.endswith(".safetensors")]
    assert not list(cache.rglob("*.safetensors"))


def test_statistics_are_measured_of_a_hub_model_and_kept(tmp_path: Path) -> None:
    directory = models.save_tokenizer(models.save(models.llama(), tmp_path / "model"))
    (tmp_path / "notes.txt").write_text("Nobody knew why the mill stood still. " * 40)
    words = ("--calibrate-text", str(tmp_path / "notes.txt"), *SETTINGS)
    with HubServer(tmp_path / "hub") as hub:
        hub.publish("org/model", checkpoints.files(directory))
        home = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url}
        online = run("convert", "org/model", "-o", str(tmp_path / "online"), *words, **home)
        again = run("convert", "org/model", "-o", str(tmp_path / "online"), *words, **home)
    assert online.returncode == 0, online.stderr
    assert "measured " in online.stderr
    assert again.returncode == 0, again.stderr
    assert "nothing to do" in again.stderr
    local = run("convert", str(directory), "-o", str(tmp_path / "local"), *words)
    assert local.returncode == 0, local.stderr
    ours, theirs = (json.loads(result.stdout) for result in (online, local))
    assert ours["outputs"] == theirs["outputs"]
    assert all(matrix["weighted"]["kind"] == "full" for matrix in ours["matrices"])
