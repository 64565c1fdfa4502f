"""``loftq adapt`` as it is typed, and what the other commands make of what it wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import loftq_cli
from tests.support import awq, checkpoints, given, models
from tests.support.commands import Command
from tests.support.hub_fixtures import cache, server
from tests.support.hub_server import HubServer

__all__ = ["cache", "server"]

WORDS = ("--source", "model", "--rank", "4", "-t", "1")


@pytest.fixture
def backbone(place: Path) -> Path:
    """Somebody else's GPTQ checkpoint of ``model``."""
    return given.quantized(place / "model", place / "theirs", "gptq", block_size=32)


def test_every_option_that_is_no_setting(backbone: Path, loftq: Command) -> None:
    words = ("theirs", *WORDS, "--output", "out", "--json", "--quiet", "--offline", "-q")
    dry = loftq("adapt", *words, "--dry-run")
    assert dry.exit_code == 0, dry.stderr
    plan = json.loads(dry.stdout)
    assert {each["layout"] for each in plan["selected"]} == {"given"}
    assert not (backbone.parent / "out").exists()
    shown = loftq("adapt", "theirs", *WORDS, "-o", "out", "-v", "--log-file", "log.txt")
    assert shown.exit_code == 0, shown.stderr
    assert "names the path" in (backbone.parent / "log.txt").read_text()
    assert "residual" in shown.stdout
    assert "names the path" in shown.stderr
    again = loftq("adapt", "theirs", *WORDS, "-o", "out")
    assert "nothing to do" in again.stderr
    other = loftq("adapt", "theirs", *WORDS, "-o", "out", "--seed", "3")
    assert (other.exit_code, "--overwrite" in other.stderr) == (4, True)
    replaced = loftq("adapt", *words, "--seed", "3", "--overwrite", "--with-backbone")
    assert replaced.exit_code == 0, replaced.stderr
    assert json.loads(replaced.stdout)["recipe"]["backbone"] == "held"
    for option in ("--revision", "--source-revision"):
        refused = loftq("adapt", "theirs", *WORDS, "-o", "new", option, "main")
        assert (refused.exit_code, "is for what lies on the hub" in refused.stderr) == (2, True)


def test_statistics_that_are_named_are_looked_for(backbone: Path, loftq: Command) -> None:
    words = ("theirs", *WORDS, "-o", "out", "--stats", "nowhere", "--verbose", "--dry-run")
    result = loftq("adapt", *words)
    assert (result.exit_code, "nowhere: no such file" in result.stderr) == (3, True)


def test_one_line_without_a_source(backbone: Path, loftq: Command) -> None:
    result = loftq("adapt", "theirs", "-o", "out")
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert "without the original there is nothing to correct" in line


def test_what_is_the_quantizer_s_is_no_option(backbone: Path, loftq: Command) -> None:
    assert "No such option" in loftq("adapt", "theirs", *WORDS, "-o", "o", "--bits", "2").stderr


def test_reports_read_an_adapter_alone_and_others_say_what_is_missing(
    backbone: Path, loftq: Command
) -> None:
    assert loftq("adapt", "theirs", *WORDS, "-o", "out", "-q").exit_code == 0
    told = json.loads(loftq("inspect", "out", "--verify", "--json").stdout)
    assert told["backbone"]["id"] == "theirs"
    assert "PeftModel.from_pretrained(model, 'out'" in told["loading"]
    assert "trained_adapter" not in told
    assert loftq("error-report", "out").exit_code == 0
    for words in (
        ("merge", "out", "-o", "x"),
        ("export", "out", "-o", "x", "--layout", "dense"),
        ("export", "out", "-o", "x", "--layout", "mlx"),
        ("evaluate", "out", "--text", "model/config.json"),
        ("error-report", "out", "--source", "model"),
        ("refine", "out", "--source", "model", "--text", "model/config.json", "-o", "x"),
    ):
        result = loftq(*words)
        (line,) = result.stderr.splitlines()
        assert (result.exit_code, "an adapter without its backbone" in line) == (2, True), words


def test_with_the_backbone_reports_merge_and_export(backbone: Path, loftq: Command) -> None:
    result = loftq("adapt", "theirs", *WORDS, "-o", "out", "--with-backbone", "-q")
    assert result.exit_code == 0, result.stderr
    assert loftq("inspect", "out", "--verify").exit_code == 0
    assert loftq("error-report", "out", "--source", "model").exit_code == 0
    for words in (
        ("merge", "out", "-o", "merged"),
        ("export", "out", "-o", "e", "--layout", "dense"),
    ):
        assert loftq(*words).exit_code == 0, words
    place = backbone.parent
    name = next(n for n in load_file(place / "merged/model.safetensors") if "q_proj" in n)
    held, whole = (load_file(place / f"{f}/model.safetensors")[name] for f in ("e", "merged"))
    adapter = load_file(place / "out/loftq_init/adapter_model.safetensors")
    module = f"base_model.model.{name.removesuffix('.weight')}"
    product = adapter[f"{module}.lora_B.weight"] @ adapter[f"{module}.lora_A.weight"]
    assert torch.allclose(held + product, whole, atol=1e-6)
    refused = loftq("export", "out", "-o", "x", "--layout", "awq")
    assert (refused.exit_code, "not in codes of a method here" in refused.stderr) == (2, True)


