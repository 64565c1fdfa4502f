"""Checkpoints that lie, one builder each: a name, what is wrong, and a word the message holds."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support import checkpoints
from tests.support.makers import container, entry, shorten

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"

Build = Callable[[Path], object]
CORPUS: dict[str, tuple[Build, str]] = {}


def case(word: str) -> Callable[[Build], Build]:
    """Enter a builder into the corpus; it gets the directory of a good checkpoint to spoil."""

    def enter(build: Build) -> Build:
        CORPUS[build.__name__] = (build, word)
        return build

    return enter


def raw_header(directory: Path, header: object, data: bytes = b"", **options: Any) -> None:
    (directory / SINGLE).write_bytes(container(header, data, **options))


def index(directory: Path, weight_map: object) -> None:
    (directory / SINGLE).unlink()
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def with_tensor(directory: Path, name: str, tensor: torch.Tensor) -> None:
    save_file(checkpoints.llama() | {name: tensor}, directory / SINGLE)


@case("cut short")
def truncated(directory: Path) -> None:
    shorten(directory / SINGLE)


@case("bytes after its last tensor")
def trailing_bytes(directory: Path) -> None:
    with (directory / SINGLE).open("ab") as file:
        file.write(b"#!/bin/sh\n")


@case("not valid JSON")
def header_of_no_bytes(directory: Path) -> None:
    raw_header(directory, b"", length=0)


@case("7 bytes are too few")
def file_of_seven_bytes(directory: Path) -> None:
    (directory / SINGLE).write_bytes(bytes(7))


@case("not valid JSON")
def header_cut_in_its_middle(directory: Path) -> None:
    raw_header(directory, json.dumps({"a": entry("F32", [4, 4], 0, 64)}).encode()[:7], length=7)


@case("not valid JSON")
def header_that_is_not_utf8(directory: Path) -> None:
    raw_header(directory, b'{"\xff\xfe": {}}')


@case("leaves a hole")
def hole_between_two_tensors(directory: Path) -> None:
    header = {"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 8, 12)}
    raw_header(directory, header, bytes(12))


@case("bad data_offsets")
def negative_offsets(directory: Path) -> None:
    raw_header(directory, {"a": entry("U8", [4], -4, 0)}, bytes(4))


@case("too large")
def product_beyond_64_bits(directory: Path) -> None:
    raw_header(directory, {"a": entry("U8", [2**33, 2**33], 0, 0)})


@case("100 MB")
def header_of_eight_exabytes(directory: Path) -> None:
    raw_header(directory, b"{}", length=2**63 - 1)


@case("the file ends after")
def header_longer_than_the_file(directory: Path) -> None:
    raw_header(directory, b"{}", length=90_000_000)


@case("nested too deeply")
def bracket_bomb_header(directory: Path) -> None:
    raw_header(directory, b'{"a":' + b"[" * 1_000_000)


@case("nested too deeply")
def bracket_bomb_config(directory: Path) -> None:
    (directory / CONFIG).write_bytes(b"[" * 1_000_000)


@case("nested too deeply")
def bracket_bomb_that_parses(directory: Path) -> None:
    (directory / CONFIG).write_bytes(b'{"a":' + b"[" * 500 + b"]" * 500 + b"}")


@case("Exceeds the limit")
def number_bomb(directory: Path) -> None:
    (directory / CONFIG).write_bytes(b'{"a":' + b"9" * 1_000_000 + b"}")


@case("too large")
def shape_bomb(directory: Path) -> None:
    raw_header(directory, {"model.layers.0.a.weight": entry("F32", [2**61 - 1] * 200_000, 0, 0)})


@case("takes")
def petabyte_matrix(directory: Path) -> None:
    shape = [2**25, 2**25]
    raw_header(directory, {"model.layers.0.a.weight": entry("F32", shape, 0, 64)}, bytes(64))


@case("is not a list of sizes")
def negative_sides(directory: Path) -> None:
    raw_header(directory, {"model.layers.0.a.weight": entry("F32", [-4, -4], 0, 64)}, bytes(64))


@case("overlaps")
def two_tensors_over_the_same_bytes(directory: Path) -> None:
    names = ("model.layers.0.a.weight", "model.layers.0.b.weight")
    raw_header(directory, {name: entry("F32", [4, 4], 0, 64) for name in names}, bytes(64))


@case("occurs twice")
def one_tensor_with_two_meanings(directory: Path) -> None:
    text = json.dumps(entry("F32", [4, 4], 0, 64))
    raw_header(directory, f'{{"a": {text}, "a": {text}}}'.encode(), bytes(64))


@case("occurs twice")
def config_with_two_meanings(directory: Path) -> None:
    (directory / CONFIG).write_text('{"model_type": "llama", "model_type": "gpt2"}')


@case("not valid Unicode")
def surrogate_in_a_tensor_name(directory: Path) -> None:
    raw_header(directory, {"model.layers.0.\ud800.weight": entry("F32", [4, 4], 0, 64)}, bytes(64))


@case("not valid Unicode")
def surrogate_in_the_config(directory: Path) -> None:
    (directory / CONFIG).write_text('{"name": "\\ud800"}')


@case("\\x1b[2J")
def terminal_escape_in_a_tensor_name(directory: Path) -> None:
    raw_header(directory, {"\x1b[2J\r\x07": entry("F31", [4, 4], 0, 64)}, bytes(64))


@case("not a file beside it")
def index_that_climbs(directory: Path) -> None:
    (directory.parent / "outside.safetensors").write_bytes((directory / SINGLE).read_bytes())
    index(directory, {"model.layers.0.a.weight": "../outside.safetensors"})


@case("not a file beside it")
def index_to_the_system(directory: Path) -> None:
    index(directory, {"model.layers.0.a.weight": "/etc/passwd"})


@case("not a file beside it")
def index_to_a_name_that_no_system_can_spell(directory: Path) -> None:
    index(directory, {"model.layers.0.a.weight": "\ud800"})


@case("cannot be read: File name too long")
def index_to_a_name_that_is_too_long(directory: Path) -> None:
    index(directory, {"model.layers.0.a.weight": "x" * 300})


@case("config.json: not a safetensors file")
def index_to_the_config(directory: Path) -> None:
    index(directory, {"model.layers.0.a.weight": "config.json"})


def sharded(directory: Path) -> None:
    """The checkpoint in two shards, with an index."""
    (directory / SINGLE).unlink()
    checkpoints.write(directory, checkpoints.llama(), cuts=(5,))


SECOND = "model-00002-of-00002.safetensors"


@case("model-00002-of-00002.safetensors: missing, the index names it")
def shard_that_is_missing(directory: Path) -> None:
    sharded(directory)
    (directory / SECOND).unlink()


@case("model-00002-of-00002.safetensors: not a regular file")
def shard_that_is_a_pipe(directory: Path) -> None:
    shard_that_is_missing(directory)
    os.mkfifo(directory / SECOND)


@case("model-00002-of-00002.safetensors: not a regular file")
def shard_that_is_a_directory(directory: Path) -> None:
    shard_that_is_missing(directory)
    (directory / SECOND).mkdir()


@case("model-00002-of-00002.safetensors: a link out of the directory")
def shard_that_lies_elsewhere(directory: Path) -> None:
    sharded(directory)
    outside = directory.parent / "outside.safetensors"
    (directory / SECOND).rename(outside)
    (directory / SECOND).symlink_to(outside)


@case("and again in model-00002-of-00002.safetensors")
def tensor_in_two_shards(directory: Path) -> None:
    sharded(directory)
    first = load_file(directory / "model-00001-of-00002.safetensors")
    second = load_file(directory / SECOND)
    save_file(second | dict(list(first.items())[:1]), directory / SECOND)


@case("which does not hold it")
def index_of_a_tensor_that_is_nowhere(directory: Path) -> None:
    sharded(directory)
    content = json.loads((directory / INDEX).read_text())
    content["weight_map"]["nowhere"] = SECOND
    (directory / INDEX).write_text(json.dumps(content))


@case("tokenizer.json: a link out of the directory, to /etc/passwd")
def tokenizer_of_the_system(directory: Path) -> None:
    (directory / "tokenizer.json").symlink_to("/etc/passwd")


@case("no weight_map")
def index_without_a_map(directory: Path) -> None:
    index(directory, ["model.safetensors"])


@case("not a regular file")
def pipe_for_weights(directory: Path) -> None:
    (directory / SINGLE).unlink()
    os.mkfifo(directory / SINGLE)


@case("not a regular file")
def pipe_for_a_config(directory: Path) -> None:
    (directory / CONFIG).unlink()
    os.mkfifo(directory / CONFIG)


@case("not a regular file")
def endless_device_for_a_config(directory: Path) -> None:
    (directory / CONFIG).unlink()
    (directory / CONFIG).symlink_to("/dev/zero")


@case("config.json")
def link_to_itself(directory: Path) -> None:
    (directory / CONFIG).unlink()
    (directory / CONFIG).symlink_to(CONFIG)


@case("larger than 100 MB")
def huge_config(directory: Path) -> None:
    os.truncate(directory / CONFIG, 100_000_001)


class Bomb:
    """Unpickling it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@case("not a safetensors file")
