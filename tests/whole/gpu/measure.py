"""Figures of a CUDA device: seconds a matrix, a whole checkpoint, decoding, a step of training."""

from __future__ import annotations

import importlib.util
import json
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import loftq_cli
from loftq_cli.checkpoint.header import TensorSpec
from loftq_cli.checkpoint.packing import packed_length
from loftq_cli.checkpoint.writer import GrowingShard
from loftq_cli.loading.packed_weight import PackedFormat, PackedTensors, dense
from tests.support.synthetic import llm_like
from tests.whole.gpu.scale import Scale

_METHODS = (
    *(("nf", 2), ("nf", 4), ("nf-symmetric", 2), ("fitted", 2), ("iq4-nl", 4), ("uniform", 2)),
    *(("uniform", 4), ("uniform-symmetric", 4), ("uniform-block", 2), ("uniform-tensor", 2)),
)
_PEFT_STEPS = 5


def seconds(work: Callable[[], object], device: torch.device, runs: int) -> float:
    """Median of ``runs``, after one that is not counted."""
    times = []
    for _ in range(runs + 1):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        work()
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def roofs(device: torch.device, scale: Scale, place: Path) -> list[str]:
    """What the device can do at best: copies, and products in bfloat16."""
    copied, multiplied = _copy(device, scale), _product(device, scale)
    return [f"Copy: {copied:,.0f} GB/s, read and written. bfloat16: {multiplied:,.0f} TFLOP/s."]


def _copy(device: torch.device, scale: Scale) -> float:
    square = torch.zeros(scale.roof, scale.roof, device=device)
    other = torch.empty_like(square)
    took = seconds(lambda: other.copy_(square), device, 10 * scale.runs)
    return 2 * square.nbytes / took / 1e9


def _product(device: torch.device, scale: Scale) -> float:
    square = torch.zeros(scale.roof, scale.roof, device=device, dtype=torch.bfloat16)
    took = seconds(lambda: square @ square, device, 10 * scale.runs)
    return 2 * scale.roof**3 / took / 1e12


def matrices(device: torch.device, scale: Scale, place: Path) -> list[str]:
    """Every method at T = 5, and PEFT's way: an SVD of all of the residual in every step."""
    lines = _head("method", *(f"{out} x {columns}" for out, columns in scale.shapes for _ in "123"))
    kinds = [kind for _ in scale.shapes for kind in ("plain", "diagonal", "full, feedback")]
    lines.append(_row("", *kinds))
    prepared = [
        (llm_like(*shape).bfloat16().to(device), _moments(shape[1], device))
        for shape in scale.shapes
    ]
    for method, bits in _METHODS:
        cells = []
        for weight, full in prepared:
            for moments in (None, full.diagonal().clone(), full):
                settings: dict[str, Any] = {
                    "method": method,
                    "bits": bits,
                    "rank": scale.rank,
                    "iters": scale.iters,
                }
                work = partial(loftq_cli.decompose, weight, moments=moments, **settings)
                cells.append(f"{seconds(work, device, scale.runs):.3f} s")
        lines.append(_row(f"{method}, {bits} bit", *cells))
    cells = []
    for weight, _ in prepared:
        work = partial(torch.linalg.svd, weight.float(), full_matrices=False)
        cells += [f"{_PEFT_STEPS * seconds(work, device, 1):.3f} s", "-", "-"]
    lines.append(_row(f"{_PEFT_STEPS} full SVDs, as PEFT", *cells))
    return lines


def _moments(columns: int, device: torch.device) -> torch.Tensor:
    drawn = torch.randn(columns + 64, columns, generator=torch.Generator().manual_seed(1))
    drawn = drawn.to(device)
    return drawn.T @ drawn / len(drawn)