def test_what_was_left_in_codes_is_not_merged(backbone: Path, loftq: Command) -> None:
    words = (
        "theirs",
        *WORDS,
        "--with-backbone",
        "-o",
        "out",
        "--exclude",
        "*.0.self_attn.q_proj.*",
    )
    assert loftq("adapt", *words).exit_code == 0
    result = loftq("merge", "out", "-o", "whole")
    said = "model.layers.0.self_attn.q_proj.weight is in codes and has no adapter"
    assert (result.exit_code, said in result.stderr) == (3, True), result.stderr


def test_an_adapter_is_sent_alone_and_names_its_backbone(
    server: HubServer, backbone: Path, loftq: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    words = ("theirs", *WORDS, "--base-model", "them/model-gptq", "-q")
    for held in (["-o", "alone"], ["-o", "both", "--with-backbone"]):
        assert loftq("adapt", *words, *held).exit_code == 0
        name = held[1]
        assert loftq("push", name, f"me/{name}").exit_code == 0
    files = server.files("me/alone", "main")
    assert files.keys() == server.files("me/both", "main").keys()
    assert {"adapter_config.json", "adapter_model.safetensors"} < files.keys()
    assert not any(name.startswith("model") for name in files)
    card = files["README.md"].decode()
    assert "base_model: them/model-gptq\n" in card
    assert "base_model_relation: adapter\n" in card
    config = json.loads(files["adapter_config.json"])
    assert config["base_model_name_or_path"] == "them/model-gptq"
    manifest = json.loads(server.files("me/both", "main")["loftq_manifest.json"])
    assert {entry["name"] for entry in manifest["outputs"]} < files.keys()


@pytest.mark.filterwarnings("ignore")  # of what loads the backbone
def test_a_backbone_that_transformers_cannot_load_is_decoded(
    place: Path, loftq: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluated and refined as its values, and its files are left as they are."""
    source = models.save(models.llama(), place / "source")
    models.save_tokenizer(source)
    tensors, stated = given.int8(load_file(source / "model.safetensors"))
    theirs = given.of(source, place / "theirs", tensors, {**stated, "quant_method": "nobody's"})
    (place / "text.txt").write_text("Nobody knew why the mill stood still. " * 60)
    words = ("--source", "source", "--calibrate-text", "text.txt", "--moments", "full")
    made = loftq("adapt", "theirs", *words, "--rank", "4", "-o", "out", "--with-backbone", "-q")
    assert made.exit_code == 0, made.stderr
    few = ("--text", "text.txt", "--source", "source", "--length", "32")
    told = loftq("evaluate", "out", *few, "--samples", "4", "--json", "-q")
    assert told.exit_code == 0, told.stderr
    found = json.loads(told.stdout)
    assert found["kl"] < 1e-3
    refined = loftq("refine", "out", *few, "--samples", "8", "--epochs", "1", "-o", "new", "-q")
    assert refined.exit_code == 0, refined.stderr
    for name in ("model.safetensors", "config.json"):
        assert (place / "new" / name).read_bytes() == (theirs / name).read_bytes()
    assert loftq_cli.inspect(place / "new", verify=True)["refined"]["blocks"]
    assert checkpoints.files(place / "new").keys() == checkpoints.files(place / "out").keys()


def test_a_backbone_that_was_rescaled_in_every_command(place: Path, loftq: Command) -> None:
    """Awq's: reports agree with the source, what is merged is the source's, refined files stay."""
    source = models.save(models.llama(hidden=128, intermediate=256), place / "source")
    models.save_tokenizer(source)
    made = awq.rescaled(load_file(source / "model.safetensors"), awq.GATED)
    awq.checkpoint(source, place / "theirs", made, torch.float32)
    (place / "text.txt").write_text("Nobody knew why the mill stood still. " * 60)
    words = ("theirs", "--source", "source", "--with-backbone", "-t", "1")
    measured = ("--calibrate-text", "text.txt", "--moments", "full")
    made_by = loftq("adapt", *words, *measured, "--rank", "8", "-o", "out")
    assert made_by.exit_code == 0, made_by.stderr
    assert "the backbone was rescaled: 12 of 14 matrices" in made_by.stderr
    stats = ("--stats", "out.stats.safetensors")
    assert loftq("error-report", "out", "--source", "source", *stats).exit_code == 0
    assert loftq("inspect", "out", "--verify").exit_code == 0
    assert loftq("adapt", *words, "--rank", "128", "-o", "full", "-q").exit_code == 0
    merged = loftq("merge", "full", "-o", "merged")
    assert merged.exit_code == 0, merged.stderr
    ids = torch.arange(4, 44)[None]
    whole, original = (
        transformers.AutoModelForCausalLM.from_pretrained(place / name, dtype=torch.float32)(ids)
        for name in ("merged", "source")
    )
    assert torch.allclose(whole.logits, original.logits, atol=1e-4)
    dense = loftq("export", "out", "-o", "dense", "--layout", "dense")
    assert dense.exit_code == 0, dense.stderr
    assert loftq("error-report", "dense", "--source", "source").exit_code == 0
    few = ("--text", "text.txt", "--source", "source", "--length", "32", "--samples", "8")
    refined = loftq("refine", "out", *few, "--epochs", "1", "-o", "new", "-q")
    assert refined.exit_code == 0, refined.stderr
    assert checkpoints.files(place / "new").keys() == checkpoints.files(place / "out").keys()
    assert loftq("error-report", "new", "--source", "source").exit_code == 0
    (place / "out/loftq_init/loftq_rescaling.safetensors").unlink()
    lost = loftq("error-report", "out", "--source", "source")
    assert (lost.exit_code, "loftq_rescaling.safetensors" in lost.stderr) == (3, True)
