"""``loftq convert``: its options, what it prints where, and its plan."""

from __future__ import annotations

import json
import re
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loftq_cli.checkpoint.hub import repository as hub
from loftq_cli.checkpoint.hub.listing import HubSnapshot
from loftq_cli.checkpoint.request import Request
from loftq_cli.cli.narrator import Narrator
from loftq_cli.conversion.prepare import prepare
from loftq_cli.conversion.run import run
from loftq_cli.settings.options import Options
from tests.support import checkpoints
from tests.support.commands import QUICK, Command, snapshot_of

MANIFEST_KEYS = {
    *("environment", "fingerprint", "format_version", "matrices", "outputs"),
    *("passed_through", "recipe", "source", "tool", "totals"),
}
PLAN_KEYS = {
    "left_behind",
    "download",
    *("disk_bytes", "fingerprint", "free_disk_bytes", "memory_bytes", "needs", "output"),
    *("passed_through", "recipe", "selected", "source", "totals"),
}
SELECTED_KEYS = {
    *("backbone_bytes", "bits", "bits_per_weight", "dtype", "layout", "method", "name"),
    *("rank", "reason", "shape", "source_bytes"),
}
PASSED_THROUGH_KEYS = {"bytes", "dtype", "name", "reason", "shape"}


def recipe(loftq: Command, *options: str) -> dict[str, Any]:
    result = loftq("convert", "./model", "--dry-run", "--json", *options)
    assert result.exit_code == 0, result.stderr
    return dict(json.loads(result.stdout)["recipe"])


@pytest.mark.parametrize(
    ("option", "value", "name", "expected"),
    [
        ("--bits", "3", "bits", 3),
        ("--method", "nf-symmetric", "method", "nf-symmetric"),
        ("--method", "uniform-tensor", "scale", "fixed"),
        ("--rank", "5", "rank", 5),
        ("--iters", "0", "iters", 0),
        ("--block-size", "32", "block_size", 32),
        ("--layout", "dense", "layout", "dense"),
        ("--scale", "absmax", "scale", "absmax"),
        ("--scale-dtype", "int8", "scale_dtype", "int8"),
        ("--order", "svd-first", "order", "svd-first"),
        ("--svd", "exact", "svd", "exact"),
        ("--preset", "paper", "keep", "last"),
        ("--include", "lm_head.*", "include", ["lm_head.*"]),
        ("--exclude", "*.q_proj.*", "exclude", ["*.q_proj.*"]),
        ("--bits", "2.5", "bits", 2.5),
        ("--bits-map", "*=2,*.q_proj.*=4", "bits_map", ["*=2", "*.q_proj.*=4"]),
        ("--rank-map", "*.q_proj.*=4", "rank_map", ["*.q_proj.*=4"]),
        ("--target-bpw", "3.5", "target_bpw", 3.5),
        ("--lora-alpha", "32", "lora_alpha", 32.0),
        ("--adapter-dtype", "float16", "adapter_dtype", "float16"),
        ("--dense-dtype", "bfloat16", "dense_dtype", "bfloat16"),
        ("--device", "cpu", "device", "cpu"),
        ("--threads", "1", "threads", 1),
        ("-t", "1", "threads", 1),
        ("--seed", "7", "seed", 7),
    ],
)
def test_every_setting_reaches_the_recipe(
    option: str, value: str, name: str, expected: object, loftq: Command
) -> None:
    assert recipe(loftq, option, value)[name] == expected


def test_patterns_can_be_repeated(loftq: Command) -> None:
    found = recipe(loftq, "--exclude", "*.q_proj.*", "--exclude", "*.k_proj.*")
    assert found["exclude"] == ["*.q_proj.*", "*.k_proj.*"]


def test_an_explicit_option_wins_over_the_preset(loftq: Command) -> None:
    found = recipe(loftq, "--preset", "paper", "--scale", "mse")
    assert (found["svd"], found["scale"]) == ("exact", "mse")


@pytest.mark.parametrize(
    "name",
    [
        *("bits", "rank", "iters", "block_size", "scale", "scale_dtype", "order", "svd", "seed"),
        "feedback_passes",
    ],
)
def test_the_help_states_the_defaults_that_hold(name: str, loftq: Command) -> None:
    text = " ".join(loftq("convert", "--help").stdout.split())
    flag = "--" + name.replace("_", "-")
    stated = re.search(rf"{flag} [A-Z\[].*?\[default: ([^\]]+)\]", text)
    assert stated is not None
    first, _, under_best = stated.group(1).partition(", or ")
    assert first == str(getattr(Options().resolve(), name))
    best = str(getattr(Options("best").resolve(), name))
    assert under_best == ("" if best == first else f"{best} under --preset best")


# Where things are printed


