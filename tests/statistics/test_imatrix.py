"""llama.cpp's importance matrices, written with the gguf package or packed by hand."""

from __future__ import annotations

import struct
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from loftq_cli.checkpoint.source import Source, open_source
from loftq_cli.errors import (
    CorruptFileError,
    EnvironmentFailure,
    MissingStatisticsError,
    StatisticsError,
    UnsupportedInputError,
    UsageError,
)
from loftq_cli.statistics.file import open_statistics
from tests.support import checkpoints
from tests.support.makers import flip_bit, shorten

gguf = pytest.importorskip("gguf")
numpy = pytest.importorskip("numpy")

LLAMA_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
WIDTHS = {
    f"blk.{layer}.{name}.weight": 128 if name == "ffn_down" else 64
    for layer in (0, 1)
    for name in LLAMA_NAMES.values()
}
Sums = dict[str, tuple[list[float], list[float]]]


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return open_source(checkpoints.write(tmp_path / "model", checkpoints.llama(layers=2)))


def sums() -> Sums:
    """For each weight of the model: the sums of squares, and the count of tokens."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: ((torch.rand(width, generator=generator) * 512).tolist(), [512.0])
        for name, width in WIDTHS.items()
    }


def write_gguf(path: Path, entries: Sums, kind: str | None = "imatrix") -> Path:
    """As llama-imatrix writes it: in_sum2 (in, matrices), counts (1, matrices)."""
    writer = gguf.GGUFWriter(path, "unused")
    if kind is not None:
        writer.add_type(kind)
    writer.add_array("imatrix.datasets", ["notes.txt"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, (values, counts) in entries.items():
        matrices = len(counts)
        shaped = numpy.array(values, numpy.float32).reshape(matrices, -1)
        writer.add_tensor(f"{name}.in_sum2", shaped)
        writer.add_tensor(f"{name}.counts", numpy.array(counts, numpy.float32).reshape(matrices, 1))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def legacy(entries: Mapping[str, tuple[list[float], int]], trailer: bool = True) -> bytes:
    """The old format: the values are E[x_j^2] times the number of calls."""
    parts = [struct.pack("<i", len(entries))]
    for name, (values, calls) in entries.items():
        raw = name.encode()
        parts.append(struct.pack("<i", len(raw)) + raw)
        parts.append(struct.pack(f"<ii{len(values)}f", calls, len(values), *values))
    if trailer:
        parts.append(struct.pack("<ii", 4, 9) + b"notes.txt")
    return b"".join(parts)


def written(tmp_path: Path, form: str, entries: Sums) -> Path:
    path = tmp_path / f"imatrix.{form}"
    if form == "gguf":
        return write_gguf(path, entries)
    scaled = {
        name: ([value / counts[0] * 4 for value in values], 4)
        for name, (values, counts) in entries.items()
    }
    path.write_bytes(legacy(scaled, trailer=form == "dat"))
    return path


@pytest.mark.parametrize("form", ["gguf", "dat", "older.dat"])
def test_means_of_squares_under_the_names_of_the_checkpoint(tmp_path, source, form):
    entries = sums()
    found = open_statistics(written(tmp_path, form, entries), source)
    expected = {
        f"model.layers.{layer}.{ours}.weight": f"blk.{layer}.{theirs}.weight"
        for layer in (0, 1)
        for ours, theirs in LLAMA_NAMES.items()
    }
    assert found.matrices == expected
    assert found.model is None
    for ours, theirs in expected.items():
        values, (count,) = entries[theirs]
        assert found.kind(ours) == "diagonal"
        assert found.tokens(ours) == (count if form == "gguf" else 4)
        moments = found.moments(ours, in_features=len(values))
        torch.testing.assert_close(moments, torch.tensor(values) / count)
        assert moments.dtype == torch.float32


def test_a_task_models_prefix_and_other_architectures(tmp_path):
    tensors = {f"bert.{name}": tensor for name, tensor in checkpoints.bert().items()}
    source = open_source(checkpoints.write(tmp_path / "bert", tensors, checkpoints.BERT))
    entries: Sums = {"blk.0.attn_q.weight": ([1.0] * 64, [2.0])}
    found = open_statistics(write_gguf(tmp_path / "imatrix.gguf", entries), source)
    assert found.matrices == {
        "bert.encoder.layer.0.attention.self.query.weight": "blk.0.attn_q.weight"
    }
    mistral = {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    source = open_source(checkpoints.write(tmp_path / "mistral", checkpoints.llama(), mistral))
    found = open_statistics(tmp_path / "imatrix.gguf", source)
    assert list(found.matrices) == ["model.layers.0.self_attn.q_proj.weight"]


def test_what_has_no_entry_is_missing_and_experts_are_passed_over(tmp_path, source):
    entries = sums()
    del entries["blk.0.attn_q.weight"]
    entries["blk.0.ffn_up.weight"] = (
        [1.0] * 128,
        [3.0, 5.0],
    )  # two experts
    entries["blk.0.ffn_gate.weight"] = ([0.0] * 64, [0.0])  # never called
    entries["token_embd.weight"] = ([1.0] * 64, [1.0])
    found = open_statistics(write_gguf(tmp_path / "imatrix.gguf", entries), source)
    assert len(found.matrices) == len(WIDTHS) - 3
    for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.gate_proj"):
        with pytest.raises(MissingStatisticsError, match=name):
            found.moments(f"model.layers.0.{name}.weight")


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_bad_values_are_refused_when_read(tmp_path, source, form):
    entries = sums()
    entries["blk.0.attn_q.weight"] = ([1.0, -1.0] * 32, [1.0])
    entries["blk.0.attn_k.weight"] = ([float("nan")] * 64, [1.0])
    entries["blk.0.attn_v.weight"] = ([0.0] * 64, [1.0])
    entries["blk.0.attn_output.weight"] = ([1.0] * 32, [1.0])
    found = open_statistics(written(tmp_path, form, entries), source)
    for name, said in (
        ("q_proj", "negative square"),
        ("k_proj", "NaN or Inf"),
        ("v_proj", "all zeros"),
        ("o_proj", "has 64 inputs, 32 were measured"),
    ):
        with pytest.raises(StatisticsError, match=said):
            found.moments(f"model.layers.0.self_attn.{name}.weight", in_features=64)


@pytest.mark.parametrize("form", ["gguf", "dat"])
def test_one_of_another_model_is_refused(tmp_path, source, form):
    path = written(tmp_path, form, {"blk.0.ssm_in.weight": ([1.0] * 64, [1.0])})
    with pytest.raises(StatisticsError, match="without an entry for this model"):
        open_statistics(path, source)


@pytest.mark.parametrize("form", ["gguf", "older.dat"])
def test_one_that_is_cut_short_is_refused(tmp_path, source, form):
    path = written(tmp_path, form, sums())
    shorten(path, 40)
    with pytest.raises(CorruptFileError, match="imatrix"):
        open_statistics(path, source)


def test_a_gguf_file_that_is_damaged_or_of_another_kind_is_refused(tmp_path, source):
    path = write_gguf(tmp_path / "model.gguf", sums(), kind="model")
    with pytest.raises(UnsupportedInputError, match="of type 'model'"):
        open_statistics(path, source)
    path = write_gguf(tmp_path / "untyped.gguf", sums(), kind=None)
    with pytest.raises(UnsupportedInputError, match="of type None"):
        open_statistics(path, source)
    path.write_bytes(b"GGUF")
    with pytest.raises(CorruptFileError, match="not a readable GGUF file"):
        open_statistics(path, source)
    path = write_gguf(tmp_path / "imatrix.gguf", sums())
    flip_bit(path, 8 + 7)  # of the number of tensors
    with pytest.raises(CorruptFileError, match="not a readable GGUF file"):
        open_statistics(path, source)


def test_counts_that_count_nothing_are_refused(tmp_path, source):
    for count in (float("nan"), -1.0):
        entries: Sums = {"blk.0.attn_q.weight": ([1.0] * 64, [count])}
        path = write_gguf(tmp_path / f"{count}.gguf", entries)
        with pytest.raises(StatisticsError, match="tokens"):
            open_statistics(path, source)


def test_it_is_for_a_model_of_a_known_architecture(tmp_path, source):
    path = write_gguf(tmp_path / "imatrix.gguf", sums())
    with pytest.raises(UsageError, match="read for a model"):
        open_statistics(path)
    for model_type in ("unheard-of", "plamo", None):
        config = {"model_type": model_type}
        other = open_source(checkpoints.write(tmp_path / "other", checkpoints.llama(), config))
        with pytest.raises(UnsupportedInputError, match=r"config\.json: importance matrices"):
            open_statistics(path, other)


def test_a_missing_extra_is_named(tmp_path, source, monkeypatch):
    path = write_gguf(tmp_path / "imatrix.gguf", sums())
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(EnvironmentFailure) as raised:
        open_statistics(path, source)
    assert raised.value.exit_code == 5
    assert raised.value.hint == 'pip install "loftq-cli[gguf]"'
