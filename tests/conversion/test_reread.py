"""What arrives in the output, and that it arrives the same every time."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import loftq_cli
from loftq_cli.checkpoint.output import open_output, verify
from tests.support import checkpoints
from tests.support.bench import QUERY
from tests.support.checkpoints import BERT, LLAMA
from tests.support.contents import FAST, Converter, manifest, sha256, stored


def mixed_dtypes() -> checkpoints.Tensors:
    tensors = checkpoints.llama(layers=2)
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    mixed = {name: t.to(dtypes[i % 3]) for i, (name, t) in enumerate(tensors.items())}
    return mixed | {"model.position_ids": torch.arange(7), "model.mask": torch.tensor([True])}


@pytest.mark.parametrize("cuts", [(), (3, 9)], ids=["one file", "three shards"])
@pytest.mark.parametrize("settings", [{}, {"bits": 2}, {"bits": 3, "method": "nf"}])
def test_what_is_not_selected_arrives_unchanged(
    cuts: tuple[int, ...], settings: dict[str, Any], converted: Converter
) -> None:
    tensors = mixed_dtypes()
    output = converted(tensors, cuts=cuts, **settings)
    after = stored(output)
    kept = set(tensors) - set(checkpoints.matrices(tensors))
    assert {entry["name"] for entry in manifest(output)["passed_through"]} == kept
    for name in kept:
        assert after[name].dtype == tensors[name].dtype
        assert torch.equal(after[name].view(torch.uint8), tensors[name].view(torch.uint8))


def test_every_tensor_lies_in_the_shard_that_answers_to_its_source(converted: Converter) -> None:
    tensors = checkpoints.llama(layers=2)
    names = list(tensors)
    output = converted(tensors, cuts=(3, 9), bits=2, layout="dense")
    index = json.loads((output / "model.safetensors.index.json").read_bytes())
    weight_map, sizes = index["weight_map"], 0
    for number, (start, stop) in enumerate(((0, 3), (3, 9), (9, len(names))), start=1):
        file = f"model-{number:05d}-of-00003.safetensors"
        held = load_file(output / file)
        sizes += sum(tensor.nbytes for tensor in held.values())
        assert set(held) == set(names[start:stop])
        assert {name for name, shard in weight_map.items() if shard == file} == set(held)
        with safe_open(output / file, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
    assert index["metadata"]["total_size"] == sizes


def test_the_index_names_the_tensors_that_a_matrix_became(converted: Converter) -> None:
    output = converted(checkpoints.llama(), cuts=(3,), bits=2)
    index = json.loads((output / "model.safetensors.index.json").read_bytes())
    assert set(index["weight_map"]) == set(stored(output))
    assert f"{QUERY.removesuffix('.weight')}.qweight" in index["weight_map"]


def test_one_file_needs_no_index(converted: Converter) -> None:
    output = converted(checkpoints.llama())
    assert sorted(path.name for path in output.iterdir()) == [
        "config.json",
        "loftq_init",
        "loftq_manifest.json",
        "model.safetensors",
    ]


def test_tokenizer_and_licence_travel_and_code_and_other_weights_do_not(tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "model", checkpoints.llama())
    wanted = {"tokenizer.json", "generation_config.json", "LICENSE", "vocab.txt", "spiece.model"}
    unwanted = {
        *("modeling_custom.py", "LICENSE.py", "pytorch_model.bin", "other.safetensors"),
        *("optimizer.pt", "training_args.bin", ".gitattributes", "README.md"),
    }
    for name in wanted | unwanted:
        (source / name).write_bytes(name.encode())
    (source / "tokenizer_config.json").mkdir()  # a directory under an allowed name
    output = tmp_path / "out"
    loftq_cli.convert(source, output=output, **FAST)
    arrived = {path.name for path in output.iterdir()}
    assert not arrived & (unwanted | {"tokenizer_config.json"})
    for name in wanted:
        assert (output / name).read_bytes() == name.encode()


@pytest.mark.parametrize("layout", ["bnb", "gptq", "loftq", "dense"])
def test_the_config_keeps_its_keys_in_their_order(layout: str, converted: Converter) -> None:
    output = converted(checkpoints.llama(), layout=layout)
    config = json.loads((output / "config.json").read_bytes())
    added = [] if layout == "dense" else ["quantization_config"]
    assert list(config) == [*LLAMA, *added]
    assert {key: config[key] for key in LLAMA} == LLAMA


def test_the_manifest_lists_every_file_with_its_hash(converted: Converter) -> None:
    output = converted(checkpoints.llama(), cuts=(4,))
    written = {
        path.relative_to(output).as_posix(): (path.stat().st_size, sha256(path))
        for path in output.rglob("*")
        if path.is_file() and path.name != "loftq_manifest.json"
    }
    listed = manifest(output)["outputs"]
    assert {entry["name"]: (entry["size"], entry["sha256"]) for entry in listed} == written
    source = output.parent / "model"
    read = {path.name: (path.stat().st_size, sha256(path)) for path in source.iterdir()}
    listed = manifest(output)["source"]["files"]
    assert {entry["name"]: (entry["size"], entry["sha256"]) for entry in listed} == read


def test_files_have_ordinary_permissions(converted: Converter) -> None:
    output = converted(checkpoints.llama(), cuts=(4,))
    modes = {path.stat().st_mode & 0o777 for path in output.rglob("*") if path.is_file()}
    mask = os.umask(0)
    os.umask(mask)
    assert modes == {0o666 & ~mask}


def test_nothing_is_left_beside_the_output(converted: Converter) -> None:
    output = converted(checkpoints.llama())
    assert {path.name for path in output.parent.iterdir()} == {"model", "out"}


def test_the_same_recipe_gives_the_same_bytes_wherever_the_model_lies(tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "model", mixed_dtypes(), cuts=(4,))
    (source / "tokenizer.json").write_text("{}")
    elsewhere = tmp_path / "another place" / "copy"
    shutil.copytree(source, elsewhere)
    for number, model in enumerate((source, source, elsewhere)):
        loftq_cli.convert(model, output=tmp_path / f"out{number}", bits=2, **FAST)
    first = checkpoints.comparable(tmp_path / "out0")
    assert checkpoints.comparable(tmp_path / "out1") == first
    assert checkpoints.comparable(tmp_path / "out2") == first


AGAIN_AND_AGAIN = """
import sys
from loftq_cli.cli import main
output, *words = sys.argv[1:]
kept = []
for number in range(4):
    main([*words, "-o", f"{output}-{number}"], standalone_mode=False)
    kept.append(bytearray(1000 * number + 1))  # what is allocated next lies elsewhere
