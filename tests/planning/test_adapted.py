"""The plan of an adapter for a backbone that exists, carried out: what is made, and refused."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loftq_cli
from loftq_cli.checkpoint.request import Request
from loftq_cli.conversion.prepare import Backbone, prepare
from loftq_cli.conversion.run import run
from loftq_cli.errors import (
    CorruptFileError,
    InputError,
    PatternError,
    SourceChangedError,
    SourceNotFoundError,
    UnsupportedInputError,
    UsageError,
    VerificationError,
)
from loftq_cli.settings.options import Options
from tests.support import checkpoints, encoded, given
from tests.support.bench import Recorder

Q = "model.layers.0.self_attn.q_proj"
RANK: dict[str, Any] = {"rank": 8, "threads": 1}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("adapted")
    return checkpoints.write(place / "source", checkpoints.llama(hidden=128, intermediate=256))


@pytest.fixture(scope="module")
def gptq(source: Path) -> Path:
    return given.quantized(source, source.parent / "gptq", "gptq")


def values_of(output: Path, module: str = Q) -> tuple[torch.Tensor, torch.Tensor]:
    folder = output if (output / "adapter_model.safetensors").exists() else output / "loftq_init"
    stored = load_file(folder / "adapter_model.safetensors")
    prefix = f"base_model.model.{module}"
    return stored[f"{prefix}.lora_A.weight"], stored[f"{prefix}.lora_B.weight"]


def test_an_adapter_alone_is_what_peft_reads(gptq: Path, source: Path, tmp_path: Path) -> None:
    manifest = loftq_cli.adapt(gptq, tmp_path / "out", source=source, **RANK)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "loftq_manifest.json"}
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(gptq)
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 8, 8)
    assert len(config["target_modules"]) == len(manifest["matrices"]) == 7
    assert manifest["recipe"]["backbone"] == "named"
    files = {file["name"]: file for file in manifest["backbone"]["files"]}
    assert files.keys() == {"config.json", "model.safetensors"}
    assert files["model.safetensors"]["size"] == (gptq / "model.safetensors").stat().st_size
    assert manifest["backbone"]["formats"] == ["GPTQ or AWQ"]


def test_residuals_are_those_of_what_was_written(gptq: Path, source: Path, tmp_path: Path) -> None:
    """Against Q decoded here by the format's definition."""
    manifest = loftq_cli.adapt(gptq, tmp_path / "out", source=source, **RANK)
    (record,) = (each for each in manifest["matrices"] if each["module"] == Q)
    stored = load_file(gptq / "model.safetensors")
    shifts = torch.arange(8) * 4
    codes = (stored[f"{Q}.qweight"][:, None] >> shifts[:, None] & 15).flatten(0, 1).double()
    zeros = (stored[f"{Q}.qzeros"][:, :, None] >> shifts & 15).flatten(1).double() + 1
    group = stored[f"{Q}.g_idx"].long()
    held = ((codes - zeros[group]) * stored[f"{Q}.scales"].double()[group]).T
    weight = load_file(source / "model.safetensors")[f"{Q}.weight"].double()
    lora_A, lora_B = (each.double() for each in values_of(tmp_path / "out"))
    norms = record["frobenius"]
    assert norms["quantized"] == pytest.approx(float((weight - held).norm()), rel=2e-3)
    left = float((weight - held - lora_B @ lora_A).norm())
    assert norms["final"] == pytest.approx(left, rel=2e-3)
    assert norms["final"] < norms["quantized"]


FORMS: dict[str, Any] = {
    "gptq": {},
    "gptq 2": {"layout": "gptq", "bits": 2},
    "gptq 3": {"layout": "gptq", "bits": 3},
    "gptq 8": {"layout": "gptq", "bits": 8},
    "awq": {},
    "bnb": {},
    "compressed": {},
    "compressed 3": {"layout": "compressed", "bits": 3},
    "dense": {},
}


