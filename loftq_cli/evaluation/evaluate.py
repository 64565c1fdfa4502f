"""``loftq evaluate``: perplexity of a conversion, an export or an ordinary checkpoint on text, and
how near it is to its original.

Residuals do not tell how good a start is; this does. A window of text at a time is run through the
model and, if it is asked for, through the original.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loftq_cli.calibration.pretrained import class_of, load_tokenizer, quiet
from loftq_cli.calibration.text_file import read_text
from loftq_cli.calibration.windows import cut
from loftq_cli.checkpoint.deliveries import deliver_all
from loftq_cli.checkpoint.locate import Place, locate
from loftq_cli.checkpoint.output import MANIFEST, open_output, require_backbone
from loftq_cli.checkpoint.request import Request
from loftq_cli.checkpoint.small_file import read_json
from loftq_cli.checkpoint.source import CONFIG
from loftq_cli.errors import InputError, UnsupportedInputError, UsageError
from loftq_cli.evaluation.compare import Predictions, States
from loftq_cli.families.lengths import is_limit, limits
from loftq_cli.loading.load import load
from loftq_cli.machine.observer import Observer
from loftq_cli.machine.packages import required
from loftq_cli.machine.resources import memory_explained
from loftq_cli.planning.choices import choose_device
from loftq_cli.reporting import evaluations

DEFAULT_LENGTH = 512
Run = Callable[[torch.Tensor], Any]


@dataclass(frozen=True)
class Evaluating:
    """``samples`` windows of ``length`` tokens, None: up to 128 of 512, or as many as the model
    takes; ``adapter``: a trained one, instead of the start."""

    samples: int | None = None
    length: int | None = None
    device: str = "auto"
    seed: int = 0
    adapter: Path | None = None
    offline: bool = False


def evaluate(
    place: Place,
    texts: Sequence[Path],
    source: str | None,
    wanted: Evaluating,
    *,
    save: bool = False,
    observer: Observer,
) -> dict[str, Any]:
    """What ``--json`` prints of the model in ``place`` on ``texts``, compared with the checkpoint
    or hub id ``source``. ``save``: it is kept beside the manifest, for reports.

    Raises UsageError for settings, InputError for text, a model or a source that cannot be used, or
    if a model that is no causal language model is to be evaluated without its source,
    EnvironmentFailure if the extra [train] is missing.
    """
    started = time.monotonic()
    if save:
        evaluations.refuse_to_save(place.directory, on_hub=place.repository is not None)
    device = choose_device(wanted.device)
    read = [read_text("--text", path) for path in texts]
    directory = place.directory
    if (directory / MANIFEST).is_file():
        require_backbone(open_output(directory))
    config = read_json(directory / CONFIG).content
    causal = _is_causal(config)
    if not causal and source is None:
        raise UsageError(
            f"{directory} is no causal language model, and has no perplexity",
            hint="name its original with --source: hidden states are compared",
        )
    if wanted.adapter is not None and not (directory / MANIFEST).is_file():
        raise UsageError(f"--adapter is for conversions, {directory} is none")
    windows = _windows(directory, config, [text.content for text in read], wanted)
    with memory_explained("evaluating", hint="lower --length, or use another --device"):
        transformers = required("transformers", "train", "evaluating")
        with quiet(transformers):
            ours = _runner(_own(directory, wanted), device)
            theirs = None
            if source is not None:
                theirs = _runner(_original(source, wanted, observer), device)
        found = _measured(ours, theirs, windows, causal=causal, observer=observer)
    told = {
        "directory": str(directory),
        "source": source,
        "adapter": None if wanted.adapter is None else str(wanted.adapter),
        "device": str(device),
        "texts": [text.sha256 for text in read],
        "samples": len(windows),
        "length": windows.shape[1],
        "seed": wanted.seed,
        **found,
        "seconds": round(time.monotonic() - started, 3),
    }
    if save:
        evaluations.save(directory, told)
    return told


def _measured(
    ours: Run, theirs: Run | None, windows: torch.Tensor, *, causal: bool, observer: Observer
) -> dict[str, Any]:
    predictions, states = Predictions(), States()
    observer.begin(len(windows), "evaluating", " windows")
    observer.count(len(windows), "windows")
    try:
        for window in windows:
            found, original = ours(window), None if theirs is None else theirs(window)
            if causal:
                known = None if original is None else original.logits[0]
                _check_vocabulary(found.logits[0], known)
                predictions.add(window, found.logits[0], known)
            else:
                assert original is not None
                states.add(_last(found), _last(original))
            observer.advance(1)
            observer.finished(f"perplexity {predictions.perplexity:.4g}" if causal else "")
    finally:
        observer.end()
    compared = causal and theirs is not None
    tokens = predictions.tokens if causal else states.tokens
    return {
        "tokens": tokens,
        "perplexity": predictions.perplexity if causal else None,
        "source_perplexity": predictions.source_perplexity if compared else None,
        "kl": predictions.kl / tokens if compared else None,
        "top1": predictions.agreeing / tokens if compared else None,
        "cosine": None if causal else states.cosine,
        "relative_error": None if causal else states.relative_error,
    }


def _check_vocabulary(ours: torch.Tensor, theirs: torch.Tensor | None) -> None:
    if theirs is not None and theirs.shape != ours.shape:
        raise InputError(
            f"the model predicts {ours.shape[-1]} tokens, its source {theirs.shape[-1]}",
            hint="give the model that it was converted from",
        )


def _windows(
    directory: Path, config: Mapping[str, Any], texts: Sequence[str], wanted: Evaluating
) -> torch.Tensor:
    tokenizer = load_tokenizer(directory)
    told = [each for each in (*limits(config), int(tokenizer.model_max_length)) if is_limit(each)]
    limit = min(told, default=None)
    if wanted.length is not None and limit is not None and wanted.length > limit:
        raise UsageError(
            f"--length {wanted.length}: the model takes {limit} tokens at most",
            hint="lower --length",
        )
    length = wanted.length or min(DEFAULT_LENGTH, limit or DEFAULT_LENGTH)
    if length < 2:
        raise UsageError(f"--length {length}: a token is predicted from those before it")
    return cut(tokenizer, texts, length=length, samples=wanted.samples, seed=wanted.seed)


def _is_causal(config: Mapping[str, Any]) -> bool:
    names = [str(name) for name in config.get("architectures") or []]
    return bool(names) and names[0].endswith(("ForCausalLM", "LMHeadModel"))


def _own(directory: Path, wanted: Evaluating) -> Any:
    """The model in ``directory``: a conversion with its adapter, or an ordinary checkpoint."""
    if (directory / MANIFEST).is_file():
        return load(directory, trainable=False, adapter=wanted.adapter)
    return _loaded(directory)


def _original(source: str, wanted: Evaluating, observer: Observer) -> Any:
    found = locate(Request(source, None, wanted.offline), observer.note)
    deliver_all(found, observer)
    return _loaded(found.directory)


def _loaded(directory: Path) -> Any:
    config = read_json(directory / CONFIG).content
    found = class_of(directory, config)
    try:
        return found.from_pretrained(directory, local_files_only=True)
    except ImportError:
        raise
    except Exception as error:  # of any kind
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{directory}: transformers cannot load it: {said}") from error


def _runner(model: Any, device: torch.device) -> Run:
    """Runs ``model`` on a window, int64 (length,)."""
    if device.type == "cpu" and model.dtype == torch.float16:
        model = model.float()  # in which few processors compute, and many models overflow
    model = model.to(device).eval()
    seq2seq = bool(getattr(model.config, "is_encoder_decoder", False))

    @torch.no_grad()
    def run(window: torch.Tensor) -> Any:
        ids = window[None].to(device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if seq2seq:
            inputs["decoder_input_ids"] = ids
        return model(**inputs, output_hidden_states=True)

    return run


def _last(output: Any) -> torch.Tensor:
    """The last hidden states, (length, width), of the decoder if there is one."""
    for name in ("decoder_hidden_states", "hidden_states"):
        states = getattr(output, name, None)
        if states:
            found: torch.Tensor = states[-1][0]
            return found
    last = getattr(output, "last_hidden_state", None)
    if last is None:
        raise UnsupportedInputError(
            f"the model returns no hidden states ({type(output).__name__})",
            hint="it cannot be evaluated",
        )
    return torch.as_tensor(last[0])
