"""What the language benchmark measures, and on what."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.benchmarks.language import brown, page
from tests.benchmarks.language.measure import Originals, distance, log_probabilities
from tests.benchmarks.language.text import documents, part_of

ZERO = {"perplexity": 0.0, "divergence": 0.0}
KEYS = (
    *ZERO,
    "agreement",
    "plain",
    "weighted",
    "bits",
    "adapter_bits",
    "seconds",
    "gigabytes",
)


class Bigrams:
    """A language model of three tokens that looks at the last one only."""

    def __init__(self, probabilities: list[list[float]]) -> None:
        self._logits = torch.tensor(probabilities).log() + 5.0

    def __call__(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self._logits[input_ids])


def test_perplexity_divergence_and_agreement_by_hand() -> None:
    reference = Bigrams([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]])
    model = Bigrams([[0.25, 0.5, 0.25], [0.2, 0.6, 0.2], [0.2, 0.2, 0.6]])
    windows = torch.tensor([[0, 1, 1], [2, 0, 2]])  # 0 then 1, 1 then 1; 2 then 0, 0 then 2
    expected = [log_probabilities(reference, window) for window in windows]

    found = distance(model, expected, windows)

    assert found.perplexity == pytest.approx((0.5 * 0.6 * 0.2 * 0.25) ** (-1 / 4))
    after_0 = 0.5 * math.log(0.5 / 0.25) + 0.25 * math.log(0.25 / 0.5)
    after_1 = 2 * 0.1 * math.log(0.1 / 0.2) + 0.8 * math.log(0.8 / 0.6)
    assert found.divergence == pytest.approx((2 * after_0 + after_1) / 4, rel=1e-5)
    assert found.agreement == 0.5  # after 0 it takes 1 for the most likely, twice
    assert distance(reference, expected, windows).divergence == 0.0


def test_residuals_are_of_the_matrix_with_its_adapter() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 4, generator=generator)
    inputs = torch.randn(50, 4, generator=generator) * torch.tensor([5.0, 1.0, 1.0, 0.1])
    layer = torch.nn.Linear(4, 3, bias=False)
    model = torch.nn.ModuleDict({"layer": layer})
    with torch.no_grad():
        layer.weight.copy_(weight + 0.1 * torch.randn(3, 4, generator=generator))

    plain, weighted = Originals(
        {"layer": weight}, {"layer": inputs.T @ inputs / len(inputs)}
    ).residuals(model)

    error = layer.weight.detach() - weight
    assert plain == pytest.approx(float(error.norm() / weight.norm()), rel=1e-5)
    outputs, wrong = inputs @ weight.T, inputs @ error.T
    assert weighted == pytest.approx(float(wrong.norm() / outputs.norm()), rel=1e-4)


@given(st.lists(st.integers(1, 500), max_size=60))
def test_sentences_of_an_editorial_stay_together(numbers: list[int]) -> None:
    sentences = [(f"{number}_{at}", f"<{number}.{at}>") for at, number in enumerate(numbers)]
    texts: dict[str, str] = {"calibration": "", "training": "", "evaluation": ""}

    found = documents(sentences)
    for number, text in found.items():
        texts[part_of(number)] += text

    for number in found:
        holding = [part for part, text in texts.items() if f"<{number}." in text]
        assert holding == [part_of(number)]
    assert sum(text.count("<") for text in texts.values()) == len(numbers)


def test_every_part_gets_its_share_of_the_editorials() -> None:
    parts = [part_of(str(number)) for number in range(1, 501)]
    assert {part: parts.count(part) // 50 for part in set(parts)}.keys() == {
        "calibration",
        "training",
        "evaluation",
    }
    assert parts.count("training") > parts.count("evaluation") > 50


def test_browns_tags_and_spacing_are_taken_off() -> None:
    lines = [
        "",
        "\tThe/at Fulton/np-tl jury/nn said/vbd ``/`` no/at evidence/nn ''/'' ,/, (/( and/cc )/) "
        "left/vbd ./. ",
        "Why/wrb 1/2/cd ?/. ?/.",
    ]
    assert brown.prose(lines) == 'The Fulton jury said "no evidence", (and) left. Why 1/2?'


def test_browns_documents_are_refined_or_judged_on_not_both() -> None:
    documents = {f"c{letter}{n:02}": f"{letter}{n}" for letter in "abc" for n in range(1, 41)}
    found = brown.parts(documents)
    assert sorted(found["refinement"] + found["judgement"]) == sorted(documents.values())
    assert 0.02 < len(found["judgement"]) / len(documents) < 0.25
    assert found == brown.parts(dict(reversed(documents.items())))


def test_what_was_found_is_put_under_the_headings_of_a_table() -> None:
    before = {
        "perplexity": 211_450.6,
        "divergence": 8.468,
        "agreement": 0.0231,
        "brown": {"perplexity": 1.945e9, "divergence": 17.0},
        "plain": 0.4304,
        "weighted": 0.2112,
        "bits": 2.5,
        "adapter_bits": 2.9444,
        "seconds": 1234.5,
        "gigabytes": 6.07,
    }
    after = [{"perplexity": 219.0, "rate": 2e-4}, {"perplexity": 218.61, "rate": 1e-3}]
    text = "\n".join(
        [
            "| start | KL | Brown | size |",
            "| --- | --- | --- | --- |",
            "| a, b | 9 | 8 | 7 |",
            "| another | 9 | 8 | 7 |",
            "",
            "| start | after 44 steps | rate |",
            "| --- | --- | --- |",
            "| a, b | 1 | 2 |",
        ]
    )

    assert page.rewritten(text, {"a, b": page.row(before, after)}).split("\n") == [
        "| start | KL | Brown | size |",
        "| --- | --- | --- | --- |",
        "| a, b | 8.47 | 1.9 · 10⁹ | 7 |",
        "| another | 9 | 8 | 7 |",
        "",
        "| start | after 44 steps | rate |",
        "| --- | --- | --- |",
        "| a, b | 218.6 | 0.001 |",
    ]
    assert page.row(before, [])["after 44 steps"] == page.NONE
    assert page.row(before, [])["perplexity"] == "211,451"


def test_tables_of_starts_have_the_headings_that_are_written() -> None:
    for name in page.PAGES:
        text = (page.ROOT / name).read_text("utf-8")
        row = dict.fromkeys(page.row(dict.fromkeys(KEYS, 0.0) | {"brown": ZERO}, []), "new")
        start = "2 bit, r=64, published T=5"
        found = [line for line in page.rewritten(text, {start: row}).split("\n") if start in line]
        assert found
        assert all(set(line.split("|")[2:-1]) == {" new "} for line in found), name