@pytest.mark.parametrize("form", FORMS)
def test_somebody_else_s_is_adapted_as_ours_is(form: str, source: Path, tmp_path: Path) -> None:
    """The same tensors with and without the manifest give the same adapter, but for rounding to
    what consumers compute in."""
    wanted = {"layout": form, "bits": 4, "rank": 1, "iters": 0, "threads": 1, **FORMS[form]}
    loftq_cli.convert(source, tmp_path / "ours", **wanted)
    given.stripped(tmp_path / "ours", tmp_path / "theirs")
    found = {
        name: loftq_cli.adapt(tmp_path / name, tmp_path / f"to-{name}", source=source, **RANK)
        for name in ("ours", "theirs")
    }
    ours, theirs = (found[name]["totals"] for name in ("ours", "theirs"))
    for figure in ("relative_residual", "relative_residual_quantized", "bits_per_weight"):
        # At 8 bits the rounding to bfloat16 is a part of what is lost.
        assert ours[figure] == pytest.approx(theirs[figure], rel=0.06 if "8" in form else 3e-3)
    assert found["ours"]["matrices"][0]["layout"] == wanted["layout"]
    record = found["theirs"]["matrices"][0]
    assert (record["layout"], record["method"]) == ("given", "given")
    assert record["bits"] == (32 if form == "dense" else wanted["bits"])


def test_groups_in_any_order(source: Path, tmp_path: Path) -> None:
    """The same codes with their groups elsewhere are other values: near the source no more."""
    plain = given.quantized(source, tmp_path / "plain", "gptq")
    before = loftq_cli.adapt(plain, tmp_path / "one", source=source, **RANK)
    given.in_another_order(plain)
    after = loftq_cli.adapt(plain, tmp_path / "two", source=source, **RANK)
    key = "relative_residual_quantized"
    assert after["totals"][key] > 1.5 * before["totals"][key]


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_eight_bits(form: str, source: Path, tmp_path: Path) -> None:
    make = given.int8 if form == "int8" else encoded.fp8_blocks
    tensors, stated = make(load_file(source / "model.safetensors"))
    backbone = given.of(source, tmp_path / "theirs", tensors, stated)
    manifest = loftq_cli.adapt(backbone, tmp_path / "out", source=source, **RANK)
    totals = manifest["totals"]
    assert {record["bits"] for record in manifest["matrices"]} == {8}
    assert totals["relative_residual"] < totals["relative_residual_quantized"] < 0.04


def test_with_the_backbone(gptq: Path, source: Path, tmp_path: Path) -> None:
    """Copies: what is written to one is not written to the other."""
    out = tmp_path / "out"
    manifest = loftq_cli.adapt(gptq, out, source=source, with_backbone=True, **RANK)
    alone = loftq_cli.adapt(gptq, tmp_path / "alone", source=source, **RANK)
    for name in ("config.json", "model.safetensors"):
        assert (out / name).read_bytes() == (gptq / name).read_bytes()
        assert not (out / name).samefile(gptq / name)
    assert manifest["recipe"]["backbone"] == "held"
    assert manifest["matrices"] == alone["matrices"]
    assert manifest["fingerprint"] != alone["fingerprint"]
    assert torch.equal(values_of(out)[1], values_of(tmp_path / "alone")[1])


def test_the_same_command_again_has_nothing_to_do(gptq: Path, source: Path, tmp_path: Path) -> None:
    first = loftq_cli.adapt(gptq, tmp_path / "out", source=source, **RANK)
    assert loftq_cli.adapt(gptq, tmp_path / "out", source=source, **RANK) == first


def test_of_other_values_it_is_another_one(source: Path, tmp_path: Path) -> None:
    """Of the same shapes and sizes, as a second quantization is: by the contents of all files."""
    backbone = given.quantized(source, tmp_path / "theirs", "gptq")
    first = loftq_cli.adapt(backbone, tmp_path / "out", source=source, **RANK)
    tensors = load_file(backbone / "model.safetensors")
    tensors[f"{Q}.scales"] *= 1.5
    save_file(tensors, backbone / "model.safetensors")
    with pytest.raises(Exception, match="another conversion"):
        loftq_cli.adapt(backbone, tmp_path / "out", source=source, **RANK)
    again = loftq_cli.adapt(backbone, tmp_path / "out", source=source, overwrite=True, **RANK)
    assert again["fingerprint"] != first["fingerprint"]


