"""What has to hold on a CUDA device: the CPU's residuals, the same bytes twice, the same decoded
bits, and a model that goes all the way."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

import loftq_cli
from loftq_cli.checkpoint.packing import packed_length
from loftq_cli.loading.packed_weight import _triton_decode
from loftq_cli.numerics import feedback, fused_panel
from loftq_cli.numerics.quantizers import decoding
from loftq_cli.numerics.quantizers.methods import make_quantizer, names, widths
from loftq_cli.numerics.quantizers.packed import Packed
from tests.support import checkpoints
from tests.support.steps import train
from tests.support.synthetic import llm_like
from tests.whole.gpu.scale import Scale

_CLOSE = 2e-3  # of residuals: sums in another order, and products in bfloat16


def methods_of() -> list[tuple[str, int]]:
    """Every method at its narrowest width."""
    return [(name, min(widths(name))) for name in names()]


def inputs(columns: int) -> torch.Tensor:
    """Full second moments, float32 (columns, columns), of inputs some of which hang together."""
    drawn = torch.randn(2 * columns, columns, generator=torch.Generator().manual_seed(1))
    drawn[:, 1:] += drawn[:, :-1]
    return drawn.T @ drawn / len(drawn)


def methods(device: torch.device, scale: Scale, place: Path) -> list[str]:
    """Residuals of a device against the CPU's, and twice the same bits."""
    weight = llm_like(*scale.checked)
    full = inputs(scale.checked[1])
    worst = 0.0
    for method, bits in methods_of():
        for moments in (None, full.diagonal().clone(), full):
            settings: dict[str, Any] = {
                "method": method,
                "bits": bits,
                "rank": 8,
                "iters": min(scale.iters, 3),
            }
            here = loftq_cli.decompose(weight, moments=moments, **settings)
            there = loftq_cli.decompose(weight.to(device), moments=moments, **settings)
            again = loftq_cli.decompose(weight.to(device), moments=moments, **settings)
            case = f"{method}, {bits} bits, {moments if moments is None else moments.dim()}"
            assert torch.equal(there.quantized.codes, again.quantized.codes), case
            assert torch.equal(there.lora_A, again.lora_A), case
            assert torch.equal(there.lora_B, again.lora_B), case
            expected = (here.weighted or here.frobenius).final
            found = (there.weighted or there.frobenius).final
            off = abs(found - expected) / expected
            assert off < 10 * _CLOSE, f"{case}: {found} instead of {expected}"
            worst = max(worst, off)
    return [f"{len(methods_of())} methods; residuals differ by {worst:.1e} at most."]


def kernels(device: torch.device, scale: Scale, place: Path) -> list[str]:
    """Decoding bit for bit; feedback's panels but for the order of sums."""
    lines = []
    fused = _triton_decode()
    if fused is None:
        return ["triton is not installed: not tested."]
    count = 0
    for bits in (2, 3, 4, 8):
        for affine in (False, True):
            packed = _random(bits, affine, device)
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                assert torch.equal(fused(packed, dtype), decoding.decode(packed, dtype)), bits
                count += 1
    lines.append(f"Decoding: {count} cases, every bit the same.")
    for method, bits in (("nf", 2), ("nf", 4), ("uniform", 2), ("uniform", 8)):
        share = _same_panel(method, bits, device)
        assert share > 0.999, f"{method}, {bits} bits: {share:.4%} of the codes are the same"
        lines.append(f"Feedback, {method}, {bits} bits: {share:.4%} of the codes are the same.")
    return lines


def _random(bits: int, affine: bool, device: torch.device) -> Packed:
    shape, size = (48, 192), 64
    drawn = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 256, (packed_length(48 * 192, bits),), generator=drawn)
    scales = torch.randn(48 * 3, generator=drawn).to(device)
    zeros = torch.randint(0, 256, (packed_length(48 * 3, bits),), generator=drawn)
    levels = torch.randn(2**bits, generator=drawn).to(device)
    kept = zeros.to(torch.uint8).to(device) if affine else None
    packed = codes.to(torch.uint8).to(device)
    return Packed(shape, bits, size, packed, scales, kept, None if affine else levels)


