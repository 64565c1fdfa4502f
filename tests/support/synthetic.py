"""Weight matrices that look like a language model's, made from a seed."""

from __future__ import annotations

import torch


def llm_like(out_features: int, in_features: int, seed: int = 0) -> torch.Tensor:
    """An LLM-like matrix, float32 (out, in).

    Gaussian entries times a lognormal (sigma 0.3) factor per row and per column, plus a low-rank
    part (rank min side / 8, spectrum k^-0.7, a third of the Gaussian part's energy), one entry in
    a thousand times 6, all times 0.02.
    """
    generator = torch.Generator().manual_seed(seed)

    def gaussian(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    weight = gaussian(out_features, in_features)
    weight *= (0.3 * gaussian(out_features, 1)).exp() * (0.3 * gaussian(1, in_features)).exp()
    rank = max(min(out_features, in_features) // 8, 1)
    spectrum = torch.arange(1, rank + 1, dtype=torch.float32) ** -0.7
    low_rank = (gaussian(out_features, rank) * spectrum) @ gaussian(rank, in_features)
    energy = weight.double().square().sum() / 3
    weight += low_rank * (energy / low_rank.double().square().sum()).sqrt().float()
    weight[torch.rand(weight.shape, generator=generator) < 1e-3] *= 6
    return weight.mul_(0.02)
