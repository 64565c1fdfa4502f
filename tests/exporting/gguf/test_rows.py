"""Rows of a tensor that are looked up among those of matrices."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from loftq_cli.exporting.gguf.file import F16, F32
from loftq_cli.exporting.gguf.rows import Found, Index, Unclear, fingerprints, runs, sampled

WIDTHS = {"q": 48, "k": 48, "down": 200}


def matrices(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"q": 12, "k": 6, "down": 5}
    return {n: torch.randn(sizes[n], WIDTHS[n], generator=generator) for n in WIDTHS}


def looked_up(index: Index, rows: torch.Tensor) -> Found | Unclear | None:
    return index.find(fingerprints(sampled(rows)), rows.shape[1])


@given(seed=st.integers(0, 30), half=st.booleans())
def test_rows_in_any_order_of_several_matrices_are_found(seed: int, half: bool) -> None:
    held, kind = matrices(seed), F16 if half else F32
    index = Index(WIDTHS, held.__getitem__, kind)
    both = torch.cat([held["q"], held["k"]])
    order = torch.randperm(len(both), generator=torch.Generator().manual_seed(seed))
    wanted = both[order].half() if half else both[order]
    found = looked_up(index, wanted)
    assert isinstance(found, Found)
    gathered = torch.empty_like(both)
    for number, places, rows in runs(found):
        gathered[places] = held[found.matrices[number]][rows]
    assert torch.equal(gathered, both[order])


def test_what_is_nowhere_or_partly_somewhere_is_told_apart() -> None:
    held = matrices(0)
    index = Index(WIDTHS, held.__getitem__, F32)
    strange = matrices(1)["q"]
    assert looked_up(index, strange) is None
    assert looked_up(index, strange[:, :7]) is None
    mixed = looked_up(index, torch.cat([held["q"], strange[:1]]))
    assert mixed == Unclear(12, "12 of its 13 rows are in a matrix")


def test_rows_that_are_alike_go_to_the_matrix_of_the_others_in_order() -> None:
    held = matrices(0)
    held["q"][3] = held["q"][7] = 0.0
    found = looked_up(Index(WIDTHS, held.__getitem__, F32), held["q"])
    assert isinstance(found, Found)
    assert found.rows.tolist() == list(range(12))
    held["k"][2] = 0.0  # in another matrix, too: k's is not q's
    found = looked_up(Index(WIDTHS, held.__getitem__, F32), held["q"])
    assert isinstance(found, Found)
    assert found.rows.tolist() == list(range(12))


def test_matrices_that_are_alike_are_refused() -> None:
    held = matrices(0)
    held["k"] = held["q"][:6].clone()
    found = looked_up(Index(WIDTHS, held.__getitem__, F32), held["k"])
    assert found == Unclear(6, "rows of it are in several matrices alike")
