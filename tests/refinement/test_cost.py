"""What refining is said to cost, against what torch counts and against published shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode

from loftq_cli.checkpoint.output import open_output
from loftq_cli.layouts.base import Matrix, matrix_of
from loftq_cli.refinement.cost import Size, size_of
from loftq_cli.refinement.room import LENGTH
from loftq_cli.refinement.settings import EPOCHS, SAMPLES
from tests.support.refined import refine

DOCS = Path(__file__).parents[2] / "docs/refinement.md"
MODELS = {  # layers; width, of keys and values, of the MLP; rows of the vocabulary
    "Llama-3.2-1B": (16, 2048, 512, 8192, 128_256),
    "Llama-2-7b": (32, 4096, 4096, 11_008, 32_000),
    "Llama-3.1-8B": (32, 4096, 1024, 14_336, 128_256),
    "Llama-2-70b": (80, 8192, 1024, 28_672, 32_000),
}
CARDS = {"RTX 4090": 165e12, "A100": 312e12, "H100": 989e12}
"""Operations a second with bfloat16 factors and float32 sums, as the maker states them."""
REACHED = 0.4  # of that


def size_in(place: Path) -> Size:
    found = open_output(place / "llama-out")
    config = json.loads((place / "llama/config.json").read_text())
    return size_of(map(matrix_of, found.records), 10**6, config)


def decoder(layers: int, width: int, narrow: int, wide: int, vocabulary: int) -> Size:
    shapes = {"q": (width, width), "k": (narrow, width), "v": (narrow, width), "o": (width, width)}
    shapes |= {"gate": (wide, width), "up": (wide, width), "down": (width, wide)}
    matrices = [
        Matrix(f"layers.{layer}.{name}.weight", shape, "BF16", "uniform", 2, 64)
        for layer in range(layers)
        for name, shape in shapes.items()
    ]
    elements = sum(matrix.elements for matrix in matrices) + 2 * vocabulary * width
    return size_of(matrices, elements, {"vocab_size": vocabulary, "hidden_size": width})


@pytest.mark.parametrize(
    ("asked", "counted"),
    [
        ({"epochs": 2, "end_to_end": 0}, "block"),
        ({"epochs": 0, "end_to_end": 5}, "whole"),
    ],
)
def test_operations_are_those_that_torch_counts(place: Path, asked, counted) -> None:
    with FlopCounterMode(display=False) as counter:
        told = refine(place, "llama-out", f"counted-{counted}", **asked)
    size, tokens = size_in(place), told["tokens"]
    if counted == "block":
        stated = size.block_operations(tokens, 2)
    else:
        stated = size.whole_operations(tokens, 5, told["length"])
    # Attention, looking at the held windows, and gradients of A and B are left out.
    assert 0.7 < counter.get_total_flops() / stated < 1.3


def test_the_documented_table_is_computed_from_shapes() -> None:
    tokens = SAMPLES * LENGTH
    rows = []
    for name, shape in MODELS.items():
        size = decoder(*shape)
        operations = size.block_operations(tokens, EPOCHS)
        seconds = [f"{operations / peak / REACHED:,.0f} s" for peak in CARDS.values()]
        kept = 3 * tokens * size.width * 2 / 1e9
        memory = f"{size.block_memory() / 1e9:.1f} GB | {kept:.1f} GB"
        rows.append(f"| {name} | {memory} | {operations / 1e15:.1f} | {' | '.join(seconds)} |")
    assert "\n".join(rows) in DOCS.read_text()
