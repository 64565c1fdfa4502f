"""``loftq export``: what it takes, prints and refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import loftq_cli
from loftq_cli.cli.commands import main
from tests.support import checkpoints, gguf_files, models


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a conversion ``out`` and an adapter ``trained``."""
    source = checkpoints.write(tmp_path / "model", checkpoints.llama(hidden=64, intermediate=32))
    settings: dict[str, Any] = {"bits": 4, "method": "uniform", "block_size": 32, "threads": 1}
    loftq_cli.convert(source, tmp_path / "out", layout="gptq", rank=4, iters=1, **settings)
    shutil.copytree(tmp_path / "out/loftq_init", tmp_path / "trained")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: str) -> Any:
    return CliRunner().invoke(main, ["export", *words])


def test_what_it_writes_is_shown(place: Path) -> None:
    shown = run("-o", "one", "--layout", "compressed", "--adapter", "trained")
    assert shown.exit_code == 0, shown.output
    assert "matrices         7, exactly as in gptq" in shown.stdout
    assert "trained adapter  one/adapter" in shown.stdout
    assert sorted(path.name for path in (place / "one/adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_json_and_the_options_of_the_adapter(place: Path) -> None:
    words = ("--layout", "loftq", "--overwrite", "--pad-ranks", "--base-model", "me/it")
    told = run("out", "--output", "two", *words, "--json", "-q", "--offline")
    assert told.exit_code == 0, told.output
    keys = "adapter bytes directory from layout matrices merged output rank seconds"
    found = json.loads(told.stdout)
    assert sorted(found) == keys.split()
    assert (found["rank"], found["layout"], found["from"]) == (4, "loftq", ["gptq"])
    config = json.loads((place / "two/loftq_init/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "me/it"


def test_how_far_training_moved_and_codes_are_off_is_shown(place: Path) -> None:
    manifest = json.loads((place / "out/loftq_manifest.json").read_text())
    moments = {}
    for name in [record["name"] for record in manifest["matrices"]]:
        width = 32 if "down_proj" in name else 64
        moments[name] = loftq_cli.Moments(width, full=True)
        moments[name].add(torch.randn(200, width, generator=torch.Generator().manual_seed(1)))
    loftq_cli.save_statistics(place / "stats", moments)
    file = place / "trained/adapter_model.safetensors"
    save_file({name: tensor + 0.3 for name, tensor in load_file(file).items()}, file)
    words = ("--layout", "awq", "--adapter", "trained", "--merge")
    shown = run("-o", "one", *words)
    assert shown.exit_code == 0, shown.output
    assert "7, quantized again" in shown.stdout
    assert re.search(r"training moved +weights by \d+\.\d\d%", shown.stdout)
    assert re.search(r"the codes are off +weights by \d+\.\d\d%\n", shown.stdout)
    shown = run("-o", "two", *words, "--stats", "stats")
    assert re.search(r"training moved +outputs by \d+\.\d\d%", shown.stdout)
    assert re.search(r"off +outputs by \d+\.\d\d%, \d+\.\d\d% without feedback", shown.stdout)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--layout", "bnb", "--quiet"), 2, "bnb holds 4-bit nf, not 4-bit uniform"),
        (("--layout", "loftq", "--revision", "main"), 2, "--revision main is for what lies on"),
        (("--layout", "loftq", "--adapter", "model"), 3, "adapter_config.json"),
        (("--layout", "nothing"), 2, "nothing"),
        ((), 2, "--layout"),
    ],
)
def test_what_is_refused(place: Path, words: tuple[str, ...], code: int, said: str) -> None:
    refused = run("-o", "three", *words)
    assert (refused.exit_code, refused.stdout) == (code, "")
    assert said in " ".join(refused.stderr.split())
    assert not (place / "three").exists()


def test_verbose_shows_where_an_error_comes_from(place: Path) -> None:
    refused = run("-o", "three", "--layout", "bnb", "-v")
    assert "Traceback" in refused.stderr
    assert "Traceback" in run("-o", "three", "--layout", "bnb", "--verbose").stderr


def test_a_gguf_file_and_what_to_type_next_are_shown(place: Path) -> None:
    source = models.save(models.llama(), place / "llama")
    settings: dict[str, Any] = {"bits": 4, "method": "uniform-symmetric", "block_size": 32}
    loftq_cli.convert(source, place / "four", layout="compressed", rank=4, iters=1, **settings)
    gguf_files.skeleton(source, place / "f16.gguf", (4, 2))
    words = (
        "four",
        "-o",
        "served",
        "--layout",
        "gguf",
        "--skeleton",
        "f16.gguf",
        "--source",
        "llama",
    )
    shown = run(*words, "--strict", "--adapter", "four/loftq_init")
    assert shown.exit_code == 0, shown.output
    assert "matrices  14 in Q4_0" in shown.stdout
    assert "next: llama-server -m served/model.gguf --lora served/adapter.gguf" in shown.stdout
    told = run(*words, "--json", "--overwrite", "-q")
    keys = "adapter bytes directory fingerprint model output seconds skeleton tensors tool types"
    assert sorted(json.loads(told.stdout)) == keys.split()
    refused = run("four", "-o", "other", "--layout", "gguf", "--skeleton", "f16.gguf")
    assert refused.exit_code == 3
    assert "--source" in refused.stderr


def test_what_goes_to_mlx_lm_and_comes_back_is_shown(place: Path) -> None:
    settings: dict[str, Any] = {"bits": 4, "method": "uniform-symmetric", "block_size": 32}
    loftq_cli.convert("model", place / "four", layout="compressed", rank=4, iters=1, **settings)
    shown = run("four", "-o", "served", "--layout", "mlx")
    assert shown.exit_code == 0, shown.output
    assert "matrices  7, exactly" in shown.stdout
    assert "--resume-adapter-file served/adapters/adapters.safetensors" in shown.stdout
    told = run("four", "-o", "served", "--layout", "mlx", "--json", "--overwrite", "-q")
    keys = "adapter bytes directory layout matrices output rank rounded seconds"
    assert sorted(json.loads(told.stdout)) == keys.split()
    words = ["--layout", "mlx", "--rounded"]
    loftq_cli.convert("model", place / "odd", layout="loftq", rank=4, iters=1, **settings)
    assert "7, values off by 0.000% of the weights" in run("odd", "-o", "rounded", *words).stdout


def test_an_adapter_of_mlx_lm_is_imported(place: Path) -> None:
    settings: dict[str, Any] = {"bits": 4, "method": "uniform-symmetric", "block_size": 32}
    loftq_cli.convert("model", place / "four", layout="compressed", rank=4, iters=1, **settings)
    run("four", "-o", "served", "--layout", "mlx")
    words = ["import-adapter", "four", "--adapter", "served/adapters"]
    shown = CliRunner().invoke(main, [*words, "--output", "back", "--offline"])
    assert shown.exit_code == 0, shown.output
    assert "pairs  7, of rank 4" in shown.stdout
    assert "next: loftq merge four -o merged --adapter back" in shown.stdout
    told = CliRunner().invoke(main, [*words, "-o", "back", "--overwrite", "--json", "-q"])
    keys = "adapter directory matrices output rank scale"
    assert sorted(json.loads(told.stdout)) == keys.split()
    for more, said in ((["--revision", "x"], "--revision x"), (["--quiet"], "holds an adapter")):
        refused = CliRunner().invoke(main, [*words, "-o", "back", *more])
        assert (refused.exit_code, said in refused.stderr) != (0, True)
        assert said in refused.stderr
    for flag in ("-v", "--verbose"):
        assert "Traceback" in CliRunner().invoke(main, [*words, "-o", "back", flag]).stderr