def test_the_summary_is_on_stdout_and_nothing_else_is_said(loftq: Command) -> None:
    result = loftq("convert", "model", *QUICK)
    assert result.exit_code == 0
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0] == "wrote out"
    assert lines[-1] == "next: loftq inspect out"
    for label in ("layout", "backbone", "adapter", "bits per weight", "residual", "peak memory"):
        assert any(line.strip().startswith(label) for line in lines)


def test_the_next_command_can_be_typed_as_it_is_printed(loftq: Command) -> None:
    result = loftq("convert", "model", "-o", "an output's place", *QUICK)
    command = result.stdout.splitlines()[-1]
    assert command == """next: loftq inspect 'an output'"'"'s place'"""


def test_json_is_the_manifest(loftq: Command) -> None:
    result = loftq("convert", "model", "--json", *QUICK)
    printed = json.loads(result.stdout)
    assert set(printed) == MANIFEST_KEYS
    assert printed == json.loads(Path("out/loftq_manifest.json").read_bytes())


def test_a_second_run_says_that_there_is_nothing_to_do(loftq: Command) -> None:
    loftq("convert", "model", *QUICK)
    result = loftq("convert", "model", *QUICK)
    assert result.exit_code == 0
    assert result.stderr == "loftq: nothing to do: out is complete and verified\n"
    assert "wrote" not in result.stdout
    assert loftq("convert", "model", "--quiet", *QUICK).stderr == ""


def test_overwrite_replaces_an_output_with_other_settings(loftq: Command) -> None:
    loftq("convert", "model", *QUICK)
    assert loftq("convert", "model", "--seed", "7", *QUICK).exit_code == 4
    assert loftq("convert", "model", "--seed", "7", "--overwrite", *QUICK).exit_code == 0
    assert json.loads(Path("out/loftq_manifest.json").read_bytes())["recipe"]["seed"] == 7


@pytest.mark.parametrize(("flag", "said"), [("-q", False), ("--quiet", False), (None, True)])
def test_remarks_are_on_stderr_and_quiet_silences_them(
    flag: str | None, said: bool, loftq: Command
) -> None:
    checkpoints.write(Path("odd"), checkpoints.llama(intermediate=96))
    result = loftq("convert", "odd", *QUICK, *([flag] if flag else []))
    assert result.exit_code == 0
    assert ("layout loftq, because bnb cannot hold" in result.stderr) == said
    assert "because" not in result.stdout


