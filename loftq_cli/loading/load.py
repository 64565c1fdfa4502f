"""``load()``: an output directory of ``loftq convert`` as a PeftModel that is ready to train."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from loftq_cli.checkpoint.header import HeaderError, StoredTensor, read_header
from loftq_cli.checkpoint.output import Output, open_output, require_backbone
from loftq_cli.checkpoint.reader import TensorFile
from loftq_cli.checkpoint.small_file import read_json
from loftq_cli.errors import (
    CorruptFileError,
    InputError,
    SourceNotFoundError,
    UnsupportedInputError,
)
from loftq_cli.families.blocks import stack_of
from loftq_cli.families.classes import model_class, takes_text
from loftq_cli.families.experts import is_expert
from loftq_cli.families.names import (
    key_mapping,
    places,
    places_of_parameters,
    prefix_of,
    tied,
)
from loftq_cli.families.parts import config_for, left_out
from loftq_cli.families.tasks import task_type
from loftq_cli.layouts import adapter as adapters
from loftq_cli.layouts.base import Layout, matrix_of
from loftq_cli.layouts.registry import layout_class
from loftq_cli.loading import guard, hook
from loftq_cli.loading.attach_trained import attach_trained
from loftq_cli.loading.container import contained_modules
from loftq_cli.loading.decoded import DecodedBackbone, state_dict, without_quantization
from loftq_cli.loading.intact import check_files
from loftq_cli.loading.trained_beside import TrainedBeside, leave_beside
from loftq_cli.loading.warned import DetachedAdapter
from loftq_cli.machine.packages import missing_extra, required
from loftq_cli.numerics.metrics import squared_norm

_ROUNDED = 0.01  # of a sum of squares, at most, by the dtype that the adapter is loaded in


def load(
    path: str | os.PathLike[str] = "out",
    auto_class: Any = None,
    trainable: bool = True,
    *,
    adapter: str | os.PathLike[str] | None = None,
    **from_pretrained: Any,
) -> Any:
    """The backbone in ``path`` with the adapter in its ``loftq_init`` attached, or with a trained
    one, that PEFT saved in the directory ``adapter``.

    ``auto_class`` is the class to load the backbone with (``AutoModelForSequenceClassification``);
    without it, the one that config.json names, or that its model_type stands for. If that is a task
    model and the checkpoint is of the bare model, or the other way round, the adapter follows its
    modules. ``trainable`` makes the adapter's parameters trainable, and the modules that the
    checkpoint does not hold, such as a new classifier: PEFT saves those with the adapter
    (``modules_to_save``). Everything else is handed to the class's ``from_pretrained``; code that
    the model brings along is run with ``trust_remote_code=True`` only.

    An adapter that training left in ``path`` itself is attached if it is asked for (``adapter`` is
    ``path``); otherwise a TrainedBeside warning names it.

    Returns a ``peft.PeftModel``; of a conversion without an adapter (``loftq export --merge``) the
    backbone alone, unless ``adapter`` names one. Raises EnvironmentFailure if the extra [train] or
    [gptq] is not installed, and InputError if ``path`` is not the complete output of a conversion,
    is of a newer format, holds another conversion's adapter, or adapter tensors that the model has
    no place for, or lacks a part of a module, or if the class ties another module to an adapted
    one.
    """
    directory = Path(path)
    output = open_output(directory)
    require_backbone(output)
    start = adapter is None and output.has_adapter
    check_files(output, start=start)
    beside = leave_beside(output, adapter)
    peft, transformers = (required(name, "train", "loading") for name in ("peft", "transformers"))
    hook.install()
    remote = bool(from_pretrained.get("trust_remote_code"))
    chosen = auto_class or _model_class(directory, transformers, remote=remote)
    backbone, report = _backbone(chosen, output, {**beside, **from_pretrained})
    if adapter is None and not start:
        return backbone
    if adapter is None:
        names = _names(backbone, output)
        _refuse_tied(backbone, names, directory)
        new = _new_modules(backbone, report, names, output)
        model = _attach(peft, backbone, names, directory, trainable)
    else:
        new = _new_modules(backbone, report, {}, output)
        model = attach_trained(peft, backbone, output, Path(adapter), trainable)
        new = [module for module in new if not _is_saved(model, module)]
    if new and trainable:
        _train_in_full(peft, model, backbone, new)
    return model


def _backbone(chosen: Any, output: Output, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """The backbone of ``output`` in the class ``chosen``, and transformers' report. Raises
    EnvironmentFailure if a package is not installed."""
    layout = layout_class(output.records[0]["layout"])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DetachedAdapter)
            warnings.simplefilter("ignore", TrainedBeside)
            backbone, report = chosen.from_pretrained(
                output.directory,
                output_loading_info=True,
                **{**options, **_config(chosen, output, layout, options)},
            )
    except ImportError as error:
        if not output.is_foreign:
            raise missing_extra(error, layout.extra, "loading") from error
        backbone, report = _decoded(chosen, output, options, error)
    except Exception as error:  # of any kind, in other people's code
        if not output.is_foreign:
            raise
        backbone, report = _decoded(chosen, output, options, error)
    guard.tell_of_resizing(backbone)
    return backbone, report


def _decoded(
    chosen: Any, output: Output, options: Mapping[str, Any], error: Exception
) -> tuple[Any, Any]:
    """As :func:`_backbone`, of somebody else's quantizer that cannot be loaded as it is."""
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    warnings.warn(
        f"{output.directory}: transformers cannot load it as it is ({said}); its matrices are "
        "decoded, which takes the memory of the model itself",
        DecodedBackbone,
        stacklevel=4,
    )
    transformers = required("transformers", "train", "loading")
    remote = bool(options.get("trust_remote_code"))
    config = transformers.AutoConfig.from_pretrained(output.directory, trust_remote_code=remote)
    found = chosen.from_pretrained(
        None,
        output_loading_info=True,
        **{**options, "config": without_quantization(config), "state_dict": state_dict(output)},
    )
    return found[0], found[1]


