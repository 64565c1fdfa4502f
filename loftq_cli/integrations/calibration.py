"""Activation statistics of a model, measured on text with transformers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loftq_cli.errors import InputError, NonFiniteActivationError, UsageError
from loftq_cli.integrations.blockwise import (
    BlockRunner,
    OutOfTurnError,
    block_of,
    blocks_in_turn,
    stacks_of,
)
from loftq_cli.integrations.layer_inputs import LayerInputs
from loftq_cli.integrations.names import places
from loftq_cli.integrations.pretrained import load_model, load_tokenizer
from loftq_cli.integrations.windows import cut
from loftq_cli.numerics.moments import Moments

DEFAULT_LENGTH = 512
_NO_LIMIT = 1_000_000  # tokenizers without a limit have one far above


@dataclass(frozen=True)
class Calibration:
    """A model that is ready to be measured. ``windows``, int64 (samples, length); ``layers``:
    names of weight tensors to modules of the model; ``missing``: weight tensors for which the
    model has no module; ``widths``: in_features by weight tensor."""

    model: nn.Module
    windows: torch.Tensor
    layers: Mapping[str, str]
    missing: Sequence[str]
    widths: Mapping[str, int]
    device: torch.device

    def measure(
        self, *, full: bool, begin: Callable[[int], None], advance: Callable[[str], None]
    ) -> Iterator[tuple[list[str], Moments]]:
        """(weight tensors that share an input, its moments), block by block.

        ``begin`` is told how many steps there will be, ``advance`` the name of what each step was
        spent on. Raises UnsupportedInputError where the layers are not in lists of blocks or are
        used differently from window to window, NonFiniteActivationError naming the tensor.
        """
        on_disk = {module: name for name, module in self.layers.items()}
        widths = {module: self.widths[name] for module, name in on_disk.items()}
        try:
            for groups in _groups(self, widths, full=full, begin=begin, advance=advance):
                for modules, moments in groups:
                    yield sorted(on_disk[module] for module in modules), moments
        except NonFiniteActivationError as error:
            module, _, what = error.message.partition(": ")
            raise NonFiniteActivationError(f"{on_disk[module]}: {what}") from error

    def run(self, window: int) -> None:
        """Call the model, without its head, on a window."""
        body: Any = getattr(self.model, "base_model", self.model)
        inputs = {"input_ids": self.windows[window : window + 1].to(self.device)}
        if "decoder_input_ids" in inspect.signature(body.forward).parameters:
            start = torch.full_like(inputs["input_ids"][:, :1], _decoder_start(self.model))
            inputs["decoder_input_ids"] = torch.cat([start, inputs["input_ids"][:, :-1]], dim=1)
        with torch.no_grad():
            body(**inputs)


def prepare(
    directory: Path,
    config: Mapping[str, Any],
    widths: Mapping[str, int],
    texts: Sequence[str],
    *,
    samples: int | None,
    length: int | None,
    seed: int,
    dtype: torch.dtype,
    nbytes: int,
    device: torch.device,
    offload_folder: Path,
) -> Calibration:
    """Load the model in ``directory`` and cut ``texts`` into windows.

    ``widths``: the matrices to measure, names of weight tensors to in_features. ``samples`` and
    ``length`` None: as many windows as there are up to 128, and 512 tokens or as many as the model
    takes. Raises InputError for a model, tokenizer or text that cannot be used, UsageError for a
    length above what the model takes, EnvironmentFailure where the extra [train] is missing.
    """
    tokenizer = load_tokenizer(directory)
    limit = min(_limits(config, tokenizer), default=None)
    if length is None:
        length = min(DEFAULT_LENGTH, limit or DEFAULT_LENGTH)
    if limit is not None and length > limit:
        raise UsageError(
            f"--length {length}: the model takes {limit} tokens at most", hint="lower --length"
        )
    windows = cut(tokenizer, texts, length=length, samples=samples, seed=seed)
    model = load_model(
        directory,
        config,
        dtype=dtype,
        nbytes=nbytes,
        device=device,
        offload_folder=offload_folder,
    )
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    if int(windows.max()) >= embedding.num_embeddings:
        raise InputError(
            f"{directory}: the tokenizer gives token {int(windows.max())}, the model has "
            f"{embedding.num_embeddings}",
            hint="use the model's own tokenizer",
        )
    modules = {name.removesuffix(".weight"): name for name in widths}
    found = places(model, modules)
    layers = {modules[old]: new for old, new in found.items()}
    missing = [name for name in widths if name not in layers]
    return Calibration(model, windows, layers, missing, widths, device)


def _groups(
    calibration: Calibration,
    widths: Mapping[str, int],
    *,
    full: bool,
    begin: Callable[[int], None],
    advance: Callable[[str], None],
) -> Iterator[list[tuple[list[str], Moments]]]:
    """Modules that share an input, and its moments: block by block, or all at once where the
    model does not run its blocks in turn."""
    model, run, count = calibration.model, calibration.run, len(calibration.windows)
    stacks = stacks_of(model, widths)
    try:
        blocks = blocks_in_turn(model, run, stacks)
    except OutOfTurnError:
        begin(count)
        inputs = LayerInputs(widths, full=full)
        with inputs.watched(model):
            for window in range(count):
                run(window)
                inputs.end_window()
                advance("the whole model")
        yield inputs.groups()
        return
    begin(len(blocks) * count)
    homes = {name: block_of(model, name) for name in widths}
    with BlockRunner(model, run, count) as runner:
        for block in blocks:
            here = {name: width for name, width in widths.items() if homes[name] == block}
            inputs = LayerInputs(here, full=full)
            with inputs.watched(model):
                for _ in runner.windows(block):
                    inputs.end_window()
                    advance(block)
            yield inputs.groups()


def _limits(config: Mapping[str, Any], tokenizer: Any) -> Iterator[int]:
    told = [config.get(name) for name in ("max_position_embeddings", "n_positions", "max_seq_len")]
    for limit in (*told, tokenizer.model_max_length):
        if isinstance(limit, int) and 0 < limit < _NO_LIMIT:
            yield limit


def _decoder_start(model: Any) -> int:
    """The token that a decoder's input begins with."""
    for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        for config in (model.config, getattr(model, "generation_config", None)):
            token = getattr(config, name, None)
            if isinstance(token, int):
                return token
    return 0
