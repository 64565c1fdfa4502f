"""Packed layers in everything a training run does: each against the plain computation."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import torch
import transformers

import loftq_cli
from loftq_cli.loading.linear import PackedLinear
from tests.loading.test_linear import packed_linear

pytestmark = [
    # The name that every transformers 5 knows.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
    # torch.compile instantiates the class of an autograd function to look at it.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="there is no C++ compiler")
TOKENS = torch.arange(24).view(2, 12) + 3
UNIFORM = {"method": "uniform", "bits": 2}


def gradients(model, **autocast) -> dict[str, torch.Tensor]:
    """Of one step of language modelling, for every parameter that is trained."""
    model.zero_grad()
    with torch.autocast("cpu", enabled=bool(autocast), **autocast):
        model(TOKENS, labels=TOKENS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_close(actual, expected, **tolerance) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.any()
        torch.testing.assert_close(actual[name], gradient, **tolerance)


def packed_bytes(model) -> int:
    """Bytes that the packed layers hold, biases not counted."""
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert layers
    assert all(layer.bias is None for layer in layers)
    return sum(t.nbytes for layer in layers for t in (*layer.parameters(), *layer.buffers()))


def stored_bytes(manifest) -> float:
    return sum(
        matrix["shape"][0] * matrix["shape"][1] * matrix["bits_per_weight"] / 8
        for matrix in manifest["matrices"]
    )


@pytest.mark.parametrize("settings", [{}, UNIFORM], ids=["codebook", "affine"])
def test_a_model_holds_what_is_stored(converted, settings) -> None:
    directory = converted("llama", **settings)
    model = loftq_cli.load(directory)
    stored = stored_bytes(json.loads((directory / "loftq_manifest.json").read_text()))
    assert packed_bytes(model) == pytest.approx(stored, abs=1)
    gradients(model)
    assert packed_bytes(model) == pytest.approx(stored, abs=1)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(converted, reentrant) -> None:
    model = loftq_cli.load(converted("llama")).train()
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_close(gradients(model), expected)


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_autocast(converted, dtype, error) -> None:
    model = loftq_cli.load(converted("llama"))
    expected = gradients(model)
    actual = gradients(model, dtype=dtype)
    for name, gradient in expected.items():
        assert actual[name].dtype == torch.float32
        assert (actual[name] - gradient).norm() < error * gradient.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_prepare_model_for_kbit_training(converted, dtype) -> None:
    directory = converted("llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    before = packed_bytes(model)
    model = peft.prepare_model_for_kbit_training(model)
    assert packed_bytes(model) == before
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32, torch.uint8}
    model = peft.PeftModel.from_pretrained(
        model, directory, subfolder="loftq_init", is_trainable=True
    )
    if dtype == torch.float32:
        assert_close(gradients(model), gradients(loftq_cli.load(directory)))
    assert all("lora_" in name for name in gradients(model))


def trainer(model, directory, **arguments):
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 90, (8, 12))]
    settings = transformers.TrainingArguments(
        directory,
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=3e-3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        **arguments,
    )
    return transformers.Trainer(model, settings, train_dataset=rows)


EMBEDDINGS = {"embeddings": True}


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        ({}, {}),
        ({"bf16": True}, {}),
        ({"gradient_checkpointing": True}, {}),
        ({"torch_compile": True}, {}),
        ({}, EMBEDDINGS),
        ({"bf16": True}, {**EMBEDDINGS, **UNIFORM}),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*use_reentrant:UserWarning")
def test_trainer_changes_every_adapter_and_nothing_else(
    converted, tmp_path, arguments, settings
) -> None:
    if "torch_compile" in arguments:
        arguments = {**arguments, "torch_compile_backend": "aot_eager"}
    torch.manual_seed(0)
    model = loftq_cli.load(converted("llama", **settings))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer(model, tmp_path, **arguments).train()
    changed = {
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert changed == {name for name in before if "lora_" in name}
    assert any("lora_embedding_" in name for name in changed) == ("embeddings" in settings)


@pytest.mark.parametrize("settings", [UNIFORM, {**UNIFORM, **EMBEDDINGS}], ids=str)
def test_what_training_saved_loads_again(converted, tmp_path, settings) -> None:
    directory = converted("llama", **settings)
    model = loftq_cli.load(directory)
    trainer(model, tmp_path / "work").train()
    model.save_pretrained(tmp_path / "trained")
    backbone = transformers.AutoModelForCausalLM.from_pretrained(directory)
    again = peft.PeftModel.from_pretrained(backbone, tmp_path / "trained", is_trainable=True)
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_the_start_and_a_trained_adapter_in_one_model(converted, tmp_path) -> None:
    """Two adapters of the same backbone, switched between."""
    directory = converted("llama")
    model = loftq_cli.load(directory)
    start = model.eval()(TOKENS).logits
    trainer(model.train(), tmp_path / "work").train()
    model.save_pretrained(tmp_path / "trained")
    end = model.eval()(TOKENS).logits
    both = loftq_cli.load(directory, trainable=False)
    both.load_adapter(tmp_path / "trained", "trained")
    for name, expected in (("default", start), ("trained", end), ("default", start)):
        both.set_adapter(name)
        assert torch.equal(both(TOKENS).logits, expected)


NF2 = ("nf", 2, 64, (48, 128))
COMPILED = [
    pytest.param("inductor", NF2, marks=needs_compiler),
    ("aot_eager", NF2),
    ("aot_eager", ("nf", 3, 32, (7, 45))),
    ("aot_eager", ("uniform", 3, 32, (24, 72))),
    ("aot_eager", ("trellis", 2, 32, (270, 36))),
    ("aot_eager", ("trellis", 2, 32, (40, 64))),
]


@pytest.mark.parametrize(("backend", "case"), COMPILED)
def test_torch_compile_in_one_graph(case, backend) -> None:
    torch._dynamo.reset()
    module, weight = packed_linear(*case)
    x = torch.randn(4, weight.shape[1], requires_grad=True)
    expected = module(x)
    (gradient,) = torch.autograd.grad(expected.square().sum(), x)
    actual = torch.compile(module, fullgraph=True, backend=backend)(x)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual.square().sum(), x)[0], gradient)
    decoded = torch.compile(module.dequantize, fullgraph=True, backend=backend)()
    assert torch.equal(decoded, weight)


@pytest.mark.parametrize(("method", "bits"), [("nf", 3), ("uniform", 3), ("trellis", 2)])
def test_on_the_meta_device_only_shapes_are_computed(method, bits) -> None:
    module, _ = packed_linear(method, bits, 32, (24, 72))
    moved = module.to("meta")
    assert moved.dequantize().shape == (24, 72)
    output = moved(torch.empty(2, 5, 72, device="meta", dtype=torch.bfloat16))
    assert (output.shape, output.dtype) == ((2, 5, 24), torch.bfloat16)


@pytest.mark.filterwarnings("ignore::loftq_cli.loading.warned.DetachedAdapter")
def test_a_model_is_filled_from_the_meta_device(converted) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(converted("llama"))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model(TOKENS).logits
    empty = model.to("meta")
    empty.load_state_dict(state, assign=True)
    empty.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    assert torch.equal(empty(TOKENS).logits, expected)