def _config(
    chosen: Any, output: Output, layout: type[Layout], options: Mapping[str, Any]
) -> dict[str, Any]:
    """The config to load with, if that is not just the one in ``output``: one that has our own
    modules hold what transformers would decode, or that of the part which ``chosen`` is."""
    transformers = required("transformers", "train", "loading")
    own = getattr(chosen, "config_class", None)  # an auto class has none
    if not layout.packs and own is not None and not _is_known(own):
        return {}
    config = options.get("config") or transformers.AutoConfig.from_pretrained(
        output.directory, trust_remote_code=bool(options.get("trust_remote_code"))
    )
    if layout.packs:
        modules = contained_modules(output.manifest)
        stated = {"quant_method": "loftq", "format_version": 1, "modules": modules}
        config.quantization_config = stated
    part = config_for(chosen, config)
    if part is None:
        return {"config": config} if layout.packs else {}
    return {"config": part}


def _is_known(config_class: Any) -> bool:
    """Whether it is one of transformers' own, and no other library's."""
    return str(config_class.__module__).startswith("transformers.")


def _train_in_full(peft: Any, model: Any, backbone: Any, modules: Iterable[str]) -> None:
    """Have PEFT train these modules of ``backbone``, and save them with the adapter."""
    config = model.active_peft_config
    config.modules_to_save = [*(config.modules_to_save or ()), *modules]
    peft.utils.set_additional_trainable_modules(
        model=backbone,
        peft_config=config,
        model_config=backbone.config.to_dict(),
        adapter_name=model.active_adapter,
    )


def _is_saved(model: Any, module: str) -> bool:
    """Whether the adapter has ``module`` of the backbone in full."""
    return hasattr(model.get_base_model().get_submodule(module), "modules_to_save")