def pickle_under_another_name(directory: Path) -> None:
    (directory / SINGLE).write_bytes(pickle.dumps(Bomb(directory.parent / "exploded")))


@case("not a safetensors file")
def torch_archive_under_another_name(directory: Path) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Bomb(directory.parent / "exploded")))
    (directory / SINGLE).write_bytes(archive.getvalue())


@case("pickled")
def pickle_as_such(directory: Path) -> None:
    (directory / SINGLE).unlink()
    content = pickle.dumps(Bomb(directory.parent / "exploded"))
    (directory / "pytorch_model.bin").write_bytes(content)


@case("architectures")
def architectures_of_another_type(directory: Path) -> None:
    (directory / CONFIG).write_text('{"architectures": {"0": "LlamaForCausalLM"}}')


@case("quantized already")
def tensor_in_the_place_of_an_output(directory: Path) -> None:
    with_tensor(directory, "model.layers.0.mlp.up_proj.weight.absmax", torch.zeros(2))


@case("holds nan at [1, 2]")
def a_nan(directory: Path) -> None:
    weight = torch.ones(64, 64)
    weight[1, 2] = float("nan")
    with_tensor(directory, "model.layers.0.self_attn.q_proj.weight", weight)


@case("holds -inf at [63, 63]")
def an_infinity(directory: Path) -> None:
    weight = torch.ones(64, 64)
    weight[63, 63] = -float("inf")
    with_tensor(directory, "model.layers.0.self_attn.q_proj.weight", weight)


@case("quantized already")
def quantized_already(directory: Path) -> None:
    (directory / CONFIG).write_text('{"quantization_config": {"quant_method": "gptq"}}')


@case("quantized already")
def float8_weights(directory: Path) -> None:
    weight = torch.zeros(64, 64, dtype=torch.float8_e4m3fn)
    with_tensor(directory, "model.layers.0.self_attn.q_proj.weight", weight)
