"""Every layout in the hands of the libraries that read it."""

from __future__ import annotations

import pytest
import torch

from tests.whole.interop.cases import CASES, LIBRARY, parameters

every_case = pytest.mark.parametrize("case", parameters(CASES))


@every_case
def test_backbone_loads_completely(case, results) -> None:
    result = results(case)
    assert not any(result["info"].values()), result["info"]
    assert result["imported_loftq"] == (case.layout == "loftq")


@every_case
def test_only_the_converted_modules_are_quantized(case, output, results) -> None:
    converted = {matrix.module for matrix in output(case).matrices()}
    layers = results(case)["layers"]
    assert converted <= layers.keys()
    assert {layers[name] for name in converted} == {LIBRARY[case.layout]}
    assert {layers[name] for name in layers.keys() - converted} <= {"torch"}


@every_case
def test_weights_decode_as_ours(case, output, results) -> None:
    decoded = results(case)["tensors"]
    for module, expected in output(case).backbone().items():
        actual = decoded[f"weight/{module}"]
        if case.layout == "gptq":
            # gptqmodel multiplies in float16: half a unit in the last place of the product.
            torch.testing.assert_close(actual, expected, rtol=2**-10, atol=2**-24)
        else:
            assert torch.equal(actual, expected), module


@every_case
def test_adapter_attaches_completely(case, results) -> None:
    result = results(case)
    assert result["adapter_missing"] == result["adapter_unexpected"] == []
    assert result["adapter_differs"] == result["warnings"] == []


@every_case
def test_output_is_that_of_a_dense_model_with_q_plus_ba(case, output, results) -> None:
    expected = output(case).dense_outputs()
    actual = results(case)["tensors"]["output"]
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < case.tolerance


@every_case
def test_training_lowers_the_loss_and_changes_the_adapter_only(case, results) -> None:
    result = results(case)
    assert result["losses"][-1] < result["losses"][0]
    assert result["changed"] == result["trainable"]
    assert len(result["trainable"]) == 2 * sum(
        1 for name in result["trainable"] if name.endswith(".lora_A.default.weight")
    )


@every_case
def test_evaluation_mode_computes_the_same(case, results) -> None:
    tensors = results(case)["tensors"]
    trained = tensors["trained"]
    error = (tensors["evaluated"] - trained).abs().max() / trained.abs().max()
    # bitsandbytes evaluates in bfloat16 on CPUs that have instructions for it.
    assert error < (3e-2 if case.layout == "bnb" else case.tolerance)


@pytest.mark.parametrize("case", parameters([case for case in CASES if case.layout == "loftq"]))
def test_loftq_takes_its_bits_in_memory(case, output, results) -> None:
    held = results(case)["held"]
    tensors = output(case).tensors
    for matrix in output(case).matrices():
        suffixes = ("", "_scales", "_scale_steps", "_levels", "_zeros")
        stored = [tensors.get(f"{matrix.name}{suffix}") for suffix in suffixes]
        sizes = [0 if tensor is None else tensor.nbytes for tensor in stored]
        assert held[matrix.module] == sum(sizes)
        assert sizes[0] == -(-matrix.elements * matrix.bits // 8)
