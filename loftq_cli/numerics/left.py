"""What an adapter leaves of second moments for errors to be small in.

An adapter is fitted to what quantization leaves. With the rows of A held, B takes everything that
lies in their span, and of H remains

    H - H A^T (A H A^T)^-1 A H

Nine tenths of that difference are subtracted: an adapter that was to take all of the error along
the largest directions would have to be right about them to the last digit, on other text as well. A
ridge of a tenth of the mean moment keeps errors from being made up for along directions that hardly
occurred (docs/algorithm.md has the measurements).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from loftq_cli.numerics.quantizers.blocks import TINY
from loftq_cli.numerics.weighting import Weighting

_ABSORBED = 0.9  # of what the adapter can take
_RIDGE = 0.1  # of the mean moment


@dataclass(frozen=True)
class Left:
    """What an adapter leaves of the full moments H of ``weighting``; ``taken`` float32 (r, in) is Z
    with Z^T Z = H A^T (A H A^T)^-1 A H."""

    weighting: Weighting
    taken: torch.Tensor

    @staticmethod
    def by(weighting: Weighting, lora_A: torch.Tensor) -> Left:
        """By an adapter with rows near those of ``lora_A`` float32 (r, in)."""
        moments = weighting.moments
        lengths = torch.linalg.vector_norm(lora_A, dim=1, keepdim=True)
        rows = lora_A / lengths.clamp_min(TINY)
        images = rows @ moments
        gram = (images @ rows.T).double()
        gram.diagonal().add_(1e-6 * gram.diagonal().mean().clamp_min(TINY))
        factor, failed = torch.linalg.cholesky_ex(gram)
        if failed:  # far from semidefinite, which is found out about next
            return Left(weighting, torch.zeros_like(images))
        taken = torch.linalg.solve_triangular(factor.float(), images, upper=False)
        return Left(weighting, taken)

    def diagonal(self) -> torch.Tensor:
        """Without the ridge, float32 (in,)."""
        return self.weighting.moments.diagonal() - _ABSORBED * self.taken.square().sum(dim=0)

    def whole(self) -> torch.Tensor:
        """Float32 (in, in)."""
        left = torch.addmm(self.weighting.moments, self.taken.T, self.taken, alpha=-_ABSORBED)
        left.diagonal().add_(_RIDGE * left.diagonal().mean())
        return left

    def rows(self, order: torch.Tensor, start: int, stop: int, ridge: torch.Tensor) -> torch.Tensor:
        """Of columns and rows in ``order``, rows [start, stop) from their diagonal on, with that
        ``ridge``."""
        moments = self.weighting.moments
        rows = moments.index_select(0, order[start:stop]).index_select(1, order[start:])
        chosen = self.taken.index_select(1, order[start:])
        rows.addmm_(chosen[:, : stop - start].T, chosen, alpha=-_ABSORBED)
        rows.diagonal().add_(ridge)
        return rows

    def ridge(self) -> torch.Tensor:
        """What is added to the diagonal."""
        return _RIDGE * self.diagonal().mean()
