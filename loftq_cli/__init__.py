"""LoftQ: a quantized backbone plus a LoRA adapter that already makes up for the quantization.

The public Python API. Importing this package imports neither torch nor transformers; it makes
transformers able to load layout ``loftq``, whichever of the two is imported first.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loftq_cli.loading import hook as _hook
from loftq_cli.machine.paths import expanded as _expanded

if TYPE_CHECKING:
    import torch

    from loftq_cli.numerics.decomposition import Decomposition
    from loftq_cli.numerics.moments import Moments

__all__ = [
    "Moments",
    "convert",
    "decompose",
    "error_report",
    "inspect",
    "load",
    "save_statistics",
]

_hook.install()


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
) -> Decomposition:
    """LoftQ on one matrix: W (out, in), float32, float16 or bfloat16, to Q, A and B.

    Arguments are those of ``loftq convert``, with its defaults where None. The adapter is in the
    dtype of ``weight``. Returns a Decomposition: ``backbone()``, ``lora_A`` (rank, in), ``lora_B``
    (out, rank), ``residuals`` per step, ``step``. Raises UsageError for bad settings and
    NonFiniteWeightError for NaN or Inf.
    """
    from loftq_cli.conversion.single import decompose as run
    from loftq_cli.settings.options import Options

    options = Options(
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
        preset=preset,
    )
    return run(weight, options)


def convert(
    model: str | Path,
    output: str | Path = "out",
    *,
    overwrite: bool = False,
    revision: str | None = None,
    offline: bool = False,
    discard_shards: bool = False,
    allow_pickle: bool = False,
    recipe: str | Path | None = None,
    calibrate_text: str | Path | Sequence[str | Path] = (),
    moments: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Convert a checkpoint directory or hub id; the manifest as a dict.

    ``settings`` are the long options of ``loftq convert`` with underscores: bits, method, rank,
    iters, block_size, layout, scale, scale_dtype, order, svd, preset, include, exclude, embeddings,
    bits_map, rank_map, target_bpw, lora_alpha, adapter_dtype, dense_dtype, device, threads, seed.
    ``recipe`` is a file that holds settings, TOML or JSON, or the manifest of an earlier
    conversion; settings given here win. ``discard_shards`` deletes each shard from the hub once it
    is converted; ``allow_pickle`` reads a directory's pickled weights where it has no others.
    ``calibrate_text``, text files, has activation statistics measured first (``moments``:
    "diagonal" or "full") and kept beside the output. Resumes
    an unfinished conversion with the same settings. Raises the classes of ``loftq_cli.errors``.
    """
    from loftq_cli.calibration import first as calibrate_first
    from loftq_cli.conversion.run import prepare, run
    from loftq_cli.machine.observer import Observer
    from loftq_cli.settings.file import options as combined

    observer = Observer()
    texts = [calibrate_text] if isinstance(calibrate_text, (str, Path)) else calibrate_text
    options = combined(
        settings, None if recipe is None else _expanded(recipe), measuring=bool(texts)
    )
    plan, path = prepare(
        str(model),
        _expanded(output),
        options,
        revision=revision,
        offline=offline,
        overwrite=overwrite,
        discard_shards=discard_shards,
        allow_pickle=allow_pickle,
        texts=calibrate_first.asked([_expanded(text) for text in texts], moments),
        observer=observer,
    )
    return run(plan, path, overwrite=overwrite, observer=observer).manifest


def inspect(
    directory: str | Path = "out",
    *,
    verify: bool = False,
    revision: str | None = None,
    offline: bool = False,
) -> dict[str, Any]:
    """What ``loftq inspect --json`` prints. ``verify`` re-hashes every file.

    ``directory`` may be a hub id, as text, at ``revision``; ``offline`` uses only what is in the
    hub cache. Raises InputError where it is no finished conversion or was altered.
    """
    from loftq_cli.checkpoint.locate import locate_output
    from loftq_cli.machine.observer import Observer
    from loftq_cli.reporting.inspect import inspect as run

    place = locate_output(
        directory, revision=revision, offline=offline, everything=verify, listener=Observer()
    )
    return run(place, verify=verify)


def error_report(
    directory: str | Path = "out",
    source: str | Path | None = None,
    stats: str | Path | None = None,
    *,
    revision: str | None = None,
    offline: bool = False,
) -> dict[str, Any]:
    """What ``loftq error-report --json`` prints. ``directory``, ``revision`` and ``offline`` are as
    for :func:`inspect`.

    With ``source`` (a checkpoint directory or hub id) every residual is recomputed from the packed
    bytes and the original weights, and with ``stats``, a file of activation statistics, the
    weighted ones too; VerificationError where the manifest disagrees.
    """
    from loftq_cli.checkpoint.locate import locate_output
    from loftq_cli.machine.observer import Observer
    from loftq_cli.reporting.residuals import error_report as run

    place = locate_output(
        directory,
        revision=revision,
        offline=offline,
        everything=source is not None,
        listener=Observer(),
    )
    return run(place, None if source is None else str(source), stats, offline=offline)


def load(
    directory: str | Path = "out",
    auto_class: Any = None,
    trainable: bool = True,
    *,
    adapter: str | os.PathLike[str] | None = None,
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
    from loftq_cli.checkpoint.locate import locate_adapter, locate_output
    from loftq_cli.loading.load import load as run
    from loftq_cli.machine.observer import Observer

    offline = offline or bool(from_pretrained.get("local_files_only"))
    place = locate_output(
        directory, revision=revision, offline=offline, everything=True, listener=Observer()
    )
    trained = None
    if adapter is not None:
        trained = locate_adapter(adapter, offline=offline, listener=Observer())
    model = run(place.directory, auto_class, trainable, adapter=trained, **from_pretrained)
    if place.repository is not None:
        # PEFT saves it with a trained adapter, and a path in this cache says nothing to others.
        config = model.active_peft_config
        config.base_model_name_or_path = place.repository.repo_id
        config.revision = place.repository.revision
    return model


def save_statistics(
    path: str | os.PathLike[str],
    moments: Mapping[str, Moments],
    *,
    model: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write activation statistics that were measured in a loop of one's own.

    ``moments`` maps the names that weight tensors have in the checkpoint to the
    ``loftq_cli.Moments`` of their inputs; matrices that share an input share one object. ``model``
    is the checkpoint's directory: names and widths are checked against it, and the file says which
    model it is of. Raises UsageError for names or widths that are not the model's and for moments
    of nothing, OutputConflictError where ``path`` exists (``overwrite`` replaces statistics).
    """
    from loftq_cli.statistics.save import save_statistics as run

    checked = None if model is None else _expanded(model)
    run(_expanded(path), moments, model=checked, overwrite=overwrite)


def __getattr__(name: str) -> Any:
    if name == "Moments":  # torch is imported when it is asked for
        from loftq_cli.numerics.moments import Moments

        return Moments
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
