"""``loftq merge`` as it is typed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from loftq_cli.merging import merge as merging
from tests.support import checkpoints, models
from tests.support.commands import QUICK, Command

KEYS = {
    *("adapter", "added", "bytes", "directory", "dtype", "loading"),
    *("matrices", "output", "replaced", "seconds", "without_adapter"),
}
MARKER_KEYS = {"adapter_sha256", "dtype", "fingerprint", "format_version", "source", "tool"}
MATRICES = checkpoints.matrices(checkpoints.llama())


@pytest.mark.usefixtures("out")
@pytest.mark.parametrize("words", [[], ["out"], ["out/"], ["./out"]])
def test_it_reads_out_unless_told_otherwise(words: list[str], loftq: Command) -> None:
    result = loftq("merge", *words, "--output", "merged")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == "wrote merged"
    assert lines[-3].strip() == "from transformers import AutoModelForCausalLM"
    assert lines[-1].strip() == "model = AutoModelForCausalLM.from_pretrained('merged')"
    assert sorted(os.listdir("merged")) == ["config.json", "loftq_merge.json", "model.safetensors"]
    assert sorted(os.listdir()) == ["merged", "model", "out"]
    assert set(json.loads(Path("merged/loftq_merge.json").read_text())) == MARKER_KEYS
    shapes = {name: tensor.shape for name, tensor in checkpoints.llama().items()}
    merged = load_file("merged/model.safetensors")
    assert {name: tensor.shape for name, tensor in merged.items()} == shapes


@pytest.mark.usefixtures("out")
def test_as_json(loftq: Command) -> None:
    result = loftq("merge", "-o", "merged", "--dtype", "bfloat16", "--json")
    found = json.loads(result.stdout)
    assert set(found) == KEYS
    assert (found["directory"], found["output"], found["dtype"]) == ("out", "merged", "bfloat16")
    assert found["adapter"] == "out/loftq_init/adapter_model.safetensors"
    assert found["matrices"] == len(MATRICES)
    assert found["replaced"] == found["added"] == found["without_adapter"] == []


@pytest.mark.usefixtures("out")
def test_remarks_are_on_stderr_unless_quiet(loftq: Command) -> None:
    shutil.copytree("out/loftq_init", "adapter")
    config = Path("adapter/adapter_config.json")
    settings = {"modules_to_save": ["lm_head"], "exclude_modules": ["q_proj"]}
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    words = ["merge", "-o", "merged", "--adapter", "adapter"]
    assert loftq(*words).stderr == ""
    trim(Path("adapter/adapter_model.safetensors"), "q_proj")
    (line,) = loftq(*words, "--overwrite").stderr.splitlines()
    assert line == (
        "loftq: the adapter has nothing for model.layers.0.self_attn.q_proj.weight: "
        "merged as quantized"
    )
    assert loftq(*words, "--overwrite", "-q").stderr == ""
    assert loftq(*words, "--overwrite", "--quiet").stderr == ""


def trim(file: Path, part: str) -> None:
    """Drop the tensors whose names hold ``part``."""
    save_file({name: t for name, t in load_file(file).items() if part not in name}, file)


@pytest.mark.usefixtures("out")
@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "Missing option '-o'"),
        (["-o", "merged", "--dtype", "int8"], 2, "int8"),
        (["-o", "out/merged"], 2, "--output out/merged is inside the input out"),
        (["-o", "out"], 2, "--output out is inside the input out"),
        (["model", "-o", "merged"], 3, "model: no loftq_manifest.json"),
        (["none", "-o", "merged"], 3, "none: no such directory"),
        (["-o", "merged", "--adapter", "none"], 3, "none: no such file"),
        (["-o", "model"], 4, "exists and is not a merged checkpoint"),
        (["-o", "model", "--overwrite"], 4, "replaces only loftq's own outputs"),
    ],
)
def test_what_is_refused(words: list[str], code: int, said: str, loftq: Command) -> None:
    result = loftq("merge", *words)
    assert (result.exit_code, result.stdout) == (code, "")
    assert said in result.stderr.splitlines()[-1]
    assert sorted(os.listdir()) == ["model", "out"]


@pytest.mark.usefixtures("out")
def test_an_output_in_the_way(loftq: Command) -> None:
    assert loftq("merge", "-o", "merged").exit_code == 0
    result = loftq("merge", "-o", "merged")
    assert result.exit_code == 4
    assert "--overwrite" in result.stderr
    assert loftq("merge", "-o", "merged", "--overwrite").exit_code == 0


@pytest.mark.usefixtures("out")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interruption_says_that_nothing_was_written(
    name: str, loftq: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = getattr(signal, name)
    monkeypatch.setattr(merging, "merged_value", lambda *arguments: os.kill(os.getpid(), number))
    result = loftq("merge", "-o", "merged")
    assert result.exit_code == 128 + number
    assert result.stderr == f"loftq: error: interrupted by {name} (nothing was written)\n"
    assert sorted(os.listdir()) == ["model", "out"]


LOADED = """
import sys
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained("merged", output_loading_info=True)
assert not any(info.values()), info
assert not {"loftq_cli", "peft", "bitsandbytes"} & set(sys.modules)
"""


def test_the_result_loads_where_neither_loftq_nor_peft_is(loftq: Command) -> None:
    models.save(models.llama(), Path("real"))
    assert loftq("convert", "real", "-q", *QUICK).exit_code == 0
    assert loftq("merge", "-o", "merged").exit_code == 0
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    subprocess.run([sys.executable, "-c", LOADED], env=environment, check=True)
