"""PackedLinear: the weight is what the bytes say, and stays packed."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from loftq_cli.layouts.base import Matrix
from loftq_cli.layouts.loftq import PackedLayout, stored_block_size
from loftq_cli.loading.linear import PackedLinear
from loftq_cli.loading.packed_weight import PackedFormat
from loftq_cli.numerics.quantizers import methods
from loftq_cli.numerics.quantizers.methods import make_quantizer
from loftq_cli.numerics.quantizers.scale_storage import ScaleDtype
from tests.support.quantizing import prepared
from tests.support.synthetic import llm_like

FORMATS = [
    (method, bits, block_size, shape)
    for method, bits, block_size, shape in (
        ("nf", 2, 64, (48, 128)),
        ("nf", 3, 32, (7, 45)),
        ("nf", 4, 256, (5, 3)),
        ("nf-symmetric", 3, 128, (33, 70)),
        ("nf", 8, 64, (16, 96)),
        ("uniform", 2, 64, (48, 128)),
        ("uniform", 3, 32, (7, 45)),
        ("uniform", 4, 128, (1, 200)),
        ("uniform", 8, 256, (12, 300)),
        ("uniform-block", 2, 64, (9, 65)),
        ("uniform-tensor", 3, 64, (20, 33)),
    )
] + [
    ("trellis", 2, 64, (300, 40)),
    ("trellis", 2, 32, (40, 100), "int8"),
    ("nf", 2, 32, (40, 100), "bfloat16"),
    ("nf", 2, 32, (40, 100), "int8"),
    ("uniform", 4, 32, (40, 100), "bfloat16"),
    ("uniform", 4, 32, (40, 100), "int8"),
]
CASE = ("uniform", 3, 32, (24, 72))


def packed_linear(
    method: str,
    bits: int,
    block_size: int,
    shape: tuple[int, int],
    scales: ScaleDtype = "float32",
    bias: bool = True,
) -> tuple[PackedLinear, torch.Tensor]:
    """(a module filled from stored tensors, the weight that the layout decodes from them)."""
    weight = llm_like(*shape)
    quantizer = prepared(make_quantizer(method, bits, block_size, "absmax"), weight)
    fitted = quantizer.fit(weight, None)
    matrix = Matrix("m.weight", shape, "F32", method, bits, block_size)
    layout = PackedLayout(scales)
    stored = layout.encode(matrix, quantizer.assemble(fitted.codes, fitted.parameters))
    packing = PackedFormat(bits, stored_block_size(matrix), methods.method(method).decoding, scales)
    module = PackedLinear(shape[1], shape[0], packing, bias=bias)
    state = {name.removeprefix("m."): tensor for name, tensor in stored.items()}
    if bias:
        state["bias"] = torch.randn(shape[0])
    module.load_state_dict(state, assign=True)
    return module, layout.decode(matrix, stored)


@pytest.mark.parametrize("case", FORMATS, ids=str)
def test_is_the_linear_layer_of_the_decoded_weight(case) -> None:
    module, weight = packed_linear(*case)
    assert torch.equal(module.dequantize(), weight)
    x = torch.randn(2, 3, weight.shape[1], requires_grad=True)
    reference_x = x.detach().clone().requires_grad_()
    y = module(x)
    reference = functional.linear(reference_x, weight, module.bias)
    assert torch.equal(y, reference)
    seed = torch.randn_like(y)
    y.backward(seed)
    expected = torch.autograd.grad(reference, [reference_x, module.bias], seed)
    torch.testing.assert_close(x.grad, expected[0])
    torch.testing.assert_close(module.bias.grad, expected[1])
    assert module.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_computes_in_the_dtype_of_the_input(dtype) -> None:
    module, weight = packed_linear(*CASE)
    x = torch.randn(5, weight.shape[1], dtype=dtype, requires_grad=True)
    y = module(x)
    assert torch.equal(y, functional.linear(x, weight.to(dtype), module.bias.to(dtype)))
    y.sum().backward()
    assert x.grad.dtype == dtype
    assert module.bias.grad.dtype == torch.float32


def test_refuses_activations_cast_to_the_dtype_of_the_codes() -> None:
    module, weight = packed_linear(*CASE)
    with pytest.raises(TypeError, match=r"not torch\.uint8"):
        module(torch.randn(5, weight.shape[1]).to(module.weight.dtype))


def test_autocast_sets_the_compute_dtype_in_both_passes() -> None:
    module, weight = packed_linear(*CASE)
    x = torch.randn(5, weight.shape[1], requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(x)
        expected = functional.linear(x, weight, module.bias)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32


def test_nothing_of_the_size_of_the_weight_is_saved_for_backward() -> None:
    module, weight = packed_linear(*CASE)
    saved: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(2, weight.shape[1], requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        module(x)
    assert {id(tensor) for tensor in saved} >= {id(module.weight)}
    assert max(tensor.nbytes for tensor in saved) < weight.numel()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("scales", "taken"), [("float32", 512), ("bfloat16", 256), ("int8", 132)])
def test_takes_its_bits_plus_scales_in_memory(bits, scales, taken) -> None:
    module, weight = packed_linear("nf", bits, 64, (64, 128), scales, bias=False)
    held = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    assert held == weight.numel() * bits // 8 + taken + 2**bits * 4


@pytest.mark.parametrize(
    "move",
    [
        lambda module: module.to(torch.bfloat16),
        lambda module: module.half(),
        lambda module: module.double(),
        lambda module: module.type(torch.float16),
        lambda module: module.to("cpu", torch.bfloat16).to(torch.float32),
        lambda module: torch.nn.Sequential(module).to(torch.float16)[0],
    ],
)
@pytest.mark.parametrize("method", ["nf", "uniform"])
@pytest.mark.parametrize("scales", ["float32", "bfloat16", "int8"])
def test_moves_change_the_bias_only(method, scales, move) -> None:
    module, weight = packed_linear(method, 3, 32, (24, 72), scales)
    module.bias.grad = torch.ones_like(module.bias)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    moved = move(module)
    for name, tensor in moved.state_dict().items():
        if name != "bias":
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor, before[name])
    assert moved.bias.grad.dtype == moved.bias.dtype
    assert torch.equal(moved.dequantize(), weight)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant) -> None:
    module, weight = packed_linear(*CASE)
    x = torch.randn(4, weight.shape[1], requires_grad=True)
    (plain,) = torch.autograd.grad(module(x).square().sum(), x)
    again = checkpoint(module, x, use_reentrant=use_reentrant).square().sum()
    again.backward()
    assert torch.equal(x.grad, plain)