def test_unfinished_work_is_gone_on_with(gptq: Path, source: Path, tmp_path: Path) -> None:
    """From the matrix at which it was stopped, to the same bytes; not with another backbone."""
    asked = Backbone(Request(str(gptq)), kept=True)

    class Stopped(Recorder):
        def working_on(self, tensor: str) -> None:
            if "mlp.up" in tensor:
                raise KeyboardInterrupt

    for name, observers in (("whole", [Recorder()]), ("out", [Stopped(), Recorder()])):
        for observer in observers:
            plan, path = prepare(
                Request(str(source)),
                tmp_path / name,
                Options(**RANK),
                backbone=asked,
                observer=observer,
            )
            with contextlib.suppress(KeyboardInterrupt):
                run(plan, path, overwrite=False, observer=observer)
    ours, theirs = (checkpoints.comparable(tmp_path / name) for name in ("out", "whole"))
    assert ours == theirs
    assert not list(tmp_path.glob(".*"))


def test_ranks_and_exclusions(gptq: Path, source: Path, tmp_path: Path) -> None:
    settings = {**RANK, "rank_map": ["*.down_proj.*=2"], "exclude": ["*.self_attn.*"]}
    manifest = loftq_cli.adapt(gptq, tmp_path / "out", source=source, **settings)
    ranks = {r["module"].rpartition(".")[2]: r["rank"] for r in manifest["matrices"]}
    assert ranks == {"gate_proj": 8, "up_proj": 8, "down_proj": 2}
    with pytest.raises(PatternError, match="matches no tensor"):
        loftq_cli.adapt(gptq, tmp_path / "x", source=source, **{**RANK, "exclude": ["nowhere*"]})
    with pytest.raises(UsageError, match="leaves no matrix to adapt"):
        loftq_cli.adapt(gptq, tmp_path / "x", source=source, **{**RANK, "exclude": ["*"]})
    with pytest.raises(UsageError, match="every quantized matrix is taken"):
        loftq_cli.adapt(gptq, tmp_path / "x", source=source, **{**RANK, "include": ["lm_head*"]})