def _same_panel(method: str, bits: int, device: torch.device) -> float:
    quantizer = make_quantizer(method, bits, 64, "mse", False, native=False)
    panel = fused_panel.fused_panel(quantizer, device)
    assert panel is not None, "no kernel for it"
    drawn = torch.Generator().manual_seed(0)
    factor = torch.randn(64, 64, generator=drawn).triu(1).mul(0.1) + torch.eye(64)
    targets, added = (torch.randn(64, 500, generator=drawn) for _ in range(2))
    scales = torch.rand(64, 500, generator=drawn) + 0.1
    zeros = torch.randint(1, 2**bits, (64, 500), generator=drawn).float()
    given = [each.to(device) for each in (targets, added, factor, scales)]
    where = zeros.to(device) if method == "uniform" else None
    codes, values = panel(*given, where, dtype=None)
    expected, wanted = feedback._quantize_panel(
        quantizer, given[0], given[1], given[2], given[3], where, None
    )
    assert torch.isfinite(values).all()
    assert torch.equal(values[codes == expected].cpu(), wanted[codes == expected].cpu())
    return float((codes == expected).double().mean())


def whole_way(device: torch.device, scale: Scale, place: Path) -> list[str]:
    """Measured, converted, refined, loaded, trained and merged on the device."""
    from tests.support import models

    work = place / "way"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    models.save_tokenizer(models.save(models.llama(), work / "model"))
    text = work / "text.txt"
    text.write_text("When the wind blew from the east, the mill stood still. " * 20)
    name = str(device)
    stats, out = work / "stats.safetensors", work / "out"
    loftq_cli.calibrate(
        work / "model", text, stats, moments="full", length=20, samples=8, device=name
    )
    settings: dict[str, Any] = {"bits": 2, "method": "nf", "rank": 4, "iters": 2}
    loftq_cli.convert(work / "model", out, stats=stats, device=name, **settings)
    loftq_cli.refine(
        out,
        work / "refined",
        source=work / "model",
        text=text,
        epochs=1,
        device=name,
        length=20,
        samples=8,
    )
    found = {
        each: loftq_cli.evaluate(
            work / each, text=text, source=work / "model", device=name, length=20, samples=8
        )["kl"]
        for each in ("out", "refined")
    }
    losses = _trained(work, device)
    assert losses[-1] < losses[0], losses
    loftq_cli.merge(work / "refined", work / "merged", adapter=work / "trained")
    loftq_cli.inspect(work / "refined", verify=True)
    return [
        f"KL {found['out']:.4f}, refined {found['refined']:.4f}; "
        f"loss in training {losses[0]:.3f} to {losses[-1]:.3f}."
    ]


def _trained(work: Path, device: torch.device) -> list[float]:
    model = loftq_cli.load(work / "refined").to(device).train()
    losses = train(model, device, steps=5)
    model.save_pretrained(work / "trained")
    return losses


def several(device: torch.device, scale: Scale, place: Path) -> list[str]:
    """--device all against one of them."""
    count = torch.cuda.device_count()
    if count == 1:
        return ["There is one device: not tested."]
    work = place / "several"
    shutil.rmtree(work, ignore_errors=True)
    source = checkpoints.write(
        work / "model", checkpoints.llama(layers=min(scale.layers, 4)), cuts=(5,)
    )
    settings: dict[str, Any] = {"bits": 2, "method": "nf", "rank": 4, "iters": min(scale.iters, 3)}
    outputs = []
    for name in (str(device), "all"):
        output = work / name.replace(":", "")
        loftq_cli.convert(source, output, device=name, **settings)
        outputs.append(checkpoints.comparable(output))
    assert outputs[0] == outputs[1]
    return [f"{count} devices: the same bytes."]