"""


def test_the_same_recipe_gives_the_same_bytes_twelve_times_in_three_processes(
    tmp_path: Path,
) -> None:
    # Large enough that products and sweeps are divided among the threads, which are not to spin
    # for each other: cores are few, and other tests run.
    source = checkpoints.write(tmp_path / "model", checkpoints.llama(hidden=256, intermediate=320))
    words = ["convert", str(source), "-q", "--bits", "2"]
    words += ["--method", "nf", "--rank", "8", "--iters", "3", "-t", "2"]
    for seed in range(3):
        subprocess.run(
            [sys.executable, "-c", AGAIN_AND_AGAIN, str(tmp_path / f"out{seed}"), *words],
            env={**os.environ, "PYTHONHASHSEED": str(seed), "OMP_WAIT_POLICY": "passive"},
            stdout=subprocess.DEVNULL,
            check=True,
        )
    first, *others = map(checkpoints.comparable, sorted(tmp_path.glob("out*")))
    assert len(others) == 11
    assert all(other == first for other in others)


def test_an_encoder_at_two_bits_is_stored_in_layout_loftq(converted: Converter) -> None:
    output = converted(checkpoints.bert(layers=2), BERT, bits=2)
    found = manifest(output)
    assert {record["layout"] for record in found["matrices"]} == {"loftq"}
    assert len(found["matrices"]) == 4
    verify(open_output(output))


def test_excluded_and_included_matrices(converted: Converter) -> None:
    tensors = checkpoints.llama()
    output = converted(tensors, include=["lm_head.*"], exclude="*.q_proj.*")
    found = manifest(output)
    names = {record["name"] for record in found["matrices"]}
    assert names == set(checkpoints.matrices(tensors)) - {QUERY} | {"lm_head.weight"}
    reasons = {entry["name"]: entry["reason"] for entry in found["passed_through"]}
    assert reasons[QUERY] == "excluded by --exclude"


def test_convert_returns_the_manifest_it_wrote(tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "model", checkpoints.llama())
    returned = loftq_cli.convert(str(source), output=str(tmp_path / "out"), **FAST)
    assert returned == manifest(tmp_path / "out")
