"""Options of the commands, from the table of settings and for several commands alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import click

from loftq_cli.cli.guard import ExpandedPath
from loftq_cli.settings.kinds import Choice, File, Truth, flag
from loftq_cli.settings.table import Entry, Group, entries

directory_argument = click.argument("directory", default="out", type=str, metavar="[DIR]")
revision_option = click.option(
    "--revision", type=str, help="Branch, tag or commit of DIR, if it is on the hub."
)
model_revision_option = click.option(
    "--revision", type=str, help="Branch, tag or commit on the hub."
)
output_option = click.option(
    "-o", "--output", required=True, type=ExpandedPath(), help="Directory to write."
)
offline_option = click.option("--offline", is_flag=True, help="Use only what is in the hub cache.")
all_option = click.option("--all", "every", is_flag=True, help="List every matrix.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON with stable keys.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="No progress, no remarks.")
log_option = click.option(
    "--log-file",
    type=ExpandedPath(),
    metavar="FILE",
    help="Append remarks, errors and, once a minute, how far it is to FILE.",
)
samples_option = click.option(
    "--samples", type=int, help="Windows of text.  [default: all, up to 128]"
)
length_option = click.option(
    "--length",
    type=int,
    help="Tokens a window.  [default: 512, or as many as the model takes]",
)
device_option = click.option(
    "--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."
)
seed_option = click.option(
    "--seed", type=int, default=0, show_default=True, help="Seed of the choice of windows."
)

_F = TypeVar("_F", bound=Callable[..., Any])


calibrate_text_option = click.option(
    "--calibrate-text",
    "texts",
    multiple=True,
    type=ExpandedPath(),
    metavar="FILE",
    help="Measure statistics first, on this text (UTF-8, repeatable; self: text that the "
    "model writes), and keep them beside the output.  Needs the extra [train].",
)


def text_option(told: str) -> Callable[[_F], _F]:
    """``--text``, which is needed and may be repeated, with its help."""
    return click.option(
        "--text",
        "texts",
        required=True,
        multiple=True,
        type=ExpandedPath(),
        metavar="FILE",
        help=told,
    )


def setting_options(group: Group) -> Callable[[_F], _F]:
    """Options for the settings of ``group``, in the order of the table. A setting that is not given
    is None, or an empty tuple."""
    return settings_options(entry.name for entry in entries().values() if entry.group == group)


def settings_options(
    names: Iterable[str], told: Mapping[str, str] | None = None
) -> Callable[[_F], _F]:
    """Options for the settings of these ``names``, as :func:`setting_options`; ``told``: the help
    of those that mean something else here."""
    known = entries()
    found = [known[name] for name in names]

    def decorate(command: _F) -> _F:
        for entry in reversed(found):
            keywords = _keywords(entry)
            keywords["help"] = (told or {}).get(entry.name, keywords["help"])
            command = click.option(*_flags(entry), **keywords)(command)
        return command

    return decorate


def choice(*names: str) -> click.Choice[str]:
    """The type of an option that takes one of these."""
    return click.Choice(names)


moments_option = click.option(
    "--moments",
    type=choice("diagonal", "full"),
    help="What --calibrate-text measures.  [default: full with 3 bits and fewer, unless they take "
    "more of the disk than the model; else diagonal]",
)


class _Asked(click.Choice):  # type: ignore[type-arg]  # generic since click 8.2 only
    """Choices that are asked for when they are needed: layouts and methods may be registered after
    this module was imported."""

    def __init__(self, kind: Choice) -> None:
        self.kind = kind
        self.case_sensitive = True

    @property
    def choices(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.kind.choices


def _flags(entry: Entry) -> list[str]:
    name = flag(entry.name)
    if isinstance(entry.kind, Truth) and entry.default:
        return [f"{name}/--no-{name.removeprefix('--')}"]
    return [*([f"-{entry.short}"] if entry.short else []), name]


def _keywords(entry: Entry) -> dict[str, Any]:
    kind = entry.kind
    found: dict[str, Any] = {"help": _help(entry), "metavar": entry.metavar}
    if isinstance(kind, Truth):
        found |= {"default": None} if entry.default else {"is_flag": True, "default": None}
    elif isinstance(kind, File):
        found["type"] = click.Path()
    elif kind.repeats:
        found["multiple"] = True
    elif isinstance(kind, Choice) and kind.type is str:
        found["type"] = _Asked(kind)
    else:
        found["type"] = kind.type
    return found


def _help(entry: Entry) -> str:
    default = entry.default_help
    if default is None and entry.default is not False and entry.default not in (None, ()):
        default = str(entry.default)
    return entry.help if default is None else f"{entry.help}  [default: {default}]"
