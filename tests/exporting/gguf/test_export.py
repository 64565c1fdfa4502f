"""``export --layout gguf``: what is written, by gguf's reader and decoders, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

import loftq_cli
from loftq_cli.errors import InputError, LayoutError, LoftqError, UsageError
from tests.support import gguf_files, models
from tests.support.gguf_files import name_of, permuted

HEADS = (4, 2)
SYMMETRIC: dict[str, Any] = {
    "method": "uniform-symmetric",
    "layout": "compressed",
    "block_size": 32,
    "rank": 8,
    "iters": 1,
    "threads": 1,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.save(models.llama(), tmp_path_factory.mktemp("gguf") / "source")


@pytest.fixture(scope="module")
def output(source: Path) -> Path:
    loftq_cli.convert(source, source.parent / "out", bits=4, **SYMMETRIC)
    return source.parent / "out"


def exported(output: Path, place: Path, **settings: Any) -> dict[str, Any]:
    return loftq_cli.export(output, place, layout="gguf", **settings)


def q_of(output: Path, place: Path) -> dict[str, torch.Tensor]:
    """Q of every matrix, by its name, from an export in layout dense."""
    loftq_cli.export(output, place, layout="dense")
    return load_file(place / "model.safetensors")


def tensors(file: Path) -> dict[str, torch.Tensor]:
    return {
        tensor.name: torch.from_numpy(
            gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()
        )
        for tensor in gguf.GGUFReader(file).tensors
    }


def heads_of(name: str) -> int | None:
    return {"q_proj": HEADS[0], "k_proj": HEADS[1]}.get(name.split(".")[-2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_model_holds_q_and_the_adapter_its_product(dtype, source, output, tmp_path) -> None:
    skeleton = gguf_files.skeleton(source, tmp_path / "skeleton.gguf", HEADS, dtype)
    result = exported(output, tmp_path / "served", skeleton=skeleton, source=source)
    assert result["types"] == {"Q4_0": 14}
    found, pairs = (tensors(tmp_path / f"served/{n}.gguf") for n in ("model", "adapter"))
    quantized = q_of(output, tmp_path / "dense")
    start = load_file(output / "loftq_init/adapter_model.safetensors")
    before = tensors(skeleton)
    manifest = json.loads((output / "loftq_manifest.json").read_text())
    names = {entry["name"] for entry in manifest["matrices"]}
    assert len(pairs) == 2 * len(names)
    for name in names:
        module, heads, there = name.removesuffix(".weight"), heads_of(name), name_of(name)
        expected = quantized[name].float()
        product = (
            start[f"base_model.model.{module}.lora_B.weight"].double()
            @ start[f"base_model.model.{module}.lora_A.weight"].double()
        )
        if heads is not None:
            expected, product = permuted(expected, heads), permuted(product, heads)
        assert torch.equal(found.pop(there), expected), name
        lora_a, lora_b = (pairs[f"{there}.lora_{side}"].double() for side in "ab")
        torch.testing.assert_close(lora_b @ lora_a, product, rtol=1e-5, atol=1e-7)
    assert found  # what is left is the skeleton's
    assert all(torch.equal(tensor, before[name]) for name, tensor in found.items())


def test_the_header_is_the_skeletons_and_the_adapters_says_no_alpha(source, output, tmp_path):
    skeleton = gguf_files.skeleton(source, tmp_path / "skeleton.gguf", HEADS)
    exported(output, tmp_path / "served", skeleton=skeleton, source=source)
    model = gguf.GGUFReader(tmp_path / "served/model.gguf")
    assert model.fields["general.file_type"].contents() == 2  # mostly Q4_0
    assert model.fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]
    adapter = gguf.GGUFReader(tmp_path / "served/adapter.gguf").fields
    said = {name: adapter[name].contents() for name in adapter if not name.startswith("GGUF.")}
    assert said == {
        "general.type": "adapter",
        "general.architecture": "llama",
        "adapter.type": "lora",
        "adapter.lora.alpha": 0.0,
    }


def test_a_skeleton_of_the_conversions_own_values_needs_no_source(source, output, tmp_path) -> None:
    dense = q_of(output, tmp_path / "dense")
    save_file(dense, tmp_path / "dense/model.safetensors", metadata={"format": "pt"})
    skeleton = gguf_files.skeleton(tmp_path / "dense", tmp_path / "q.gguf", HEADS, torch.float32)
    result = exported(output, tmp_path / "served", skeleton=skeleton)
    assert result["types"] == {"Q4_0": 14}


@pytest.mark.parametrize(
    ("settings", "types"),
    [
        ({"bits": 2, "block_size": 64}, {"Q2_0": 14}),
        ({"bits": 3}, {"Q4_0": 14}),
        ({"bits": 8}, {"Q8_0": 14}),
        ({"bits": 4, "method": "uniform"}, {"Q4_1": 14}),
        ({"bits": 4, "method": "iq4-nl", "layout": "loftq", "block_size": 64}, {"IQ4_NL": 14}),
        ({"bits": 4, "method": "nf", "layout": "loftq"}, {"F16": 14}),
        ({"bits": 2, "method": "trellis", "layout": "loftq"}, {"F16": 14}),
    ],
)
def test_each_width_has_a_home(settings, types, source, tmp_path) -> None:
    """All hold Q exactly, but for 16 bits, which round it."""
    loftq_cli.convert(source, tmp_path / "out", **{**SYMMETRIC, **settings})
    skeleton = gguf_files.skeleton(source, tmp_path / "skeleton.gguf", HEADS)
    wanted = {"skeleton": skeleton, "source": source}
    result = exported(tmp_path / "out", tmp_path / "served", **wanted)
    assert result["types"] == types
    if types.keys() & {"F16"}:
        words = f"--strict: .* its levels are those of {settings['method']}"
        with pytest.raises(LayoutError, match=words):
            exported(tmp_path / "out", tmp_path / "strict", strict=True, **wanted)
        assert not (tmp_path / "strict").exists()
    if types.keys() & {"Q2_0", "F16"}:
        return
    found, quantized = (
        tensors(tmp_path / "served/model.gguf"),
        q_of(tmp_path / "out", tmp_path / "d"),
    )
    for name in [name for name in quantized if "_proj" in name]:
        heads, expected = heads_of(name), quantized[name].float()
        expected = expected if heads is None else permuted(expected, heads)
        assert torch.equal(found[name_of(name)], expected), name


def test_matrices_in_one_tensor_and_ranks_that_differ(source, tmp_path) -> None:
    """q, k and v in one tensor: A stacked, B of each in its rows."""
    settings = {**SYMMETRIC, "rank_map": "*.k_proj.*=3"}
    loftq_cli.convert(source, tmp_path / "out", bits=4, **settings)
    plain = gguf_files.skeleton(source, tmp_path / "plain.gguf", HEADS)
    held = {name: tensor.half() for name, tensor in tensors(plain).items()}
    fused = {}
    for block in range(2):
        parts = [held.pop(f"blk.{block}.attn_{leaf}.weight") for leaf in "qkv"]
        fused[f"blk.{block}.attn_qkv.weight"] = torch.cat(parts)
    rest = {name: t.float() if t.dim() == 1 else t for name, t in held.items()}
    skeleton = gguf_files.write(tmp_path / "skeleton.gguf", {**fused, **rest})
    exported(tmp_path / "out", tmp_path / "served", skeleton=skeleton, source=source)
    pairs = tensors(tmp_path / "served/adapter.gguf")
    start = load_file(tmp_path / "out/loftq_init/adapter_model.safetensors")
    lora_a, lora_b = (pairs[f"blk.1.attn_qkv.weight.lora_{side}"] for side in "ab")
    assert len(lora_a) == 8 + 3 + 8
    products = []
    for leaf in "qkv":
        stem = f"base_model.model.model.layers.1.self_attn.{leaf}_proj"
        product = start[f"{stem}.lora_B.weight"] @ start[f"{stem}.lora_A.weight"]
        heads = heads_of(f"{leaf}_proj.weight")
        products.append(product if heads is None else permuted(product, heads))
    torch.testing.assert_close(lora_b @ lora_a, torch.cat(products), rtol=1e-5, atol=1e-6)


def test_experts_of_a_layer_are_one_tensor(tmp_path) -> None:
    """As llama.cpp has them, (experts, out, in), of a Qwen3-MoE."""
    from tests.support import moe

    source = models.save(moe.make("qwen3_moe"), tmp_path / "source")
    settings = {**SYMMETRIC, "layout": "compressed", "include": ("*.experts.*",)}
    loftq_cli.convert(source, tmp_path / "out", bits=4, **settings)
    held = load_file(source / "model.safetensors")
    found: dict[str, torch.Tensor] = {}
    for name, tensor in held.items():
        layer, _, part = name.partition(".mlp.experts.")
        if part:
            leaf = part.split(".")[1]
            found.setdefault(f"{layer}.{leaf}_exps", torch.empty(4, *tensor.shape))
            found[f"{layer}.{leaf}_exps"][int(part.split(".")[0])] = tensor
        else:
            found[name] = tensor
    halved = {n: t if t.dim() == 1 else t.half() for n, t in found.items()}
    skeleton = gguf_files.write(tmp_path / "skeleton.gguf", halved)
    exported(tmp_path / "out", tmp_path / "served", skeleton=skeleton, source=source)
    pairs = tensors(tmp_path / "served/adapter.gguf")
    start = load_file(tmp_path / "out/loftq_init/adapter_model.safetensors")
    quantized, model = (
        q_of(tmp_path / "out", tmp_path / "d"),
        tensors(tmp_path / "served/model.gguf"),
    )
    for leaf in ("gate_proj", "down_proj"):
        name = f"model.layers.1.{leaf}_exps"
        product = pairs[f"{name}.lora_b"] @ pairs[f"{name}.lora_a"]
        for expert in range(4):
            stem = f"model.layers.1.mlp.experts.{expert}.{leaf}"
            sides = (start[f"base_model.model.{stem}.lora_{side}.weight"] for side in "BA")
            lora_B, lora_A = sides
            torch.testing.assert_close(product[expert], lora_B @ lora_A, rtol=1e-5, atol=1e-6)
            assert torch.equal(model[name][expert], quantized[f"{stem}.weight"].float())


def test_a_trained_adapter_takes_the_place_of_the_start(source, output, tmp_path) -> None:
    trained = Path(shutil.copytree(output / "loftq_init", tmp_path / "trained"))
    pairs = load_file(trained / "adapter_model.safetensors")
    doubled = {name: 2 * tensor for name, tensor in pairs.items()}
    save_file(doubled, trained / "adapter_model.safetensors", metadata={"format": "pt"})
    skeleton = gguf_files.skeleton(source, tmp_path / "skeleton.gguf", HEADS)
    wanted = {"skeleton": skeleton, "source": source}
    exported(output, tmp_path / "one", **wanted)
    exported(output, tmp_path / "two", adapter=trained, **wanted)
    one, two = (tensors(tmp_path / f"{name}/adapter.gguf") for name in ("one", "two"))
    assert all(torch.equal(2 * one[name], two[name]) for name in one)


def coded(source: Path, place: Path) -> Path:
    plain = tensors(gguf_files.skeleton(source, place / "plain.gguf", HEADS))
    writer = gguf.GGUFWriter(place / "coded.gguf", "llama")
    for name, tensor in plain.items():
        kind = gguf.GGMLQuantizationType.Q8_0
        raw = gguf.quants.quantize(tensor.numpy(), kind) if tensor.dim() == 2 else tensor.numpy()
        writer.add_tensor(name, raw, raw_dtype=kind if tensor.dim() == 2 else None)
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    return place / "coded.gguf"


def other(source: Path, place: Path) -> Path:
    held = load_file(source / "model.safetensors")
    moved = {name: 1.5 * tensor for name, tensor in held.items()}
    return gguf_files.skeleton(source, place / "strange.gguf", HEADS, instead=moved)


def partly(source: Path, place: Path) -> Path:
    name = "model.layers.0.mlp.up_proj.weight"
    weight = load_file(source / "model.safetensors")[name].clone()
    weight[3] += 1
    return gguf_files.skeleton(source, place / "partly.gguf", HEADS, instead={name: weight})


def twice(source: Path, place: Path) -> Path:
    held = load_file(source / "model.safetensors")
    first, second = (f"model.layers.{block}.mlp.up_proj.weight" for block in (0, 1))
    return gguf_files.skeleton(source, place / "twice.gguf", HEADS, instead={second: held[first]})


def adapters(source: Path, place: Path) -> Path:
    return gguf_files.write(
        place / "lora.gguf", {"a": torch.ones(2, 32)}, {"general.type": "adapter"}
    )


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (coded, "it is quantized already: .* is Q8_0"),
        (other, r"no rows of model\.layers\.0\..* and 13 more are in it"),
        (partly, r"blk\.0\.ffn_up\.weight: \d+ of its \d+ rows are in a matrix"),
        (twice, r"no rows of model\.layers\.1\.mlp\.up_proj\.weight are in it"),
        (adapters, "it is of type adapter, no model"),
    ],
)
def test_a_skeleton_of_something_else_is_refused(make, said, source, output, tmp_path) -> None:
    skeleton = make(source, tmp_path)
    with pytest.raises(LoftqError, match=said):
        exported(output, tmp_path / "served", skeleton=skeleton, source=source)
    assert not (tmp_path / "served").exists()


def test_without_the_source_a_skeleton_of_the_original_is_not_guessed(source, output, tmp_path):
    skeleton = gguf_files.skeleton(source, tmp_path / "skeleton.gguf", HEADS)
    with pytest.raises(InputError) as caught:
        exported(output, tmp_path / "served", skeleton=skeleton)
    assert "--source" in (caught.value.hint or "")


def test_embeddings_that_are_quantized_are_refused(source, tmp_path) -> None:
    loftq_cli.convert(source, tmp_path / "out", layout="loftq", embeddings=True, rank=4, iters=1)
    skeleton = gguf_files.skeleton(source, tmp_path / "skeleton.gguf", HEADS)
    with pytest.raises(LayoutError, match="no adapters for word embeddings"):
        exported(tmp_path / "out", tmp_path / "served", skeleton=skeleton, source=source)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "--layout gguf needs --skeleton"),
        ({"skeleton": "x.gguf", "pad_ranks": True}, "--pad-ranks is not for --layout gguf"),
        ({"skeleton": "x.gguf", "base_model": "me"}, "--base-model is not for"),
        ({"layout": "loftq", "skeleton": "x.gguf"}, "--skeleton is for --layout gguf"),
        ({"layout": "loftq", "strict": True}, "--strict is for --layout gguf"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, said, output, tmp_path) -> None:
    with pytest.raises(UsageError, match=said):
        loftq_cli.export(output, tmp_path / "served", **{"layout": "gguf", **settings})


def test_an_earlier_export_is_replaced_only_if_that_is_asked(source, output, tmp_path) -> None:
    skeleton = gguf_files.skeleton(source, tmp_path / "skeleton.gguf", HEADS)
    wanted = {"skeleton": skeleton, "source": source}
    exported(output, tmp_path / "served", **wanted)
    before = (tmp_path / "served/model.gguf").read_bytes()
    with pytest.raises(LoftqError, match="holds an export to GGUF"):
        exported(output, tmp_path / "served", **wanted)
    exported(output, tmp_path / "served", overwrite=True, **wanted)
    assert (tmp_path / "served/model.gguf").read_bytes() == before
    with pytest.raises(UsageError, match="holds the skeleton"):
        exported(output, tmp_path, overwrite=True, **wanted)
