"""Activation statistics of a model, measured on text with transformers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loftq_cli.calibration.blockwise import BlockRunner
from loftq_cli.calibration.course import Course, course_of
from loftq_cli.calibration.expert_inputs import ExpertInputs
from loftq_cli.calibration.layer_inputs import LayerInputs
from loftq_cli.calibration.pretrained import class_of, load_model, load_tokenizer
from loftq_cli.calibration.text_input import (
    Call,
    entry_of,
    refuse_without_text,
    runs_on_text,
)
from loftq_cli.calibration.windows import MOST_SAMPLES, cut
from loftq_cli.errors import UsageError
from loftq_cli.families.experts import form_of, is_expert
from loftq_cli.families.lengths import is_limit, limits
from loftq_cli.families.names import places, places_of_experts
from loftq_cli.machine.world import ALONE, World
from loftq_cli.numerics.moments import Moments

DEFAULT_LENGTH = 512


@dataclass(frozen=True)
class Calibration:
    """A model that is ready to be measured. ``call`` runs it on token ids; ``windows``, int64
    (samples, length); ``layers``: names of weight tensors to modules of the model; ``experts``: of
    each module of experts, the weight tensors by what follows its name; ``widths``: in_features by
    weight tensor; ``directory``: of the checkpoint, for messages; ``device``: where inputs are."""

    model: nn.Module
    call: Call
    windows: torch.Tensor
    layers: Mapping[str, str]
    experts: Mapping[str, Mapping[str, str]]
    widths: Mapping[str, int]
    directory: Path
    device: torch.device

    def measure(
        self,
        world: World = ALONE,
        *,
        full: bool,
        begin: Callable[[int], None],
        advance: Callable[[str], None],
    ) -> Iterator[tuple[list[str], Moments]]:
        """(weight tensors that share an input, its moments): block by block, and then at once those
        that are not called in blocks that can be run in turn. The processes of ``world`` share the
        windows, and each is given the moments of all.

        ``begin`` is told how many steps there will be here, ``advance`` the name of what each step
        was spent on. Layers that text does not go through are left out. Raises
        UnsupportedInputError if the model cannot be run on text alone or uses a layer differently
        from window to window, NonFiniteActivationError naming the tensor.
        """
        model, windows = self.model, world.share(range(len(self.windows)))
        course = Course(**world.told(self._course))
        begin((len(course.blocks) + bool(course.others)) * len(windows))

        def watched(names: Collection[str]) -> tuple[LayerInputs, ExpertInputs]:
            widths = {layer: self.widths[layer] for layer in names if layer in self.layers}
            experts = {name: self.experts[name] for name in names if name in self.experts}
            return LayerInputs(widths, full=full), ExpertInputs(experts, full=full)

        def groups(
            inputs: LayerInputs, experts: ExpertInputs
        ) -> Iterator[tuple[list[str], Moments]]:
            if world.size > 1:
                inputs.gather(world, self.device)
                experts.gather(world, self.device)
            yield from _in_order(inputs)
            yield from experts.groups()

        with BlockRunner(model, self.run, windows) as runner:
            for block, layers in course.blocks.items():
                inputs, experts = watched(layers)
                with inputs.watched(model, self.layers), experts.watched(model):
                    for _ in runner.windows(block):
                        inputs.end_window()
                        advance(block)
                yield from groups(inputs, experts)
        if course.others:
            inputs, experts = watched(course.others)
            with inputs.watched(model, self.layers), experts.watched(model):
                for window in windows:
                    self.run(window)
                    inputs.end_window()
                    advance("the whole model")
            yield from groups(inputs, experts)

    def _course(self) -> dict[str, Any]:
        called = {**self.layers, **{name: name for name in self.experts}}
        return asdict(course_of(self.model, self._run_first, called))

    def run(self, window: int) -> None:
        """Call the model on a window."""
        self.call(self.windows[window : window + 1])

    def _run_first(self, window: int) -> None:
        """As :meth:`run`, if it is not known yet whether the model takes such a window."""
        with runs_on_text(self.model, self.directory, self.windows.shape[1]):
            self.run(window)


def class_to_run(directory: Path, config: Mapping[str, Any]) -> Any:
    """The class of transformers for the model in ``directory``. Raises UnsupportedInputError if
    there is none or it does not take text, EnvironmentFailure if the extra [train] is missing.
    """
    found = class_of(directory, config)
    refuse_without_text(found, directory)
    return found


def prepare(
    directory: Path,
    loaded_as: Any,
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
    most: int = MOST_SAMPLES,
) -> Calibration:
    """Load the model in ``directory``, of the class ``loaded_as``, and cut ``texts`` into windows.

    ``widths``: the matrices to measure, names of weight tensors to in_features. ``samples`` and
    ``length`` None: as many windows as there are up to ``most``, and 512 tokens or as many as the
    model takes. Raises InputError for a model, tokenizer or text that cannot be used, UsageError
    for a length above what the model takes, EnvironmentFailure if the extra [train] is missing.
    """
    tokenizer = load_tokenizer(directory)
    told = [*limits(config), int(tokenizer.model_max_length)]
    size = _length(length, told)
    windows = cut(tokenizer, texts, length=size, samples=samples, seed=seed, most=most)
    model: Any = load_model(
        directory,
        loaded_as,
        dtype=dtype,
        nbytes=nbytes,
        device=device,
        offload_folder=offload_folder,
    )
    entry = entry_of(model, windows, device, directory)
    size = _length(length, [*told, *limits(model.config.to_dict()), *entry.limits])
    if size < windows.shape[1]:
        windows = cut(tokenizer, texts, length=size, samples=samples, seed=seed, most=most)
    layers, experts = _layers(model, widths), _experts(model, widths)
    return Calibration(model, entry.call, windows, layers, experts, widths, directory, device)


def _length(asked: int | None, told: Iterable[int]) -> int:
    """Tokens a window, given the most that the model is told to take. Raises UsageError."""
    limit = min(filter(is_limit, told), default=None)
    if asked is not None and limit is not None and asked > limit:
        raise UsageError(
            f"--length {asked}: the model takes {limit} tokens at most", hint="lower --length"
        )
    return asked or min(DEFAULT_LENGTH, limit or DEFAULT_LENGTH)


def _layers(model: nn.Module, weights: Iterable[str]) -> dict[str, str]:
    """The module of ``model`` that has each of ``weights``, for those that have a place there."""
    names = {weight.removesuffix(".weight"): weight for weight in weights}
    return {names[old]: new for old, new in places(model, names).items()}


def _experts(model: nn.Module, weights: Iterable[str]) -> dict[str, dict[str, str]]:
    """Of each module of experts that can be watched, the ``weights`` by what follows its name."""
    names = {weight.removesuffix(".weight"): weight for weight in weights if is_expert(weight)}
    return {
        path: {part: names[module] for part, module in parts.items()}
        for path, parts in places_of_experts(model, names).items()
        if (form := form_of(model.get_submodule(path))) is not None and not form.batched
    }


def _in_order(inputs: LayerInputs) -> Iterator[tuple[list[str], Moments]]:
    return ((sorted(names), moments) for names, moments in inputs.groups())
