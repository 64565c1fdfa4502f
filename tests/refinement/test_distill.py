"""How far a whole model is from its original, against textbook formulas in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from loftq_cli.calibration import outputs
from loftq_cli.errors import UnsupportedInputError
from loftq_cli.refinement import distill
from loftq_cli.refinement.chains import on_disk
from tests.support import models
from tests.support.quantizing import gaussian


def same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def test_with_every_token_known_it_is_the_divergence() -> None:
    theirs, ours = gaussian(2, 5, 30), gaussian(2, 5, 30, seed=1)
    known = [distill.told(one, same, logits=True) for one in theirs]
    p, q = (torch.log_softmax(each.double(), dim=-1) for each in (theirs, ours))
    expected = float((p.exp() * (p - q)).sum(dim=-1).mean())
    assert float(distill.distance(ours, known)) == pytest.approx(expected, rel=1e-4)
    assert float(distill.distance(theirs, known)) == pytest.approx(0.0, abs=1e-5)


def test_tokens_beyond_the_likeliest_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distill, "LIKELIEST", 4)
    theirs, ours = 2 * gaussian(1, 5, 30), 2 * gaussian(1, 5, 30, seed=1)
    found = float(distill.distance(ours, [distill.told(theirs[0], same, logits=True)]))
    p, q = (torch.softmax(each.double(), dim=-1)[0] for each in (theirs, ours))
    chosen = p.argsort(dim=1, descending=True)[:, :4]
    expected = torch.zeros(5, dtype=torch.float64)
    for row, tokens in enumerate(chosen):
        for a, b in [
            *((p[row, token], q[row, token]) for token in tokens),
            (1 - p[row, tokens].sum(), 1 - q[row, tokens].sum()),
        ]:
            expected[row] += a * (a / b).log()
    assert found == pytest.approx(float(expected.mean()), rel=1e-4)
    whole = p * (p / q).log()
    assert found <= float(whole.sum(dim=1).mean())  # lumping tells of less


@pytest.mark.parametrize("kind", ["llama", "bart", "bert"])
def test_what_models_say_is_held_on_disk_and_compared(kind: str, tmp_path: Path) -> None:
    model = getattr(models, kind)()
    ids = torch.randint(4, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    call = outputs.called(model, torch.device("cpu"), "--end-to-end")
    logits = outputs.predicts(model)
    assert logits == (kind != "bert")
    with torch.no_grad():
        output = call(ids)
        known = [distill.told(one, on_disk(tmp_path), logits=logits) for one in output]
        assert float(distill.distance(output, known)) == pytest.approx(0.0, abs=1e-5)
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape)
        assert float(distill.distance(call(ids), known)) > 1e-3
    assert list(tmp_path.iterdir()) == []
    if kind == "llama":
        assert output.shape == (2, 12, models.VOCABULARY)


def test_a_checkpointed_block_gives_the_same_gradient() -> None:
    model = models.llama()
    ids = torch.arange(4, 16)[None]
    grads, saved = [], []
    weight = model.model.layers[0].self_attn.q_proj.weight
    for blocks in ([], list(model.model.layers)):
        count = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal count
            count += tensor.numel()
            return tensor

        weight.grad = None
        with (
            outputs.checkpointed(blocks),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            loss = model(input_ids=ids).logits.square().mean()
            saved.append(count)
            loss.backward()
        grads.append(weight.grad.clone())
    torch.testing.assert_close(*grads)
    assert saved[1] < 0.5 * saved[0]
    assert all("forward" not in block.__dict__ for block in model.model.layers)


def test_a_model_of_neither_kind_is_refused() -> None:
    class Other(nn.Module):
        def forward(self, input_ids: torch.Tensor) -> object:
            return object()

    with pytest.raises(UnsupportedInputError, match="neither predictions nor hidden"):
        outputs.called(Other(), torch.device("cpu"), "--that")(torch.zeros(1, 1))
