"""Viterbi's search for the best codes of a ring of the trellis code (trellis_code.py).

A state is the number of a level. The next code moves in from below, so four states lead to four
others, and of the four ways into a state only the cheapest can be part of the cheapest whole
(A. J. Viterbi, 1967; for quantization Marcellin and Fischer, "Trellis coded quantization", 1990).
A ring must end as it begins. Its beginning is taken from a search through the rows around its seam,
as in QTIP (Tseng et al., arXiv:2406.11235, section 4.1): hardly ever is there a better one.

The compiled kernel searches (kernels/trellis.c), on the host also for other devices, which have no
kernel for it yet; without a compiler tensor operations do, with the same bits.
"""

from __future__ import annotations

import torch

from loftq_cli.kernels import native
from loftq_cli.numerics.quantizers import native_trellis
from loftq_cli.numerics.quantizers.trellis_code import BITS, WINDOW, levels

_BEFORE = WINDOW // BITS - 1  # codes that a state shares with the next one
_SEAM = 32  # rows on either side; SEAM in kernels/trellis.c
_CHUNK_STATES = 1 << 20
_GPU_CHUNK_STATES = 1 << 24


def search(wanted: torch.Tensor, scales: torch.Tensor, compiled: bool = True) -> torch.Tensor:
    """Codes uint8 (rings, length) such that the sum over a ring of (wanted - scale * level)^2 is
    least, or nearly; ``wanted``, ``scales`` float32 (rings, length), finite, SHORTEST to SEQUENCE
    long. ``compiled``: in the kernel, if there is one. Raises MemoryError."""
    if compiled and native.available():
        return native_trellis.search(wanted, scales)
    limit = _GPU_CHUNK_STATES if wanted.is_cuda else _CHUNK_STATES
    step = limit >> WINDOW
    table = levels(wanted.device)
    starts = range(0, len(wanted), step)
    parts = [_in_tensors(wanted[i : i + step], scales[i : i + step], table) for i in starts]
    return torch.cat(parts) if parts else wanted.byte()


def _in_tensors(wanted: torch.Tensor, scales: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """:func:`search`, in tensor operations."""
    # By a power of two, which is exact: neither squares nor what is added to them overflow.
    _, exponents = torch.frexp(scales.abs().amax(dim=1, keepdim=True))
    unit = torch.ldexp(torch.ones_like(scales[:, :1]), -exponents.clamp(-100, 100))
    wanted, scales = (wanted * unit).clamp_(-1e15, 1e15), scales * unit
    length = wanted.shape[1]
    half = min(length // 2, _SEAM)
    around = torch.arange(length - half, length + half, device=wanted.device) % length
    seam = _cheapest(wanted[:, around], scales[:, around], table, None)
    before = torch.zeros_like(seam[:, 0], dtype=torch.int64)
    for column in range(half - _BEFORE, half):
        before = before << BITS | seam[:, column]
    return _cheapest(wanted, scales, table, before)


def _cheapest(
    wanted: torch.Tensor, scales: torch.Tensor, table: torch.Tensor, before: torch.Tensor | None
) -> torch.Tensor:
    """The cheapest codes of sequences; ``before`` int64 (sequences,): the codes that each begins
    after, and ends with."""
    count, length = wanted.shape
    groups = len(table) >> BITS
    group = torch.arange(groups, device=wanted.device)
    least = torch.zeros((count, groups), device=wanted.device)
    if before is not None:
        least.masked_fill_(group != before[:, None], torch.inf)
    from_: list[torch.Tensor] = []
    cost = least
    for column in range(length):
        if column:
            a, b, c, d = cost.view(count, 4, groups).unbind(1)
            low, high = torch.where(b < a, b, a), torch.where(d < c, d, c)
            least = torch.where(high < low, high, low)
            # What is not true counts as 0: the first of two, as in the kernel.
            from_.append(torch.where(high < low, 2 + (d < c).byte(), (b < a).byte()))
        error = wanted[:, column, None] - scales[:, column, None] * table
        cost = least.repeat_interleave(4, dim=1) + error.square()
    if before is not None:
        ends = torch.arange(len(table), device=wanted.device) % groups
        cost = cost.masked_fill(ends != before[:, None], torch.inf)
    state = cost.argmin(dim=1)
    codes = torch.empty((count, length), dtype=torch.uint8, device=wanted.device)
    for column in reversed(range(length)):
        codes[:, column] = state & 3
        state = state >> BITS
        if column:
            state = state + from_[column - 1].gather(1, state[:, None])[:, 0].long() * groups
    return codes
