"""``load()``: an output directory of ``loftq convert`` as a PeftModel that is ready to train."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loftq_cli.checkpoint.output import Output, open_output, require_backbone
from loftq_cli.checkpoint.small_file import read_json
from loftq_cli.errors import InputError, SourceNotFoundError, UnsupportedInputError
from loftq_cli.families.blocks import stack_of
from loftq_cli.families.classes import model_class
from loftq_cli.families.names import places
from loftq_cli.families.parts import config_for
from loftq_cli.layouts.base import Layout, matrix_of
from loftq_cli.layouts.registry import layout_class
from loftq_cli.loading import guard, hook
from loftq_cli.loading.attach_start import attach_start, names_in, refuse_tied
from loftq_cli.loading.attach_trained import attach_trained
from loftq_cli.loading.container import contained_modules
from loftq_cli.loading.decoded import DecodedBackbone, state_dict, without_quantization
from loftq_cli.loading.intact import check_files
from loftq_cli.loading.trained_beside import TrainedBeside, leave_beside
from loftq_cli.loading.warned import DetachedAdapter
from loftq_cli.machine.packages import missing_extra, required


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
        names = names_in(backbone, output)
        refuse_tied(backbone, names, directory)
        new = _new_modules(backbone, report, names, output)
        model = attach_start(peft, backbone, names, directory, trainable)
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