def test_what_there_is_to_correct(gptq: Path, source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--source is missing: without the original"):
        loftq_cli.adapt(gptq, tmp_path / "out", **RANK)
    with pytest.raises(UnsupportedInputError, match="itself quantized"):
        loftq_cli.adapt(gptq, tmp_path / "out", source=gptq, **RANK)
    with pytest.raises(UsageError, match="the backbone and the source: nothing differs"):
        loftq_cli.adapt(source, tmp_path / "out", source=source, **RANK)
    copy = checkpoints.write(tmp_path / "copy", load_file(source / "model.safetensors"))
    with pytest.raises(UnsupportedInputError, match="holds the very values of"):
        loftq_cli.adapt(copy, tmp_path / "out", source=source, **RANK)
    with pytest.raises(UsageError, match="--bits is for quantizing"):
        loftq_cli.adapt(gptq, tmp_path / "out", source=source, bits=2, **RANK)
    assert not (tmp_path / "out").exists()


def test_everything_that_does_not_pair_up_is_listed(gptq: Path, tmp_path: Path) -> None:
    tensors = checkpoints.llama(hidden=128, intermediate=256)
    del tensors[f"{Q}.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(256, 64)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(256, 128)
    other = checkpoints.write(tmp_path / "other", tensors)
    with pytest.raises(InputError, match="do not pair up, 3 tensors") as caught:
        loftq_cli.adapt(gptq, tmp_path / "out", source=other, **RANK)
    message = caught.value.message
    assert f"{Q}.weight is not in the source" in message
    assert "mlp.up_proj.weight is [256, 64], in the backbone [256, 128]" in message
    assert "model.layers.1.mlp.up_proj.weight is not in the backbone" in message


def test_a_layer_that_is_fused_on_one_side(gptq: Path, tmp_path: Path) -> None:
    tensors = checkpoints.llama(hidden=128, intermediate=256)
    parts = [tensors.pop(f"model.layers.0.mlp.{each}_proj.weight") for each in ("gate", "up")]
    tensors["model.layers.0.mlp.gate_up_proj.weight"] = torch.cat(parts)
    other = checkpoints.write(tmp_path / "other", tensors, {**checkpoints.LLAMA, "zeta": None})
    with pytest.raises(InputError, match="gate_up_proj") as caught:
        loftq_cli.adapt(gptq, tmp_path / "out", source=other, **RANK)
    assert "fused on one side only" in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ("model.embed_tokens.weight", "or its weights were rotated first"),
        ("model.layers.0.input_layernorm.weight", "is not the source's times positive scales"),
        (f"{Q}.weight", f"tensor '{Q}.weight': the backbone's is no quantization of it"),
    ],
)
def test_another_model_of_the_same_shapes(
    changed: str, words: str, gptq: Path, tmp_path: Path
) -> None:
    tensors = checkpoints.llama(hidden=128, intermediate=256)
    tensors[changed] = checkpoints.llama(hidden=128, intermediate=256, seed=1)[changed]
    other = checkpoints.write(tmp_path / "other", tensors)
    with pytest.raises(InputError) as caught:
        loftq_cli.adapt(gptq, tmp_path / "out", source=other, **RANK)
    assert words in caught.value.message
    assert not (tmp_path / "out").exists()


def test_a_backbone_that_is_damaged(source: Path, tmp_path: Path) -> None:
    backbone = given.quantized(source, tmp_path / "theirs", "gptq")
    weights = backbone / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(CorruptFileError, match="cut short"):
        loftq_cli.adapt(backbone, tmp_path / "out", source=source, **RANK)
    weights.unlink()
    index = {"weight_map": {f"{Q}.qweight": "model-00001-of-00002.safetensors"}}
    (backbone / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptFileError, match="missing, the index names it"):
        loftq_cli.adapt(backbone, tmp_path / "out", source=source, **RANK)
    with pytest.raises(SourceNotFoundError, match="nowhere"):
        loftq_cli.adapt(tmp_path / "nowhere/x", tmp_path / "out", source=source, **RANK)


def test_codes_of_a_format_that_nobody_here_knows(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    tensors[f"{Q}.W_q"] = tensors.pop(f"{Q}.weight").to(torch.uint8)
    backbone = given.of(source, tmp_path / "theirs", tensors, {"quant_method": "hqq"})
    with pytest.raises(UnsupportedInputError, match=r"quantized already \(hqq\)"):
        loftq_cli.adapt(backbone, tmp_path / "out", source=source, **RANK)


def test_a_conversion_of_ours_that_was_altered(source: Path, tmp_path: Path) -> None:
    loftq_cli.convert(source, tmp_path / "ours", rank=1, iters=0, threads=1)
    weights = tmp_path / "ours/model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(VerificationError, match="not the file that was converted"):
        loftq_cli.adapt(tmp_path / "ours", tmp_path / "out", source=source, **RANK)


def test_a_backbone_that_changes_meanwhile(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loftq_cli.planning import given as module

    backbone = given.quantized(source, tmp_path / "theirs", "gptq")
    reading = module.Given.reader

    def touched(self: Any) -> Any:
        path = backbone / "model.safetensors"
        path.touch()
        return reading(self)

    monkeypatch.setattr(module.Given, "reader", touched)
    with pytest.raises(SourceChangedError, match="the backbone changed while it was read"):
        loftq_cli.adapt(backbone, tmp_path / "out", source=source, **RANK)
    assert not (tmp_path / "out").exists()
