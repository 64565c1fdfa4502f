"""Conversions and adapters on the hub: everywhere that a directory is named, an id will do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

import loftq_cli
from loftq_cli.errors import EnvironmentFailure, SourceNotFoundError
from tests.support import checkpoints, models
from tests.support.commands import Command
from tests.support.hub_fixtures import cache, server
from tests.support.hub_server import HubServer

__all__ = ["cache", "server"]

# What the client itself does where it sends files without hf_xet, and PEFT's question to it.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning"),
]

REPO = "me/small"
LAYOUT: dict[str, Any] = {"layout": "loftq", "bits": 3, "rank": 4, "iters": 1, "threads": 1}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hub-output")
    models.save(models.llama(), directory / "source")
    loftq_cli.convert(directory / "source", directory / "made", **LAYOUT)
    return directory


@pytest.fixture
def made(converted: Path, place: Path) -> Path:
    return Path(shutil.copytree(converted / "made", place / "made"))


@pytest.fixture
def pushed(
    server: HubServer, made: Path, loftq: Command, monkeypatch: pytest.MonkeyPatch
) -> HubServer:
    """The hub, to which the conversion was sent."""
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    result = loftq("push", "made", REPO)
    assert result.exit_code == 0, result.stderr
    server.requests.clear()
    return server


def weights(server: HubServer) -> list[str]:
    return [name for name in server.downloads() if name.endswith(".safetensors")]


def test_reports_take_an_id_and_need_no_weights(
    pushed: HubServer, loftq: Command, cache: Path
) -> None:
    commit = pushed.repositories[REPO].refs["main"]
    shown = loftq("inspect", REPO)
    assert shown.exit_code == 0, shown.stderr
    assert f"{REPO} at {commit}" in shown.stdout
    assert f"from_pretrained('{REPO}')" in shown.stdout
    found, local = (json.loads(loftq("inspect", x, "--json").stdout) for x in (REPO, "made"))
    assert found["repository"] == {"repo_id": REPO, "revision": commit}
    assert Path(found["directory"]) == cache / "models--me--small/snapshots" / commit
    for each in (found, local):  # the adapter's config has the repository's id
        each["totals"].pop("output_bytes")
    own = ("directory", "repository", "loading")
    assert {**found, **dict.fromkeys(own)} == {**local, **dict.fromkeys(own)}
    report, local = (json.loads(loftq("error-report", x, "--json").stdout) for x in (REPO, "made"))
    assert report["layers"] == local["layers"]
    assert weights(pushed) == []


def test_verifying_and_recomputing_bring_everything(
    pushed: HubServer, loftq: Command, converted: Path
) -> None:
    result = loftq("inspect", REPO, "--verify")
    assert result.exit_code == 0, result.stderr
    assert "files match the manifest" in result.stdout
    assert len(weights(pushed)) == 2
    result = loftq("error-report", REPO, "--source", str(converted / "source"))
    assert result.exit_code == 0, result.stderr
    assert len(weights(pushed)) == 2


def test_a_revision_is_one_commit(pushed: HubServer, loftq: Command, made: Path) -> None:
    assert loftq("push", "made", REPO, "--revision", "other").exit_code == 0
    commit = pushed.repositories[REPO].refs["other"]
    result = loftq("inspect", REPO, "--revision", "other")
    assert f"{REPO} at {commit}" in result.stdout
    assert f"from_pretrained('{REPO}', revision='other')" in result.stdout
    result = loftq("inspect", REPO, "--revision", "none")
    assert result.exit_code == 5
    assert f"{REPO} has no revision 'none'" in result.stderr


def test_merging_by_id_is_merging_the_files(pushed: HubServer, loftq: Command, made: Path) -> None:
    assert loftq("merge", "made", "-o", "local").exit_code == 0
    result = loftq("merge", REPO, "-o", "merged")
    assert result.exit_code == 0, result.stderr
    expected, found = checkpoints.files(Path("local")), checkpoints.files(Path("merged"))
    assert found == expected


def test_an_adapter_on_the_hub_is_merged(pushed: HubServer, loftq: Command, made: Path) -> None:
    pushed.publish("me/lora", checkpoints.files(made / "loftq_init"))
    assert loftq("merge", "made", "-o", "local").exit_code == 0
    result = loftq("merge", REPO, "-o", "merged", "--adapter", "me/lora", "--json")
    assert result.exit_code == 0, result.stderr
    assert "models--me--lora" in json.loads(result.stdout)["adapter"]
    assert checkpoints.files(Path("merged")) == checkpoints.files(Path("local"))
    again = loftq("merge", REPO, "-o", "again", "--adapter", "me/lora", "--offline")
    assert again.exit_code == 0, again.stderr


def test_a_model_is_loaded_by_its_id(pushed: HubServer, made: Path) -> None:
    tokens = torch.arange(12).view(2, 6) + 3
    expected = loftq_cli.load("made").eval()(tokens).logits
    model = loftq_cli.load(REPO).eval()
    assert torch.equal(model(tokens).logits, expected)
    config = model.active_peft_config
    commit = pushed.repositories[REPO].refs["main"]
    assert (config.base_model_name_or_path, config.revision) == (REPO, commit)
    pushed.requests.clear()
    offline = loftq_cli.load(REPO, local_files_only=True).eval()
    assert torch.equal(offline(tokens).logits, expected)
    assert pushed.requests == []


def test_offline_takes_what_is_in_the_cache(pushed: HubServer, loftq: Command) -> None:
    result = loftq("inspect", REPO, "--offline")
    assert result.exit_code == 5
    assert "is not in the hub cache" in result.stderr
    assert loftq("inspect", REPO).exit_code == 0
    pushed.requests.clear()
    assert loftq("inspect", REPO, "--offline").exit_code == 0
    assert loftq_cli.error_report(REPO, offline=True)["layers"]
    result = loftq("merge", REPO, "-o", "merged", "--offline")
    assert result.exit_code == 5
    assert f"{REPO} is not complete in the hub cache; missing: " in result.stderr
    assert "model.safetensors" in result.stderr
    assert pushed.requests == []


def test_the_environment_can_say_offline_too(
    pushed: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EnvironmentFailure, match="not in the hub cache"):
        loftq_cli.load(REPO)
    assert pushed.requests == []


def test_what_is_there_as_a_directory_is_taken_from_there(
    pushed: HubServer, made: Path, loftq: Command
) -> None:
    shutil.copytree(made, REPO)
    assert json.loads(loftq("inspect", REPO, "--json").stdout)["repository"] is None
    shutil.rmtree(REPO)
    with pytest.raises(SourceNotFoundError, match="no such directory"):
        loftq_cli.inspect(Path(REPO))  # a Path is a path
    Path("me/.small.loftq-partial").mkdir()
    assert "is not finished" in loftq("inspect", REPO).stderr
    assert pushed.requests == []


def test_a_source_is_read_at_the_commit_that_was_converted(
    server: HubServer, loftq: Command, converted: Path
) -> None:
    files = checkpoints.files(converted / "source")
    server.publish("org/model", files)
    assert loftq("convert", "org/model", "-o", "out", "--rank", "4", "--iters", "1").exit_code == 0
    other = checkpoints.write(Path("other"), checkpoints.llama())
    server.publish("org/model", checkpoints.files(other))
    result = loftq("error-report", "out", "--source", "org/model")
    assert result.exit_code == 0, result.stderr


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"config.json": b"{}", "model.safetensors": b""}, "a model, and not a conversion"),
        ({"adapter_config.json": b"{}"}, "a PEFT adapter"),
        ({"a.gguf": b"", "b.txt": b""}, "it holds 'a.gguf', 'b.txt'"),
        ({".gitattributes": b""}, "it is empty"),
    ],
)
def test_a_repository_without_a_conversion_says_what_it_is(
    files: dict[str, bytes], said: str, server: HubServer, loftq: Command
) -> None:
    server.publish("me/other", files)
    for words in (("inspect",), ("error-report",), ("merge", "-o", "merged")):
        result = loftq(words[0], "me/other", *words[1:])
        assert (result.exit_code, result.stdout) == (3, "")
        (line,) = result.stderr.splitlines()
        assert f"me/other has no loftq_manifest.json at this revision: {said}" in line


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"loftq_manifest.json": b"{}"}, "a conversion, and not an adapter"),
        ({"adapter_config.json": b"{}", "adapter_model.bin": b""}, "only pickled weights"),
        ({"adapter_config.json": b"{}"}, "me/other has no adapter_model.safetensors"),
    ],
)
@pytest.mark.usefixtures("made")
def test_a_repository_without_an_adapter_says_what_it_is(
    files: dict[str, bytes], said: str, server: HubServer, loftq: Command
) -> None:
    server.publish("me/other", files)
    result = loftq("merge", "made", "-o", "merged", "--adapter", "me/other")
    assert (result.exit_code, result.stdout) == (3, "")
    assert said in result.stderr


def test_a_manifest_that_leads_to_what_is_not_there(
    pushed: HubServer, made: Path, loftq: Command
) -> None:
    files = checkpoints.files(made)
    del files["model.safetensors"]
    pushed.publish(REPO, files)
    assert loftq("inspect", REPO).exit_code == 0
    result = loftq("merge", REPO, "-o", "merged")
    assert result.exit_code == 3
    assert "leads to files that are not there: 'model.safetensors'" in result.stderr


def test_what_is_neither_a_directory_nor_a_repository(server: HubServer, loftq: Command) -> None:
    for words in (("inspect",), ("error-report",), ("merge", "-o", "merged")):
        result = loftq(words[0], "me/nothing", *words[1:])
        assert (result.exit_code, result.stdout) == (5, "")
        (line,) = result.stderr.splitlines()
        assert f"there is no directory me/nothing; as a hub id: {server.url} has no model" in line
    # One word is never an id: what `loftq push` sends to has an owner.
    assert loftq("inspect", "nothing").exit_code == 3
