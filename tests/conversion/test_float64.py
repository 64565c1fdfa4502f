"""Matrices in float64: converted in float32, as if the checkpoint had been saved in it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import loftq_cli
from loftq_cli.calibration.calibrate import Measuring, calibrate
from loftq_cli.checkpoint.pickles import reader as pickled
from loftq_cli.checkpoint.request import Request
from loftq_cli.errors import NonFiniteWeightError
from loftq_cli.machine.observer import Observer
from loftq_cli.merging.merge import merge
from tests.support import checkpoints, models
from tests.support.bench import Bench, Recorder
from tests.support.calibrated import LENGTH
from tests.support.checkpoints import LLAMA
from tests.support.contents import FAST, manifest, stored

QUERY = "model.layers.0.self_attn.q_proj.weight"
LAYOUTS = [("bnb", 4, "nf"), ("gptq", 4, "uniform"), ("loftq", 2, "nf"), ("dense", 2, "nf")]

every_layout = pytest.mark.parametrize(("layout", "bits", "method"), LAYOUTS)


def wide(tensors, names=None):
    """The tensors in float64, with digits that float32 does not have."""
    return {
        name: tensor.double() * (1 + 2**-40) if names is None or name in names else tensor
        for name, tensor in tensors.items()
    }


def narrow(tensors):
    return {name: tensor.float() for name, tensor in tensors.items()}


def written(output):
    """Every file of tensors, and the figures of the manifest."""
    files = {path.name: load_file(path) for path in output.rglob("*.safetensors")}
    return files, {record["name"]: record["frobenius"] for record in manifest(output)["matrices"]}


@every_layout
def test_what_is_written_is_what_the_checkpoint_in_float32_gives(
    tmp_path, converted, layout, bits, method
):
    settings = {"layout": layout, "bits": bits, "method": method}
    # Passed-through tensors stay as they are; only matrices are float64 here.
    tensors = checkpoints.llama()
    matrices = checkpoints.matrices(tensors)
    doubled = wide(tensors, matrices)
    source = checkpoints.write(tmp_path / "double", doubled)
    loftq_cli.convert(source, tmp_path / "from-double", **FAST, **settings)
    single = converted(narrow(doubled), **settings)
    (found, norms), (expected, same) = written(tmp_path / "from-double"), written(single)
    assert norms == same
    for file, tensors in expected.items():
        assert found[file].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[file][name].dtype == tensor.dtype
            assert torch.equal(found[file][name], tensor)
    records = manifest(tmp_path / "from-double")["matrices"]
    assert {record["dtype"] for record in records} == {"F64"}


@every_layout
def test_reports_and_a_merge_read_it_back(tmp_path, converted, layout, bits, method):
    tensors = wide(checkpoints.llama())
    output = converted(tensors, layout=layout, bits=bits, method=method)
    report = loftq_cli.error_report(output, tmp_path / "model")
    assert report["recomputed"]
    shown = loftq_cli.inspect(output, verify=True)
    assert {layer["dtype"] for layer in shown["layers"]} == {"F64"}
    assert shown["totals"]["adapter_bytes"] == sum(t["adapter_bytes"] for t in shown["layers"])
    merge(output, tmp_path / "merged", observer=Observer())
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert {name: t.dtype for name, t in merged.items()} == dict.fromkeys(tensors, torch.float64)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "float64"
    for name in checkpoints.matrices(tensors):
        assert (merged[name] - tensors[name]).norm() < tensors[name].norm()


def test_tensors_that_are_passed_through_stay_in_float64(converted):
    tensors = wide(checkpoints.llama())
    kept = {name: t for name, t in tensors.items() if name not in checkpoints.matrices(tensors)}
    found = stored(converted(tensors, layout="dense"))
    assert all(torch.equal(found[name], tensor) for name, tensor in kept.items())


def test_a_remark_says_how_many_matrices_are_float64(bench: Bench):
    bench.write(wide(checkpoints.llama(), [QUERY]))
    recorder = Recorder()
    bench.convert(recorder, method="nf", bits=4)
    (line,) = [note for note in recorder.notes if "float64" in note]
    assert line.startswith("1 of 7 matrices is float64")
    assert "float32" in line


@pytest.mark.parametrize("settings", [{"bits": 2}, {"target_bpw": 3}, {"layout": "dense"}])
def test_a_value_beyond_float32_is_named_with_its_place(tmp_path, settings):
    weight = torch.ones(64, 64, dtype=torch.float64)
    weight[3, 5] = -1e300
    source = checkpoints.write(tmp_path / "source", {QUERY: weight})
    with pytest.raises(NonFiniteWeightError) as caught:
        loftq_cli.convert(source, tmp_path / "out", **FAST, **settings)
    assert repr(QUERY) in caught.value.message
    assert "holds -1e+300" in caught.value.message
    assert "target_bpw" in settings or "at [3, 5]" in caught.value.message
    assert "float32" in caught.value.message
    assert "--exclude" in caught.value.hint
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_value_below_the_smallest_of_float32_becomes_zero(tmp_path):
    weight = torch.ones(64, 64, dtype=torch.float64)
    weight[3, 5] = 1e-300
    source = checkpoints.write(tmp_path / "source", {QUERY: weight})
    loftq_cli.convert(source, tmp_path / "out", **FAST, bits=2)
    loftq_cli.error_report(tmp_path / "out", source)


@pytest.mark.parametrize("stated", [{"dtype": "float64"}, {"torch_dtype": "float64"}, {}])
def test_the_backbone_s_config_says_float32(converted, stated):
    config = {**LLAMA, **stated, "text_config": {**stated, "hidden_size": 64}}
    output = converted(wide(checkpoints.llama()), config, method="nf", bits=4)
    found = json.loads((output / "config.json").read_text())
    assert {found.get("dtype"), found.get("torch_dtype")} == {"float32", None}
    assert set(found["text_config"].values()) <= {"float32", 64}
    assert found["quantization_config"]["bnb_4bit_compute_dtype"] == "float32"


def test_another_config_is_not_touched(converted):
    config = {**LLAMA, "text_config": {"z": {}, "a": None, "dtype": "bfloat16"}}
    found = json.loads((converted(checkpoints.llama(), config) / "config.json").read_text())
    found.pop("quantization_config", None)
    assert json.dumps(found) == json.dumps(config)


def test_an_interrupted_conversion_resumes_with_the_same_bytes(bench: Bench, tmp_path):
    bench.write(wide(checkpoints.llama()), cuts=(5,))
    bench.convert(output=tmp_path / "whole")
    bench.interrupt("model.layers.0.self_attn.o_proj.weight")
    bench.convert()
    assert checkpoints.comparable(bench.output) == checkpoints.comparable(tmp_path / "whole")


def test_widths_within_a_budget_are_those_of_float32(tmp_path, converted):
    doubled = wide(checkpoints.llama())
    source = checkpoints.write(tmp_path / "double", doubled)
    loftq_cli.convert(source, tmp_path / "from-double", **FAST, target_bpw=3.2)
    single = converted(narrow(doubled), target_bpw=3.2)
    widths = [manifest(out)["recipe"]["widths"] for out in (tmp_path / "from-double", single)]
    assert widths[0] == widths[1] != []


def test_pickled_matrices_are_read_as_others_are(tmp_path, converted):
    doubled = wide(checkpoints.llama())
    source = checkpoints.write(tmp_path / "pickled", doubled)
    (source / "model.safetensors").unlink()
    torch.save(doubled, source / "pytorch_model.bin")
    assert {t.dtype for t in pickled.read_header(source / "pytorch_model.bin").tensors} == {"F64"}
    loftq_cli.convert(source, tmp_path / "out-pickled", **FAST, allow_pickle=True, bits=2)
    expected = converted(doubled, bits=2)
    assert written(tmp_path / "out-pickled")[1] == written(expected)[1]


@pytest.mark.parametrize(("layout", "bits", "method"), [LAYOUTS[0], *LAYOUTS[2:]])
def test_it_loads_and_trains_in_float32(tmp_path, layout, bits, method):
    models.save(models.llama(), tmp_path / "source", torch.float64)
    assert json.loads((tmp_path / "source/config.json").read_text())["dtype"] == "float64"
    settings = {**FAST, "layout": layout, "bits": bits, "method": method}
    loftq_cli.convert(tmp_path / "source", tmp_path / "out", **settings)
    loaded = loftq_cli.load(tmp_path / "out")
    tokens = torch.arange(8).view(1, 8)
    result = loaded(input_ids=tokens, labels=tokens)
    # transformers loads what bitsandbytes does not hold in the dtype that it is stored in.
    assert result.logits.dtype == (torch.float64 if layout == "bnb" else torch.float32)
    result.loss.backward()
    trained = [p for p in loaded.parameters() if p.requires_grad]
    assert trained
    assert all(p.dtype == torch.float32 and p.grad is not None for p in trained)


def test_calibrating_runs_the_model_in_float32(tmp_path, notes):
    source = models.save(models.bert(), tmp_path / "source", torch.float64)
    models.save_tokenizer(source)
    settings = Measuring(length=LENGTH, samples=1, device="cpu")
    found = calibrate(Request(str(source)), tmp_path / "s", [notes], settings, observer=Observer())
    assert found["dtype"] == "float32"
    loftq_cli.convert(source, tmp_path / "out", **FAST, bits=2, stats=str(tmp_path / "s"))
