"""The table of settings: one entry each, from which everything else follows.

An entry is a field of :class:`Settings` with its kind, its default by preset, its help, and what a
manifest without it meant. From it come the options of ``loftq convert`` and their help, the checks,
the keys of recipe files, the recipe in the manifest and that part of its schema. A new setting is
an entry here, the code that uses it, and its place in docs/cli.md, which a test asks for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from loftq_cli.layouts import registry
from loftq_cli.numerics.quantizers import methods
from loftq_cli.settings.kinds import (
    Bits,
    Choice,
    File,
    Kind,
    Map,
    Patterns,
    Positive,
    Text,
    Truth,
    Whole,
)

if TYPE_CHECKING:
    from loftq_cli.numerics.decomposition import Keep, Order, Svd
    from loftq_cli.numerics.quantizers.base import Scale
    from loftq_cli.numerics.quantizers.scale_storage import ScaleDtype

DEFAULT, PAPER, BEST = "default", "paper", "best"
PRESETS = (DEFAULT, PAPER, BEST)
"""Where the defaults come from; "paper" is what the LoftQ reference code does, "best" what pays if
time does not matter."""

MIXED = (2, 4)
"""The widths that a fraction between them mixes."""

BLOCK_SIZES = (32, 64, 128, 256)
MAX_RANK = 65_536
MAX_ITERS = 1_000

_SAME: Any = object()
DTYPES = ("source", "float32", "float16", "bfloat16")
_POSITIVE = {"$ref": "#/$defs/positive"}

OF_ADAPTERS = (
    *("rank", "rank_map", "svd", "include", "exclude", "stats", "lora_alpha", "base_model"),
    *("adapter_dtype", "device", "threads", "seed"),
)
"""The settings of an adapter for a backbone that exists."""

Group = Literal["how", "which", "statistics", "where"]
"""Settings that stand together in ``--help``."""


@dataclass(frozen=True)
class Entry:
    """What there is to know of a setting.

    ``paper`` and ``best``: its defaults under these presets. ``group``, ``help``, ``metavar``,
    ``short`` and ``default_help`` make the option; without a group there is none. ``absent``: what
    a manifest without it meant, if it may be without. ``settled``: the schema of its value in a
    manifest, if that is not what may be asked for.
    """

    name: str
    kind: Kind
    default: Any
    paper: Any = _SAME
    best: Any = _SAME
    group: Group | None = None
    help: str = ""
    default_help: str | None = None
    metavar: str | None = None
    short: str | None = None
    absent: Any = _SAME
    settled: Mapping[str, Any] | None = None

    def default_of(self, preset: str) -> Any:
        own = {PAPER: self.paper, BEST: self.best}.get(preset, _SAME)
        return self.default if own is _SAME else own

    @property
    def required(self) -> bool:
        """Whether every manifest has it."""
        return self.absent is _SAME


def _setting(kind: Kind, default: Any, **more: Any) -> Any:
    """A field of Settings with its entry."""
    return field(default=default, metadata={"kind": kind, **more})


def _method_choices() -> tuple[str, ...]:
    return (methods.AUTO, *methods.names())


def _layout_choices() -> tuple[str, ...]:
    return (registry.AUTO, *registry.names())


@dataclass(frozen=True)
class Settings:
    """Every setting has a value, but ``method``, ``layout`` and ``device`` may still be "auto",
    which the checkpoint and the machine decide. ``lora_alpha`` None: the rank; ``threads`` None:
    all; ``bits`` None: ``target_bpw`` decides, an average of stored bits. ``bits_map`` and
    ``rank_map`` overrule ``bits``, ``target_bpw`` and ``rank`` (see maps); ``widths`` are entries
    for the matrices whose width the target has settled. ``stats``: the path of a file of activation
    statistics."""

    bits: float | None = _setting(
        Bits(methods.WIDTHS, MIXED),
        4,
        group="how",
        metavar="N",
        help="Width of a code: 2, 3, 4 or 8, or a fraction between 2 and 4, which gives the first "
        "layers 4 bits and the rest 2.",
    )
    bits_map: tuple[str, ...] = _setting(
        Map(Choice(methods.WIDTHS)),
        (),
        group="how",
        metavar="PATTERN=BITS,...",
        help="Widths of these tensors (globs over tensor names, later entries win).",
        absent=(),
    )
    target_bpw: float | None = _setting(
        Positive(),
        None,
        group="how",
        metavar="X",
        help="Choose a width for every matrix, instead of --bits: the least residual, or with "
        "sensitivities the least loss, at an average of X stored bits per weight, scales included.",
        absent=None,
    )
    method: str = _setting(
        Choice(_method_choices),
        methods.AUTO,
        paper="nf",
        group="how",
        help="Quantizer.",
        default_help="auto, which is nf at 4 bits and uniform at 2, 3 and 8",
    )
    rank: int = _setting(Whole(1, MAX_RANK), 16, group="how", help="Rank of the adapter.")
    rank_map: tuple[str, ...] = _setting(
        Map(Whole(1, MAX_RANK)),
        (),
        group="how",
        metavar="PATTERN=RANK,...",
        help="Ranks of these tensors (globs over tensor names, later entries win).",
        absent=(),
    )
    iters: int = _setting(
        Whole(0, MAX_ITERS),
        5,
        best=20,
        group="how",
        help="Alternating steps; 0 is QLoRA's start.",
        default_help="5, or 20 under --preset best",
    )
    block_size: int = _setting(
        Choice(BLOCK_SIZES), 64, group="how", help="Weights per scale: 32, 64, 128 or 256."
    )
    layout: str = _setting(
        Choice(_layout_choices),
        registry.AUTO,
        group="how",
        help="How the backbone is stored.",
        default_help="auto, which is what stock transformers loads (bnb, gptq) if that holds "
        "every matrix, else loftq",
        settled={"$ref": "#/$defs/layout"},
    )
    scale: Scale = _setting(
        Choice(("mse", "absmax")),
        "mse",
        paper="absmax",
        group="how",
        help="Fit scales to the least squared error, or take the largest magnitude.",
        settled={"enum": ["mse", "absmax", "fixed"]},
    )
    scale_dtype: ScaleDtype = _setting(
        Choice(("float32", "bfloat16", "int8")),
        "float32",
        group="how",
        help="How layout loftq stores scales.",
        absent="float32",
    )
    order: Order = _setting(
        Choice(("quantize-first", "svd-first")),
        "quantize-first",
        group="how",
        help="Start from the quantization or from the SVD of the weight.",
    )
    svd: Svd = _setting(
        Choice(("fast", "exact")),
        "fast",
        paper="exact",
        group="how",
        help="Warm-started subspace iteration, or a full SVD every step.",
    )
    keep: Keep = _setting(Choice(("best", "last")), "best", paper="last")
    momentum: bool = _setting(Truth(), True, paper=False, absent=False)
    embeddings: bool = _setting(
        Truth(), False, group="which", help="Quantize word embeddings as well.", absent=False
    )
    include: tuple[str, ...] = _setting(
        Patterns(),
        (),
        group="which",
        metavar="PATTERN",
        help="Quantize these tensors as well (glob over tensor names, repeatable).",
    )
    exclude: tuple[str, ...] = _setting(
        Patterns(),
        (),
        group="which",
        metavar="PATTERN",
        help="Pass these tensors through (glob over tensor names, repeatable).",
    )
    stats: str | None = _setting(
        File(),
        None,
        group="statistics",
        metavar="FILE",
        help="Activation statistics (`loftq calibrate`, or a llama.cpp imatrix): minimise the "
        "error of each layer's output instead of its weights.",
        absent=None,
        settled={"type": ["string", "null"], "pattern": "^[0-9a-f]{64}$"},
    )
    feedback: bool = _setting(
        Truth(),
        True,
        paper=False,
        group="statistics",
        help="With full statistics, let the last step make up for the rounding error of each "
        "column in those after it.",
        default_help="yes, if scales are fitted",
        absent=False,
    )
    feedback_passes: int = _setting(
        Whole(1, MAX_ITERS),
        1,
        best=3,
        group="statistics",
        help="How often feedback goes over a matrix; between two passes scales are refit.",
        default_help="1, or 3 under --preset best",
        absent=1,
    )
    lora_alpha: float | None = _setting(
        Positive(),
        None,
        group="where",
        help="lora_alpha of the adapter; B is divided by the scaling.",
        default_help="the rank",
    )
    base_model: str | None = _setting(
        Text("a hub id, or a path"),
        None,
        group="where",
        metavar="ID",
        help="What the adapter's config calls the backbone, such as the hub id it will have.",
        default_help="nothing",
        absent=None,
        settled={"type": ["string", "null"]},
    )
    adapter_dtype: str = _setting(Choice(DTYPES), "source", group="where", help="dtype of A and B.")
    dense_dtype: str = _setting(
        Choice(DTYPES), "source", group="where", help="dtype of the backbone in layout dense."
    )
    device: str = _setting(
        Text("auto, cpu, cuda, cuda:N, several with commas, or all"),
        "auto",
        group="where",
        help="auto, cpu, cuda or cuda:N; cuda:0,cuda:1 or all: several at once.",
        settled={"enum": ["cpu", "cuda"]},
    )
    threads: int | None = _setting(
        Whole(1, 1024),
        None,
        group="where",
        short="t",
        help="CPU threads.",
        default_help="all",
        settled=_POSITIVE,
    )
    seed: int = _setting(Whole(0, 2**63 - 1), 0, group="where", help="Seed of every random draw.")
    widths: tuple[str, ...] = _setting(Map(Choice(methods.WIDTHS)), (), absent=())


def entries() -> dict[str, Entry]:
    """Every setting, by name, in the order of the help."""
    return {
        each.name: Entry(name=each.name, default=each.default, **each.metadata)
        for each in fields(Settings)
    }
