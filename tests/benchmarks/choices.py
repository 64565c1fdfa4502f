"""Residuals by step, scales, order and codebook: LLM-like 1024 x 1024, rank 64, blocks of 64.

Relative Frobenius residuals at T = 0 (no adapter), 1, 2, 3, 5 and 10; "paper" is the published
algorithm (of which the reference keeps the last step), the others keep the best.
"""

from __future__ import annotations

from typing import Any

from tests.benchmarks.tools import table
from tests.support.synthetic import llm_like

_STEPS = (1, 2, 3, 5, 10)
_CHOICES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("nf", "paper", {"preset": "paper"}),
    ("nf", "mse, no momentum", {"momentum": False}),
    ("nf", "mse", {}),
    ("nf", "mse, svd-first", {"order": "svd-first"}),
    ("nf-symmetric", "mse", {}),
    ("uniform", "absmax", {"scale": "absmax"}),
    ("uniform", "mse, no momentum", {"momentum": False}),
    ("uniform", "mse", {}),
    ("uniform", "mse, svd-first", {"order": "svd-first"}),
    ("fitted", "-", {}),
)


def main() -> None:
    from loftq_cli.conversion.single import decompose
    from loftq_cli.settings.options import Options

    weight = llm_like(1024, 1024)
    rows = []
    for bits in (2, 3, 4):
        for method, name, settings in _CHOICES:
            d, plain = (
                decompose(
                    weight, Options(bits=bits, method=method, rank=64, iters=iters, **settings)
                )
                for iters in (max(_STEPS), 0)
            )
            residuals = [plain.final, *(d.residuals[step - 1] for step in _STEPS)]
            row = [f"{residual / d.weight_norm:.4f}" for residual in residuals]
            rows.append([str(bits), method, name, *row])
    table(("bits", "method", "settings", "T=0", *(f"T={step}" for step in _STEPS)), rows)
