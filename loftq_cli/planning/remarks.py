"""What is said before a conversion, one line each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

from loftq_cli.checkpoint.companions import companions
from loftq_cli.checkpoint.pipeline import modules
from loftq_cli.checkpoint.small_file import read_json
from loftq_cli.checkpoint.source import Source
from loftq_cli.errors import InputError, listed
from loftq_cli.families import experts
from loftq_cli.planning.adapted import adapted_remarks
from loftq_cli.planning.plan import Plan
from loftq_cli.planning.target import may_be_narrow
from loftq_cli.planning.unused import unused_notes
from loftq_cli.settings.options import Options
from loftq_cli.settings.table import PAPER

_MOST_SHOWN = 4
_CODE = (".py", ".pyc", ".so", ".sh", ".ipynb")
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot"),
    *(".npz", ".pkl", ".index.json"),
)
_IN_REPOSITORY = re.compile(r"(?:(?P<repo>.+)--)?(?P<module>[\w.]+)\.\w+")


def remarks(plan: Plan, options: Options, *, measuring: bool) -> tuple[str, ...]:
    """What the user is to hear before ``plan`` is carried out. ``measuring``: statistics are made
    for it, so that nothing needs to be said of there being none."""
    if plan.given is not None:
        return tuple(adapted_remarks(plan))
    lines: list[str | None] = [*source_remarks(plan)]
    if plan.unmeasured and plan.statistics is not None:
        lines.append(
            f"{len(plan.unmeasured)} of {len(plan.matrices)} matrices are not in "
            f"{plan.statistics.path} and are converted without statistics"
        )
    if not plan.unsettled:
        lines.append(plan.layout.remark([item.matrix for item in plan.matrices.values()]))
    lines += [
        plan.layout_note,
        experts.note(plan.selection.kept, plan.source.config.content, plan.anatomy.experts),
    ]
    lines += [None if measuring else statistics_note(plan, options.preset)]
    return tuple(line for line in (*lines, *unused_notes(options, plan.recipe)) if line)


def source_remarks(plan: Plan) -> list[str]:
    """The lines about what transformers could not say, float64, what is left behind, and code."""
    found = [
        _encoded(plan.source),
        *plan.anatomy.remarks,
        _float64(plan),
        _left_behind(plan.source),
        *_code(plan.source),
        *_modules(plan.source),
    ]
    return [line for line in found if line]


def _encoded(source: Source) -> str | None:
    if not source.encoded:
        return None
    return (
        f"{source.id} is itself quantized ({', '.join(source.encoded)}): its tensors are decoded, "
        "and residuals are to those, not to the weights that they were made from"
    )


def statistics_note(plan: Plan, preset: str) -> str | None:
    """What narrow codes without statistics usually lose, None if that is not so or asked for
    (docs/statistics.md has the figures)."""
    unneeded = plan.statistics is not None or preset == PAPER or not plan.recipe.iters
    if unneeded or not may_be_narrow(plan):
        return None
    return (
        "without activation statistics: at 2 bits a small language model had 4 to 21 times, at 3 "
        "bits 1.3 to 1.6 times its perplexity with them (--calibrate-text FILE)"
    )


def _float64(plan: Plan) -> str | None:
    count = sum(item.matrix.dtype == "F64" for item in plan.matrices.values())
    verb = "is" if count == 1 else "are"
    line = f"{count} of {len(plan.matrices)} matrices {verb} float64, and converted in float32"
    return line if count else None


def _left_behind(source: Source) -> str | None:
    groups: dict[str, list[str]] = {"other weights": [], "code": [], "": []}
    for name in source.left_behind:
        suffix = PurePosixPath(name).suffix
        kind = "other weights" if name.endswith(_WEIGHTS) else "code" if suffix in _CODE else ""
        groups[kind].append(name)
    parts = [
        f"{kind} ({_listed(names)})" if kind else _listed(names)
        for kind, names in groups.items()
        if names
    ]
    return f"not copied: {', '.join(parts)}" if parts else None


def _code(source: Source) -> Iterator[str]:
    """What the files that name code of their own (``auto_map``) come to without it."""
    wanted = _wanted(source.config.content)
    if wanted:
        yield f"config.json names code that is not copied ({_listed(wanted)}): {_without(source)}"
    for name in companions(source.directory):
        if name.endswith("_config.json") and "/" not in name:
            try:
                wanted = _wanted(read_json(source.directory / name).content)
            except InputError:
                continue  # it is copied as it is
            if wanted:
                yield (
                    f"{name} names code that is not copied ({_listed(wanted)}): copy it to the "
                    "output, if you trust it, and load with trust_remote_code=True"
                )


def _wanted(content: Mapping[str, Any]) -> list[str]:
    """The files of the model's own code that a config names; what lies in another repository
    is found there."""
    auto_map = content.get("auto_map")
    names = []
    for value in auto_map.values() if isinstance(auto_map, dict) else ():
        for reference in value if isinstance(value, list) else [value]:
            match = _IN_REPOSITORY.fullmatch(reference) if isinstance(reference, str) else None
            if match and not match["repo"]:
                names.append(f"{match['module'].replace('.', '/')}.py")
    return sorted(set(names))


def _without(source: Source) -> str:
    """How the output loads without the code that config.json names."""
    copy = "copy it to the output, if you trust it, and load with trust_remote_code=True"
    name = str((source.config.content.get("architectures") or ["the class"])[0])
    found = find_spec("transformers")
    if found is None or found.origin is None:
        return f"if transformers has no {name} of its own, {copy}"
    # Read and not imported: a conversion neither needs transformers nor waits for it.
    tables = Path(found.origin).parent.glob("models/auto/*.py")
    if any(f'"{name}"' in path.read_text("utf-8") for path in tables):
        return f"transformers has a {name} of its own, load without trust_remote_code"
    return f"transformers has no {name}, so {copy}"


def _modules(source: Source) -> Iterator[str]:
    """What a pipeline of sentence-transformers lacks in the output."""
    pickled = [
        name
        for name in source.left_behind
        if PurePosixPath(name).name == "pytorch_model.bin"
        and name.rpartition("/")[0] in {entry.get("path") for entry in modules(source.directory)}
    ]
    copied = set(companions(source.directory))
    lacking = [n for n in pickled if f"{n.rpartition('/')[0]}/model.safetensors" not in copied]
    if lacking:
        yield (
            f"sentence-transformers needs {_listed(lacking)}, which is pickled and not copied: "
            "save the pipeline again with a current sentence-transformers"
        )
    types = (entry.get("type") for entry in modules(source.directory))
    own = {kind for kind in types if isinstance(kind, str) and "sentence_transformers." not in kind}
    if own:
        yield (
            f"modules.json names code that is not copied ({_listed(sorted(own))}): copy it to the "
            "output, if you trust it, and load with trust_remote_code=True"
        )


def _listed(names: Sequence[str]) -> str:
    return listed(names, _MOST_SHOWN)