def decoding(device: torch.device, scale: Scale, place: Path) -> list[str]:
    """Packed codes to bfloat16, in parts of what copying moves in that time."""
    copied, shape = _copy(device, scale), scale.shapes[-1]
    lines = _head("bits", "GB/s", "of a copy")
    for bits in (2, 3, 4):
        count = shape[0] * shape[1]
        codes = torch.zeros(packed_length(count, bits), dtype=torch.uint8, device=device)
        scales = torch.ones(-(-count // 64), device=device)
        levels = torch.linspace(-1, 1, 2**bits).to(device)
        held = PackedTensors(codes, scales, None, None, levels)
        packing = PackedFormat(bits, 64, "codebook")
        took = seconds(
            partial(dense, shape, packing, torch.bfloat16, held), device, 20 * scale.runs
        )
        speed = (codes.nbytes + scales.nbytes + 2 * count) / took / 1e9
        lines.append(_row(str(bits), f"{speed:,.0f}", f"{speed / copied:.0%}"))
    return [*lines, "", "Wanted: 70 % of a copy."]


def checkpoint(device: torch.device, scale: Scale, place: Path) -> list[str]:
    """A synthetic checkpoint of Llama's shapes, from disk to output."""
    work = place / "checkpoint"
    shutil.rmtree(work, ignore_errors=True)
    size = _write(work / "model", device, scale)
    read = _read(work / "model")
    lines = _head("", "seconds", "of reading")
    lines.append(_row(f"reading {size / 1e9:.1f} GB", f"{read:.1f}", "1.0"))
    for method, bits, layout in (("nf", 4, "bnb"), ("nf", 2, "loftq")):
        began = time.perf_counter()
        manifest = loftq_cli.convert(
            work / "model",
            work / layout,
            method=method,
            bits=bits,
            layout=layout,
            rank=scale.rank,
            iters=scale.iters,
            device=str(device),
        )
        took = time.perf_counter() - began
        peak = manifest["environment"]["peak_device_bytes"] / 2**30
        name = f"{method}, {bits} bit, {len(manifest['matrices'])} matrices, {peak:.1f} GiB"
        lines.append(_row(name, f"{took:.1f}", f"{took / read:.1f}"))
    shutil.rmtree(work)
    return [*lines, "", "Wanted: 30 s of device time, and 1.5 times reading."]


def _write(directory: Path, device: torch.device, scale: Scale) -> int:
    """A checkpoint in bfloat16, a shard for every four layers; its bytes."""
    directory.mkdir(parents=True)
    hidden, wide = scale.hidden, scale.intermediate
    shards: list[dict[str, tuple[int, ...]]] = [{"model.embed_tokens.weight": (256, hidden)}]
    for layer in range(scale.layers):
        if layer % 4 == 0:
            shards.append({})
        prefix = f"model.layers.{layer}"
        for module in "qkvo":
            shards[-1][f"{prefix}.self_attn.{module}_proj.weight"] = (hidden, hidden)
        for module, shape in (
            ("gate", (wide, hidden)),
            ("up", (wide, hidden)),
            ("down", (hidden, wide)),
        ):
            shards[-1][f"{prefix}.mlp.{module}_proj.weight"] = shape
        for norm in ("input", "post_attention"):
            shards[-1][f"{prefix}.{norm}_layernorm.weight"] = (hidden,)
    shards.append({"model.norm.weight": (hidden,), "lm_head.weight": (256, hidden)})
    where: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        specs = [TensorSpec(each, "BF16", shape) for each, shape in tensors.items()]
        with GrowingShard(directory / name, specs) as file:
            for spec in specs:
                drawn = torch.randn(spec.shape, device=device).mul_(0.02).bfloat16()
                file.write(spec.name, drawn.cpu())
        where |= dict.fromkeys(tensors, name)
    size = sum(path.stat().st_size for path in directory.iterdir())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": scale.layers,
        "num_attention_heads": max(hidden // 128, 1),
        "vocab_size": 256,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return size


def _read(directory: Path) -> float:
    """Seconds to read every byte once."""
    began, buffer = time.perf_counter(), bytearray(16 << 20)
    for path in sorted(directory.iterdir()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - began


def training(device: torch.device, scale: Scale, place: Path) -> list[str]:
    """A step of AdamW on the adapter of a model of some layers: 2 bits in layout loftq, and, if
    bitsandbytes is there, 4 bits in layout bnb."""
    work = place / "training"
    shutil.rmtree(work, ignore_errors=True)
    _write(work / "model", device, replace(scale, layers=scale.trained))
    cases = [("2 bits, loftq", {"bits": 2, "layout": "loftq"})]
    if _has_bitsandbytes():
        cases.append(("4 bits, bitsandbytes", {"bits": 4, "layout": "bnb"}))
    lines = _head("", "seconds a step", "GiB at most")
    for name, settings in cases:
        output = work / str(settings["layout"])
        kept: dict[str, Any] = {"rank": scale.rank, "method": "nf", "iters": 1, **settings}
        loftq_cli.convert(work / "model", output, device=str(device), **kept)
        model = loftq_cli.load(output, dtype=torch.bfloat16).to(device).train()
        wanted = [each for each in model.parameters() if each.requires_grad]
        optimizer = torch.optim.AdamW(wanted, lr=1e-5)
        ids = torch.randint(0, 256, (1, scale.tokens)).to(device)
        torch.cuda.reset_peak_memory_stats(device)
        took = seconds(partial(_step, model, optimizer, ids), device, 3 * scale.runs)
        peak = torch.cuda.max_memory_allocated(device) / 2**30
        lines.append(_row(name, f"{took:.3f}", f"{peak:.2f}"))
        del model, optimizer, wanted
    shutil.rmtree(work)
    return [*lines, "", f"{scale.trained} layers, {scale.tokens} tokens."]


def _has_bitsandbytes() -> bool:
    return importlib.util.find_spec("bitsandbytes") is not None


def _step(model: Any, optimizer: Any, ids: torch.Tensor) -> None:
    optimizer.zero_grad()
    model(input_ids=ids, labels=ids)["loss"].backward()
    optimizer.step()


def _head(*columns: str) -> list[str]:
    return [_row(*columns), "|" + " --- |" * len(columns)]


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
