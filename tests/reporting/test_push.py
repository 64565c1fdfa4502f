"""Sending a conversion to the hub, with the real client and a hub on 127.0.0.1."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

import loftq_cli
from loftq_cli.checkpoint.output import open_output
from loftq_cli.errors import (
    EnvironmentFailure,
    OutputConflictError,
    SourceNotFoundError,
    UsageError,
    VerificationError,
)
from loftq_cli.reporting import evaluations, summary
from loftq_cli.reporting.page.picture import PICTURE, picture
from loftq_cli.reporting.push import push
from tests.reporting.test_compare import FOUND
from tests.support import checkpoints
from tests.support.hub_fixtures import cache, nobody, server
from tests.support.hub_server import HubServer

__all__ = ["cache", "nobody", "server"]

# What the client itself does where it sends files without hf_xet.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")

REPO = "me/small"
BASE = "org/model"
QUICK: dict[str, Any] = {"bits": 2, "rank": 4, "iters": 2, "threads": 1}


@pytest.fixture(scope="module")
def _made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("push")
    model = checkpoints.write(directory / "model", checkpoints.llama(layers=2), cuts=(9,))
    (model / "modules.json").write_text('[{"path": "1_Dense"}]')
    checkpoints.write(model / "1_Dense", {"linear.weight": torch.zeros(4, 64)}, {})
    loftq_cli.convert(model, directory / "out", **QUICK)
    return directory


@pytest.fixture
def out(_made: Path, tmp_path: Path) -> Path:
    """A conversion of a directory, in two shards."""
    return Path(shutil.copytree(_made / "out", tmp_path / "out"))


@pytest.fixture
def from_hub(out: Path) -> Path:
    """The same, of a model on the hub."""
    path = out / "loftq_manifest.json"
    manifest = json.loads(path.read_text())
    manifest["source"] |= {"id": BASE, "revision": "c0ffee"}
    path.write_text(json.dumps(manifest))
    return out


@pytest.fixture(autouse=True)
def _token(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    server.writer = "hf_write"


@pytest.fixture(autouse=True)
def _picture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes seconds: once is enough."""
    if "drawn" not in request.keywords:
        monkeypatch.setattr("loftq_cli.reporting.push.picture", lambda output: "<svg/>")