def _names(backbone: Any, output: Output) -> dict[str, str]:
    """Every module that has an adapter: its name in the file, and in ``backbone``, which may be a
    part of the model. Experts, which are no modules there, are left to PEFT."""
    file = output.directory / adapters.DIRECTORY / adapters.WEIGHTS
    stored = {name for name in _tensors(file) if not is_expert(name)}
    on_disk = {matrix.adapted: matrix.module for matrix in map(matrix_of, output.records)}
    present = places(backbone, on_disk.values())
    outside = left_out(backbone, on_disk.values(), present)
    names = {name: present[module] for name, module in on_disk.items() if module in present}
    modules = {adapters.module_of(name) for name in stored}
    modules = {name for name in modules if on_disk.get(name) not in outside}
    # PEFT passes over tensors that it finds no module for, with a warning at most.
    homeless = {name for name in stored if adapters.module_of(name) in modules - names.keys()}
    _refuse(homeless, f"{type(backbone).__name__} has no place for", file)
    return {name: names[name] for name in modules}


def _refuse_tied(backbone: Any, names: Mapping[str, str], directory: Path) -> None:
    """Raise InputError if a module without an adapter has the weight of one with: it would get Q
    alone, and nothing would say so."""
    if pair := tied(backbone, names.values()):
        raise InputError(
            f"{directory}: {type(backbone).__name__} ties {pair[0]} to {pair[1]}, and only one of "
            "them has the adapter",
            hint="load a class without that head, or convert without --embeddings",
        )


def _attach(
    peft: Any, backbone: Any, names: Mapping[str, str], directory: Path, trainable: bool
) -> Any:
    """The PeftModel of ``backbone``, every tensor of the adapter in its place."""
    config = peft.PeftConfig.from_pretrained(directory, subfolder=adapters.DIRECTORY)
    file = directory / adapters.DIRECTORY / adapters.WEIGHTS
    stored = _tensors(file)
    experts = {adapters.module_of(name) for name in stored if is_expert(name)}
    homes = _homes(backbone, config.target_parameters or (), file)  # of experts in PEFT's own form
    config.target_modules = {*names.values()} | (set() if homes else experts)
    if homes:
        config.target_parameters = [
            f"{homes[home]}.{leaf}"
            for home, _, leaf in (name.rpartition(".") for name in config.target_parameters)
        ]
    patterns = {re.escape(old): re.escape(new) for old, new in names.items()}
    config.rank_pattern = _renamed(config.rank_pattern, patterns)
    config.alpha_pattern = _renamed(config.alpha_pattern, patterns)
    config.task_type = task_type([type(backbone).__name__], takes_text=takes_text(backbone))
    model = peft.PeftModel.from_pretrained(
        backbone,
        directory,
        subfolder=adapters.DIRECTORY,
        is_trainable=trainable,
        config=config,
        key_mapping=key_mapping({**names, **homes}, prefix_of(backbone)),
    )
    expected = {}
    for name, tensor in stored.items():
        module = adapters.module_of(name).removesuffix(".base_layer")
        if module in names:
            expected[name.replace(module, names[module], 1)] = tensor
        elif module in homes:
            expected[name.replace(module, homes[module], 1)] = tensor
    # PEFT counts a head that has an adapter among the adapter's own tensors, unless told not to.
    loaded = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    fused = {name for name in loaded if is_expert(name)} - expected.keys()
    _refuse((loaded.keys() - fused) ^ expected.keys(), "PEFT and the file disagree about", file)
    taken = {tensor.name for tensor in expected.values()}
    parts = [stored[name] for name in stored if is_expert(name) and name not in taken]
    with TensorFile(file) as reader:
        unfused = _unfused({name: loaded[name] for name in fused}, parts, reader)
        lost = {name for name in expected if _differ(loaded[name], reader.read(expected[name]))}
    _refuse(unfused, "PEFT did not fuse", file)
    _refuse(lost, "PEFT did not load", file)
    return model


