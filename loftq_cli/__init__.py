"""LoftQ: a quantized backbone plus a LoRA adapter that already makes up for the quantization.

The public Python API: a function for each command, and what the command line does not have. Each
returns what ``--json`` of its command prints and raises the classes of ``loftq_cli.errors``;
remarks reach the logger ``loftq``. Importing this package imports neither torch nor transformers;
it makes transformers able to load layout ``loftq``, whichever of the two is imported first.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from loftq_cli.loading import hook as _hook
from loftq_cli.machine.paths import expanded as _expanded
from loftq_cli.twins import (
    adapt,
    calibrate,
    compare,
    convert,
    error_report,
    evaluate,
    export,
    import_adapter,
    inspect,
    merge,
    plan,
    push,
    refine,
    what_fits,
)
from loftq_cli.twins import located as _located

if TYPE_CHECKING:
    import torch

    from loftq_cli.numerics.decomposition import Decomposition
    from loftq_cli.numerics.moments import Moments

__all__ = [
    "Moments",
    "adapt",
    "calibrate",
    "compare",
    "convert",
    "decompose",
    "error_report",
    "evaluate",
    "export",
    "import_adapter",
    "inspect",
    "load",
    "merge",
    "plan",
    "push",
    "refine",
    "save_statistics",
    "what_fits",
]

_hook.install()

_Path = str | os.PathLike[str]


def decompose(
    weight: torch.Tensor,
    bits: int | None = None,
    method: str | None = None,
    rank: int | None = None,
    iters: int | None = None,
    block_size: int | None = None,
    scale: str | None = None,
    order: str | None = None,
    svd: str | None = None,
    seed: int | None = None,
    preset: str = "default",
    scale_dtype: str | None = None,
    *,
    moments: Moments | torch.Tensor | None = None,
    **settings: Any,
) -> Decomposition:
    """LoftQ on one matrix: W (out, in), float32, float16 or bfloat16, to Q, A and B.

    Arguments are those of ``loftq convert``, with its defaults if None; ``settings`` may be keep,
    momentum, feedback, feedback_passes, lora_alpha and adapter_dtype. With ``moments`` of the
    layer's inputs, a Moments or float32 (in,) or (in, in), the error of its outputs is minimised.
    The adapter is in the dtype of ``weight`` unless adapter_dtype says another.

    Returns a Decomposition: ``backbone()``, ``lora_A`` (rank, in), ``lora_B`` (out, rank),
    ``residuals`` per step, ``step``. Raises UsageError for bad settings, NonFiniteWeightError for
    NaN or Inf, StatisticsError for moments that are none.
    """
    from loftq_cli.conversion.single import decompose as run
    from loftq_cli.settings.options import Options

    options = Options(
        preset,
        bits=bits,
        method=method,
        rank=rank,
        iters=iters,
        block_size=block_size,
        scale=scale,
        scale_dtype=scale_dtype,
        order=order,
        svd=svd,
        seed=seed,
        **settings,
    )
    return run(weight, options, moments)


def load(
    directory: _Path = "out",
    auto_class: Any = None,
    trainable: bool = True,
    *,
    adapter: _Path | None = None,
    revision: str | None = None,
    offline: bool = False,
    **from_pretrained: Any,
) -> Any:
    """The backbone with its adapter attached, a peft.PeftModel (needs the extra ``train``).

    ``directory`` may be a hub id, as text, at ``revision``; ``offline`` (or ``local_files_only``)
    uses only what is in the hub cache. ``auto_class`` is a transformers class; None takes the one
    config.json names. ``adapter`` is the directory, or hub id, of a trained adapter; None takes the
    one that the conversion made.
    """
    from loftq_cli.checkpoint.locate import locate_adapter
    from loftq_cli.loading.load import load as run
    from loftq_cli.machine.observer import Logged

    offline = offline or bool(from_pretrained.get("local_files_only"))
    place = _located(directory, revision, offline, everything=True)
    trained = None
    if adapter is not None:
        trained = locate_adapter(adapter, offline=offline, listener=Logged())
    model = run(place.directory, auto_class, trainable, adapter=trained, **from_pretrained)
    if place.repository is not None:
        # PEFT saves it with a trained adapter, and a path in this cache says nothing to others.
        config = model.active_peft_config
        config.base_model_name_or_path = place.repository.repo_id
        config.revision = place.repository.revision
    return model


def save_statistics(
    path: _Path,
    moments: Mapping[str, Moments],
    *,
    model: _Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write activation statistics that were measured in a loop of one's own.

    ``moments`` maps the names that weight tensors have in the checkpoint to the
    ``loftq_cli.Moments`` of their inputs; matrices that share an input share one object. ``model``
    is the checkpoint's directory: names and widths are checked against it, and the file says which
    model it is of. Raises UsageError for names or widths that are not the model's and for moments
    of nothing, OutputConflictError if ``path`` exists (``overwrite`` replaces statistics).
    """
    from loftq_cli.statistics.save import save_statistics as run

    checked = None if model is None else _expanded(model)
    run(_expanded(path), moments, model=checked, overwrite=overwrite)


def __getattr__(name: str) -> Any:
    if name == "Moments":  # torch is imported when it is asked for
        from loftq_cli.numerics.moments import Moments

        return Moments
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