@pytest.fixture(params=["xet", "lfs"])
def way(request: pytest.FixtureRequest, server: HubServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """How files are sent: the client's pipeline, with all files small enough for the commit itself,
    or (without the package hf_xet) large ones as git LFS objects."""
    way: str = request.param
    server.regular = way == "xet"
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", way == "lfs")
    return way


def silent(line: str) -> None:
    raise AssertionError(f"said: {line}")


def sent(server: HubServer, revision: str = "main") -> dict[str, bytes]:
    files = server.files(REPO, revision)
    files.pop(".gitattributes")
    return files


def card(server: HubServer) -> Any:
    return huggingface_hub.ModelCard(sent(server)["README.md"].decode())


def test_all_files_and_a_card_arrive(server: HubServer, way: str, from_hub: Path) -> None:
    before = checkpoints.files(from_hub)
    result = push(from_hub, REPO, say=silent)
    files = sent(server)
    assert set(files) == {*before, "README.md", PICTURE}
    assert {"1_Dense/config.json", "1_Dense/model.safetensors"} <= set(files)
    changed = {"loftq_init/adapter_config.json", "loftq_manifest.json"}
    assert {name: data for name, data in files.items() if before.get(name) != data}.keys() == {
        *changed,
        "README.md",
        PICTURE,
    }
    assert checkpoints.files(from_hub) == before
    assert bool(server.objects) == (way == "lfs")
    assert result == {
        "repo_id": REPO,
        "url": f"{server.url}/{REPO}",
        "revision": "main",
        "commit": server.repositories[REPO].refs["main"],
        "private": False,
        "files": len(before) + 2,
        "bytes": sum(map(len, before.values())) - len(before["loftq_manifest.json"]),
    }


@pytest.mark.parametrize("revision", [None, "two-bits"])
def test_the_adapter_says_where_its_backbone_is(
    server: HubServer, out: Path, tmp_path: Path, revision: str | None
) -> None:
    push(out, REPO, revision=revision, say=lambda line: None)
    files = sent(server, revision or "main")
    before = json.loads((out / "loftq_init/adapter_config.json").read_text())
    config = json.loads(files["loftq_init/adapter_config.json"])
    assert config == {**before, "base_model_name_or_path": REPO, "revision": revision}
    there = tmp_path / "there"
    for name, data in files.items():
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_bytes(data)
    loftq_cli.inspect(there, verify=True)


def test_the_card_makes_it_a_quantization_and_an_adapter_of_its_base(
    server: HubServer, from_hub: Path
) -> None:
    manifest = json.loads((from_hub / "loftq_manifest.json").read_text())
    push(from_hub, REPO, say=silent)
    found = card(server)
    assert found.data.base_model == BASE
    assert found.data.to_dict()["base_model_relation"] == "quantized"
    assert found.data.library_name == "transformers"
    tags = ["loftq", "lora", "peft", "2-bit", f"base_model:adapter:{BASE}"]
    assert found.data.tags == tags
    text = found.text
    assert f"`{BASE}` at `c0ffee`" in text
    assert f"from_pretrained('{REPO}')" in text
    assert f"PeftModel.from_pretrained(model, '{REPO}', subfolder=\"loftq_init\"" in text
    totals = manifest["totals"]
    assert f"{totals['bits_per_weight']:.3f} stored" in text
    assert f"| {totals['relative_residual']:.4f} with the adapter" in text
    for setting in ("bits", "rank", "iters", "method", "block_size", "seed"):
        assert f"| `{setting}` | `{manifest['recipe'][setting]}` |" in text
    worst = max(
        manifest["matrices"], key=lambda m: m["frobenius"]["final"] / m["frobenius"]["weight"]
    )
    assert f"| `{worst['name']}` | 2 | 4 |" in text


def test_the_card_shows_a_strip_for_each_kind_of_layer(server: HubServer, from_hub: Path) -> None:
    push(from_hub, REPO, say=silent)
    text = card(server).text
    strips = text.split("## Residuals")[1].split("```")[1].strip().splitlines()
    kinds = summary.kinds(loftq_cli.inspect(from_hub)["layers"])
    between = summary.bounds(kinds)
    assert [line.split() for line in strips] == [
        [kind.name, summary.strip(kind.depth, between)] for kind in kinds
    ]
    assert f"▁ is {between[0]:.4f}, █ is {between[1]:.4f}" in text
    assert f"]({PICTURE})" in text
    assert "## Evaluation" not in text


def test_the_card_tells_what_was_evaluated_of_the_start(server: HubServer, from_hub: Path) -> None:
    evaluations.save(from_hub, FOUND)
    evaluations.save(from_hub, {**FOUND, "adapter": "trained", "perplexity": 3.0})
    push(from_hub, REPO, say=silent)
    table = card(server).text.split("## Evaluation")[1].split("##")[0]
    assert "| 4 windows of 16 tokens | 21.5 | 20.25 | 0.1250 | 75.0% |" in table
    assert "| 3 |" not in table
    assert evaluations.FILE not in sent(server)


@pytest.mark.drawn
def test_the_picture_has_residuals_and_evaluation(from_hub: Path) -> None:
    pytest.importorskip("vl_convert", reason='pip install "loftq-cli[report]"')
    evaluations.save(from_hub, FOUND)
    drawing = picture(open_output(from_hub))
    root = ElementTree.fromstring(drawing)
    texts = {element.text for element in root.iter("{http://www.w3.org/2000/svg}text")}
    kinds = {kind.name for kind in summary.kinds(loftq_cli.inspect(from_hub)["layers"])}
    assert kinds | {"this model", "the original", "block"} <= texts
    assert "Perplexity on 4 windows of 16 tokens" in texts
    assert "var(" not in drawing  # which names nothing outside of our pages
    assert len(drawing) < 100_000


def test_without_the_extra_the_card_does_without_a_picture(
    server: HubServer, from_hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loftq_cli.reporting.push.picture", picture)
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    said: list[str] = []
    push(from_hub, REPO, say=said.append)
    assert said == ['the card has no picture: pip install "loftq-cli[report]"']
    assert PICTURE not in sent(server)
    assert "![" not in card(server).text


def test_the_loading_snippet_is_python(server: HubServer, from_hub: Path) -> None:
    push(from_hub, REPO, say=silent)
    snippet = card(server).text.split("```python\n")[1].split("```")[0]
    compile(snippet, "snippet", "exec")


def test_a_directory_is_no_base_model(server: HubServer, out: Path) -> None:
    said: list[str] = []
    push(out, REPO, say=said.append)
    assert len(said) == 1
    assert "names no base model" in said[0]
    found = card(server)
    assert found.data.base_model is None
    assert not [tag for tag in found.data.tags or [] if "base_model" in tag]
    assert str(out.parent) not in found.text


def test_what_else_lies_in_the_directory_stays_at_home(server: HubServer, from_hub: Path) -> None:
    (from_hub / "checkpoint-100").mkdir()
    (from_hub / "checkpoint-100/optimizer.pt").write_bytes(b"mine")
    (from_hub / ".env").write_text("SECRET=1")
    push(from_hub, REPO, say=silent)
    assert not [name for name in sent(server) if "checkpoint" in name or ".env" in name]


def test_again_sends_nothing(server: HubServer, way: str, from_hub: Path) -> None:
    first = push(from_hub, REPO, say=silent)
    server.requests.clear()
    assert push(from_hub, REPO, say=silent) == first
    assert not [path for _, path in server.requests if "/commit/" in path]


def test_an_upload_that_broke_off_goes_on(
    server: HubServer, from_hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.regular = False
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    server.refuse = {"/commit/": [500]}
    with pytest.raises(EnvironmentFailure, match="answered 500") as caught:
        push(from_hub, REPO, say=silent)
    assert "goes on" in caught.value.hint
    uploaded = dict(server.objects)
    assert uploaded
    puts = len([path for method, path in server.requests if method == "PUT"])
    push(from_hub, REPO, say=silent)
    assert len([path for method, path in server.requests if method == "PUT"]) == puts
    assert "loftq_manifest.json" in sent(server)


def test_private_and_a_branch(server: HubServer, from_hub: Path) -> None:
    result = push(from_hub, REPO, private=True, revision="two-bits", say=silent)
    assert server.repositories[REPO].private
    assert (result["private"], result["revision"]) == (True, "two-bits")
    assert "loftq_manifest.json" in sent(server, "two-bits")
    assert sent(server) == {}


def test_private_is_not_promised_where_it_is_public(server: HubServer, from_hub: Path) -> None:
    server.publish(REPO, {".gitattributes": b""})
    with pytest.raises(OutputConflictError, match="it is public"):
        push(from_hub, REPO, private=True, say=silent)
    assert sent(server) == {}


def test_weights_of_something_else_are_not_mixed_with_ours(
    server: HubServer, from_hub: Path
) -> None:
    theirs = {".gitattributes": b"", "model.safetensors": b"theirs", "config.json": b"{}"}
    server.publish(REPO, theirs)
    with pytest.raises(OutputConflictError, match=r"something else: model\.safetensors"):
        push(from_hub, REPO, say=silent)
    assert server.files(REPO) == theirs


@pytest.mark.parametrize("to_disable", [False, True])
def test_shards_of_an_earlier_conversion_are_replaced(
    server: HubServer, from_hub: Path, monkeypatch: pytest.MonkeyPatch, to_disable: bool
) -> None:
    # transformers would prefer the single file, and load the old weights.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", to_disable)
    earlier = {"model.safetensors": b"old", "loftq_manifest.json": b"{}", "notes.md": b"mine"}
    server.publish(REPO, {".gitattributes": b"", **earlier})
    push(from_hub, REPO, say=silent)
    files = sent(server)
    assert "model.safetensors" not in files
    assert "model.safetensors.index.json" in files
    assert files["notes.md"] == b"mine"


def test_what_is_not_finished_or_was_altered_is_not_sent(
    server: HubServer, from_hub: Path, tmp_path: Path
) -> None:
    (tmp_path / ".other.loftq-partial").mkdir()
    with pytest.raises(SourceNotFoundError, match="not finished"):
        push(tmp_path / "other", REPO, say=silent)
    (from_hub / "config.json").write_text("{}")
    with pytest.raises(VerificationError, match=r"config\.json"):
        push(from_hub, REPO, say=silent)
    assert server.requests == []


def test_a_malformed_id(server: HubServer, from_hub: Path) -> None:
    with pytest.raises(UsageError, match="not a hub id"):
        push(from_hub, "a/b/c", say=silent)


def test_without_a_token(
    server: HubServer, from_hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(EnvironmentFailure, match="there is no token") as caught:
        push(from_hub, REPO, say=silent)
    assert "hf auth login" in caught.value.hint
    assert server.requests == []


def test_with_a_wrong_token(
    server: HubServer, from_hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_read")
    with pytest.raises(EnvironmentFailure, match="answered 401") as caught:
        push(from_hub, REPO, say=silent)
    assert "token" in caught.value.hint


def test_a_token_without_the_right(server: HubServer, from_hub: Path) -> None:
    server.refuse = {"/repos/create": [403] * 3}
    with pytest.raises(EnvironmentFailure, match="answered 403"):
        push(from_hub, REPO, say=silent)


def test_offline_and_no_network(
    server: HubServer, from_hub: Path, monkeypatch: pytest.MonkeyPatch, nobody: str
) -> None:
    with monkeypatch.context() as patches:
        patches.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(EnvironmentFailure, match="HF_HUB_OFFLINE"):
            push(from_hub, REPO, say=silent)
    monkeypatch.setattr(constants, "ENDPOINT", nobody)
    with pytest.raises(EnvironmentFailure, match="could not be sent to"):
        push(from_hub, REPO, say=silent)