def _unfused(
    fused: Mapping[str, Any], parts: Sequence[StoredTensor], reader: TensorFile
) -> set[str]:
    """The names of what PEFT did not fuse from the ``parts`` in a file, as far as can be told:
    stacking keeps the sum of all squares, and a B that it found nothing for is zero."""
    if any(tensor.is_meta for tensor in fused.values()):
        return set()
    squares = {name: squared_norm(tensor.cpu()) for name, tensor in fused.items()}
    given = math.fsum(squared_norm(reader.read(part)) for part in parts)
    if math.isclose(math.fsum(squares.values()), given, rel_tol=_ROUNDED):
        return set()
    empty = {name for name, square in squares.items() if ".lora_B." in name and not square}
    return empty or {*squares} or {part.name for part in parts}


def _homes(backbone: Any, parameters: Iterable[str], file: Path) -> dict[str, str]:
    """The modules whose ``parameters`` have adapters: names in the file, and in ``backbone``."""
    found = places_of_parameters(backbone, parameters)
    homeless = {name for name, place in found.items() if place is None}
    _refuse(homeless, f"{type(backbone).__name__} has no place for", file)
    ends = ((old, new) for old, new in found.items() if new is not None)
    return {old.rpartition(".")[0]: new.rpartition(".")[0] for old, new in ends}


def _differ(loaded: torch.Tensor, stored: torch.Tensor) -> bool:
    """Whether PEFT has something else than the file, dtypes apart. What is on disk is trusted."""
    return not loaded.is_meta and not torch.equal(loaded.cpu(), stored.to(loaded.dtype))


def _renamed(patterns: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(pattern, pattern): value for pattern, value in patterns.items()}


def _new_modules(
    backbone: Any, report: Mapping[str, Any], names: Mapping[str, str], output: Output
) -> list[str]:
    """The modules that the checkpoint did not hold, which transformers drew at random.

    Raises InputError for a module that it did hold, in part or quantized, and for one of a block.
    """
    missing = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    directory = output.directory
    quantized = places(backbone, (matrix_of(record).module for record in output.records))
    stacks = {stack for name in quantized.values() if (stack := stack_of(name))}
    new = sorted({name.rpartition(".")[0] for name in missing})
    for module in new:
        own = {f"{module}.{key}" for key, _ in backbone.get_submodule(module).named_parameters()}
        if own - missing or module in names.values():
            lacking = sorted(name for name in missing if name.rpartition(".")[0] == module)
            raise InputError(
                f"{directory}: {type(backbone).__name__} does not find {', '.join(lacking)} in it",
                hint="load the class that config.json names, without auto_class; "
                "--layout loftq converts for other classes too",
            )
        if stack_of(f"{module}.") in stacks:
            raise InputError(
                f"{directory}: {type(backbone).__name__} does not find {', '.join(sorted(own))} in "
                "it, a part of a block",
                hint="the checkpoint that was converted is not whole, or the class is another",
            )
    return new


def _model_class(directory: Path, transformers: Any, *, remote: bool) -> Any:
    file = directory / "config.json"
    if not file.is_file():
        raise SourceNotFoundError(f"{directory}: no config.json in it", hint="convert again")
    config = read_json(file).content
    found = model_class(config, transformers, remote=remote)
    if found is None:
        runs = "; trust_remote_code=True runs the code that auto_map names" * ("auto_map" in config)
        raise UnsupportedInputError(
            f"{file}: transformers has no class for architectures {config.get('architectures')}, "
            f"nor for model_type {config.get('model_type')!r}",
            hint=f"say which to load with auto_class=, for example transformers.AutoModel{runs}",
        )
    return found


def _tensors(file: Path) -> dict[str, StoredTensor]:
    try:
        return {tensor.name: tensor for tensor in read_header(file).tensors}
    except FileNotFoundError:
        raise SourceNotFoundError(f"{file}: no such file", hint="convert again") from None
    except HeaderError as error:
        raise CorruptFileError(f"{file}: {error}", hint="convert again") from error


def _refuse(names: set[str], what: str, file: Path) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise InputError(
            f"{file}: {what} {', '.join(sorted(names)[:3])}{more}",
            hint="load the class that config.json names, without auto_class",
        )
