"""load() refuses files that are not those of the conversion, each with its name."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

import loftq_cli
from loftq_cli.errors import InputError, VerificationError
from tests.support.makers import flip_bit, shorten

# peft asks transformers under a name that transformers is giving up.
ADAPTER = "loftq_init/adapter_model.safetensors"


@pytest.fixture
def copied(converted, tmp_path):
    """A copy of the llama's output, to be damaged."""
    return shutil.copytree(converted("llama"), tmp_path / "out")


def sign(directory) -> None:
    """Let the manifest list the adapter as it is now."""
    manifest = json.loads((directory / "loftq_manifest.json").read_text())
    entry = next(entry for entry in manifest["outputs"] if entry["name"] == ADAPTER)
    content = (directory / ADAPTER).read_bytes()
    entry |= {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (directory / "loftq_manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", [ADAPTER, "model.safetensors"])
@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda file: file.unlink(), "No such file"),
        (shorten, "bytes, the manifest says"),
    ],
)
def test_a_weight_file_that_is_missing_or_cut_is_named(copied, name, damage, named) -> None:
    damage(copied / name)
    with pytest.raises(VerificationError, match=f"{name}: .*{named}"):
        loftq_cli.load(copied)


def test_the_adapter_of_another_conversion_is_refused(converted, copied) -> None:
    other = converted("llama", iters=2)
    assert (other / ADAPTER).stat().st_size == (copied / ADAPTER).stat().st_size
    shutil.rmtree(copied / "loftq_init")
    shutil.copytree(other / "loftq_init", copied / "loftq_init")
    with pytest.raises(VerificationError, match=r"loftq_init/.*not the adapter.*put back"):
        loftq_cli.load(copied)


def test_an_adapter_that_was_altered_is_refused(copied) -> None:
    flip_bit(copied / ADAPTER)
    with pytest.raises(VerificationError, match="not the adapter"):
        loftq_cli.load(copied)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
def test_an_adapter_that_lacks_tensors_is_an_error(copied) -> None:
    tensors = load_file(copied / ADAPTER)
    name = next(name for name in tensors if name.endswith("lora_B.weight"))
    del tensors[name]
    save_file(tensors, copied / ADAPTER, {"format": "pt"})
    sign(copied)
    with pytest.raises(InputError, match=f"disagree about {name}"):
        loftq_cli.load(copied)


def test_an_adapter_with_a_module_too_many_is_an_error(copied) -> None:
    tensors = load_file(copied / ADAPTER)
    name = "base_model.model.model.layers.9.mlp.up_proj.lora_A.weight"
    tensors[name] = next(iter(tensors.values())).clone()
    save_file(tensors, copied / ADAPTER, {"format": "pt"})
    sign(copied)
    with pytest.raises(InputError, match=f"LlamaForCausalLM has no place for {name}"):
        loftq_cli.load(copied)


def test_an_adapter_file_that_is_no_safetensors_file_is_named(copied) -> None:
    (copied / ADAPTER).write_bytes(b"\xff" * 100)
    sign(copied)
    with pytest.raises(InputError, match=r"adapter_model\.safetensors"):
        loftq_cli.load(copied)
