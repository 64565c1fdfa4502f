"""Residuals by step, scales, order and codebook: LLM-like 1024 x 1024, rank 64, blocks of 64.

Relative Frobenius residuals at T = 0 (no adapter), 1, 2, 3, 5 and 10; absmax with the exact SVD is
the published algorithm (of which the reference keeps the last step), the others keep the best.
"""

from __future__ import annotations

from tests.benchmarks.tools import table
from tests.synthetic import llm_like

_STEPS = (1, 2, 3, 5, 10)
_CHOICES: tuple[tuple[str, dict[str, str]], ...] = (
    ("nf", {"scale": "absmax", "svd": "exact"}),
    ("nf", {"scale": "mse"}),
    ("nf", {"scale": "mse", "order": "svd-first"}),
    ("nf-symmetric", {"scale": "mse"}),
    ("uniform", {"scale": "absmax"}),
    ("uniform", {"scale": "mse"}),
    ("uniform", {"scale": "mse", "order": "svd-first"}),
    ("fitted", {}),
)


def main() -> None:
    import loftq_cli

    weight = llm_like(1024, 1024)
    rows = []
    for bits in (2, 3, 4):
        for method, settings in _CHOICES:
            d = loftq_cli.decompose(
                weight, bits=bits, method=method, rank=64, iters=max(_STEPS), **settings
            )
            plain = loftq_cli.decompose(
                weight,
                bits=bits,
                method=method,
                iters=0,
                **{key: value for key, value in settings.items() if key == "scale"},
            )
            norm = d.weight_norm
            rows.append(
                [
                    str(bits),
                    method,
                    " ".join(settings.values()) or "-",
                    f"{plain.final / norm:.4f}",
                    *(f"{d.residuals[step - 1] / norm:.4f}" for step in _STEPS),
                ]
            )
    table(("bits", "method", "settings", "T=0", *(f"T={step}" for step in _STEPS)), rows)
