"""Which row of a tensor of a GGUF file is which row of a matrix: found by their values.

llama.cpp's converter renames tensors, permutes the rows of some (q and k of Llama), puts several
into one (qkv, the experts of a layer), but never moves a weight within its row. So rows are looked
up, and no architecture is known by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from loftq_cli.exporting.gguf.file import BF16, F16, F32, Kind

DTYPES = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
"""The kinds whose rows can be looked up."""
_WORDS = {4: torch.int32, 2: torch.int16}


@dataclass(frozen=True)
class Found:
    """Where the rows of a tensor are: row n is row ``rows[n]`` of ``matrices[owners[n]]``."""

    matrices: Sequence[str]
    owners: torch.Tensor
    rows: torch.Tensor


@dataclass(frozen=True)
class Unclear:
    """Why the rows of a tensor are not those of matrices: ``matched`` of them are somewhere."""

    matched: int
    reason: str


_LOOKED_AT = 128  # columns: with fewer, rows of few bits could be alike; more take longer


def sampled(values: torch.Tensor) -> torch.Tensor:
    """The columns of (rows, columns) that fingerprints are of, evenly spaced."""
    columns = values.shape[1]
    count = min(columns, _LOOKED_AT)
    return values[:, torch.arange(count) * columns // count]


def fingerprints(values: torch.Tensor) -> torch.Tensor:
    """int64 (rows,) of floating-point values (rows, columns) that were :func:`sampled`: alike for
    the same bits, but for the sign of zeros."""
    words = (values + 0.0).contiguous().view(_WORDS[values.element_size()]).long()
    generator = torch.Generator().manual_seed(20240507)
    columns = words.shape[1]
    weights = torch.randint(-(1 << 62), 1 << 62, (columns,), generator=generator)
    mixed = (words + 0x9E3779B9) * (2 * weights + 1)
    return (mixed ^ (mixed >> 29)).sum(dim=1)  # wraps around


class Index:
    """The rows of matrices, ``read`` by name as float32 (out, in), as a file of a ``kind`` holds
    them. ``widths``: their in_features."""

    def __init__(
        self, widths: Mapping[str, int], read: Callable[[str], torch.Tensor], kind: Kind
    ) -> None:
        self.names = list(widths)
        self._prints: dict[int, torch.Tensor] = {}
        self._owners: dict[int, torch.Tensor] = {}
        self._rows: dict[int, torch.Tensor] = {}
        held: dict[int, list[tuple[torch.Tensor, int]]] = {}
        for number, name in enumerate(self.names):
            prints = fingerprints(sampled(read(name)).to(DTYPES[kind]))
            held.setdefault(widths[name], []).append((prints, number))
        for columns, parts in held.items():
            prints = torch.cat([part for part, _ in parts])
            owners = torch.cat([torch.full_like(part, number) for part, number in parts])
            rows = torch.cat([torch.arange(len(part)) for part, _ in parts])
            order = torch.argsort(prints, stable=True)
            self._prints[columns] = prints[order]
            self._owners[columns] = owners[order]
            self._rows[columns] = rows[order]

    def find(self, wanted: torch.Tensor, columns: int) -> Found | Unclear | None:
        """Where the rows with the fingerprints ``wanted``, of so many columns, are, None if none of
        them is anywhere."""
        if columns not in self._prints:
            return None
        known = self._prints[columns]
        first = torch.searchsorted(known, wanted)
        counts = torch.searchsorted(known, wanted, right=True) - first
        matched = int((counts > 0).sum())
        if not matched:
            return None
        if matched < len(wanted):
            return Unclear(matched, f"{matched} of its {len(wanted)} rows are in a matrix")
        owners, rows = self._settled(columns, wanted, first, counts)
        if owners is None:
            return Unclear(matched, "rows of it are in several matrices alike")
        numbers, places = torch.unique(owners, return_inverse=True)
        return Found([self.names[number] for number in numbers.tolist()], places, rows)

    def _settled(
        self, columns: int, wanted: torch.Tensor, first: torch.Tensor, counts: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """(owner, row) of each row that is ``counts`` times in the index from ``first`` on. Rows
        that are alike belong to the matrices of the others, one after the other."""
        owners, rows = self._owners[columns][first], self._rows[columns][first].clone()
        twice = counts > 1
        if not bool(twice.any()):
            return owners, rows
        own = torch.unique(owners[~twice])
        if not len(own):
            return None, rows
        for value in torch.unique(wanted[twice]).tolist():
            places = (wanted == value).nonzero()[:, 0]
            start = int(first[places[0]])
            span = slice(start, start + int(counts[places[0]]))
            mine = torch.isin(self._owners[columns][span], own)
            held = self._owners[columns][span][mine]
            if len(held) != len(places) or len(torch.unique(held)) > 1:
                return None, rows
            owners[places], rows[places] = held, self._rows[columns][span][mine]
        return owners, rows


def runs(found: Found) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(matrix by its number, places in the tensor, rows of the matrix), matrix by matrix."""
    for number in range(len(found.matrices)):
        places = (found.owners == number).nonzero()[:, 0]
        yield number, places, found.rows[places]
