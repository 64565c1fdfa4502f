"""Axolotl's plugin, ``loftq_cli.loading.plugins.for_axolotl.LoftqPlugin``.

Axolotl imports this before it loads a model. Where nothing is said of them, it turns on kernels of
its own for LoRA; they multiply with ``weight`` as it is, and that of a packed layer is codes. For
some trainers it does not load the adapter that it was given, and says nothing of it.
"""

from __future__ import annotations

import importlib
from typing import Any

from loftq_cli.errors import UsageError
from loftq_cli.loading import hook

KERNELS = tuple(f"lora_{part}_kernel" for part in ("mlp", "qkv", "o", "embedding"))
FROM_ZERO = ("dpo", "ipo", "kto")

hook.install()


def _register(self: Any, cfg: Any) -> None:
    """``cfg`` is the user's, not yet completed. Raises UsageError if its start would be lost."""
    if cfg.get("lora_model_dir") and cfg.get("rl") in FROM_ZERO:
        raise UsageError(
            f"rl: {cfg['rl']} makes a new adapter, from zero, in the place of lora_model_dir",
            hint="docs/training/trl.md trains it by preference",
        )
    for kernel in KERNELS:
        if cfg.get(kernel) is None:
            cfg[kernel] = False


def __getattr__(name: str) -> Any:
    if name != "LoftqPlugin":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    base = importlib.import_module("axolotl.integrations.base").BasePlugin
    return type(name, (base,), {"register": _register})