@pytest.mark.parametrize("flag", ["-v", "--verbose"])
def test_verbose_says_a_line_for_every_matrix(flag: str, loftq: Command) -> None:
    result = loftq("convert", "model", flag, *QUICK)
    lines = [line for line in result.stderr.splitlines() if "converted" in line]
    names = {line.removeprefix("loftq: ").split(":")[0] for line in lines}
    assert names == set(checkpoints.matrices(checkpoints.llama()))
    assert len(lines) == len(names)
    assert "converted" not in result.stdout


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("quiet", [False, True])
def test_a_terminal_gets_a_progress_bar_over_matrices(
    quiet: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    narrator = Narrator(quiet=quiet, verbose=False)
    options = Options(rank=4, iters=2, threads=1)
    plan, path = prepare(Request("./model"), "out", options, observer=narrator)
    run(plan, path, overwrite=False, observer=narrator)
    shown = terminal.getvalue()
    assert ("model.layers.0.self_attn.q_proj.weight" in shown) != quiet
    assert ("7 of 7 matrices" in shown) != quiet
    assert ("100%" in shown) != quiet


# The plan


def test_a_dry_run_writes_nothing(place: Path, loftq: Command) -> None:
    before = checkpoints.files(place)
    result = loftq("convert", "model", "--dry-run")
    assert result.exit_code == 0
    assert result.stdout.endswith("nothing was written (dry run)\n")
    assert checkpoints.files(place) == before
    assert [path.name for path in place.iterdir()] == ["model"]


def test_a_dry_run_shows_every_tensor_with_its_size_and_why(loftq: Command) -> None:
    words = ["--dry-run", "--include", "lm_head.*", "--exclude", "*.q_proj.*"]
    result = loftq("convert", "model", *words)
    lines = [line.strip() for line in result.stdout.splitlines() if ".weight" in line]
    rows = {line.split()[0]: line for line in lines}
    tensors = checkpoints.llama()
    assert set(rows) == set(tensors)
    query, key = (f"model.layers.0.self_attn.{side}_proj.weight" for side in "qk")
    assert rows[query].endswith("excluded by --exclude")
    assert rows[key].endswith("linear layer of a block")
    assert "64 x 64" in rows[key]
    assert "16.38 kB" in rows[key]  # 64 * 64 float32
    assert rows["lm_head.weight"].endswith("asked for by --include")
    assert rows["model.embed_tokens.weight"].endswith("embedding")
    assert rows["model.norm.weight"].endswith("1-dimensional")
    for label in ("memory", "disk", "bits per weight"):
        assert re.search(rf"^  {label} ", result.stdout, re.MULTILINE)


def test_a_dry_run_as_json(loftq: Command) -> None:
    plan = json.loads(loftq("convert", "model", "--dry-run", "--json").stdout)
    assert set(plan) == PLAN_KEYS
    assert {key for entry in plan["selected"] for key in entry} == SELECTED_KEYS
    assert {key for entry in plan["passed_through"] for key in entry} == PASSED_THROUGH_KEYS
    names = [entry["name"] for entry in plan["selected"] + plan["passed_through"]]
    assert sorted(names) == sorted(checkpoints.llama())


def test_the_plan_foretells_the_conversion(loftq: Command) -> None:
    plan = json.loads(loftq("convert", "model", "--dry-run", "--json", *QUICK).stdout)
    manifest = json.loads(loftq("convert", "model", "--json", *QUICK).stdout)
    assert plan["recipe"] == manifest["recipe"]
    assert plan["fingerprint"] == manifest["fingerprint"]
    assert plan["totals"].items() <= manifest["totals"].items()
    shards = [entry for entry in manifest["outputs"] if entry["name"].endswith(".safetensors")]
    assert plan["disk_bytes"] == sum(entry["size"] for entry in shards)


def test_a_dry_run_needs_only_headers(loftq: Command) -> None:
    shard = Path("model/model.safetensors")
    content = bytearray(shard.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[header:] = b"\xff" * (len(content) - header)  # every float is NaN
    shard.write_bytes(content)
    assert loftq("convert", "model", "--dry-run").exit_code == 0
    assert loftq("convert", "model").exit_code == 3


# The hub


@pytest.fixture
def asked(place: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A hub that has every model there is; what it was asked for."""
    calls: list[Any] = []

    def fetch(request: Request, say: object) -> HubSnapshot:
        calls.append((request.model, request.revision, request.offline))
        return snapshot_of(place / "model", f"{request.model}-hf", "c0ffee", request.model)

    monkeypatch.setattr(hub, "fetch", fetch)
    return calls


def test_what_is_no_path_is_a_hub_id(asked: list[Any], loftq: Command) -> None:
    result = loftq("convert", "owner/name", "--json", *QUICK)
    assert asked == [("owner/name", None, False)]
    source = json.loads(result.stdout)["source"]
    assert source["id"] == "owner/name-hf"
    assert source["revision"] == "c0ffee"
    assert source["resolved_from"] == "owner/name"


def test_revision_and_offline_are_handed_to_the_hub(asked: list[Any], loftq: Command) -> None:
    words = ["--revision", "v1.0", "--offline", "--dry-run"]
    assert loftq("convert", "owner/name", *words).exit_code == 0
    assert asked == [("owner/name", "v1.0", True)]


def test_what_exists_is_a_path_even_if_it_looks_like_a_hub_id(
    asked: list[Any], loftq: Command
) -> None:
    assert loftq("convert", "model", "--dry-run").exit_code == 0
    assert asked == []


def test_shards_of_a_directory_are_not_discarded(place: Path, loftq: Command) -> None:
    before = checkpoints.files(place)
    result = loftq("convert", "model", "--discard-shards")
    assert result.exit_code == 2
    assert "--discard-shards" in result.stderr
    assert checkpoints.files(place) == before


def test_word_embeddings_are_quantized_on_request(loftq: Command) -> None:
    result = loftq("convert", "model", "--embeddings", *QUICK)
    assert result.exit_code == 0, result.stderr
    assert "layout loftq, because bnb cannot hold model.embed_tokens.weight" in result.stderr
    manifest = json.loads(Path("out/loftq_manifest.json").read_text())
    kinds = {entry["name"]: entry.get("kind", "linear") for entry in manifest["matrices"]}
    assert kinds.pop("model.embed_tokens.weight") == "embedding"
    assert set(kinds.values()) == {"linear"}
    assert loftq("error-report", "--source", "model").exit_code == 0
    assert loftq("inspect", "--verify").exit_code == 0


def test_pickled_weights_are_read_where_they_are_allowed(loftq: Command) -> None:
    tensors = load_file("model/model.safetensors")
    torch.save(tensors, "model/pytorch_model.bin")
    Path("model/model.safetensors").unlink()
    refused = loftq("convert", "model", *QUICK)
    assert refused.exit_code == 3
    assert "--allow-pickle" in refused.stderr
    result = loftq("convert", "model", "--allow-pickle", *QUICK)
    assert result.exit_code == 0, result.stderr
    again = loftq("convert", "model", "--allow-pickle", *QUICK)
    assert "nothing to do" in again.stderr
