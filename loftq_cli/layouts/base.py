"""What a layout is: how a quantized matrix becomes named tensors and config entries, and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from loftq_cli.checkpoint.header import TensorSpec
from loftq_cli.checkpoint.stacks import Cut
from loftq_cli.families.kinds import Kind, turned_shape
from loftq_cli.numerics.quantizers.blocks import Quantized
from loftq_cli.numerics.quantizers.packed import Packed
from loftq_cli.numerics.quantizers.scale_storage import ScaleDtype


@dataclass(frozen=True)
class Held:
    """How a checkpoint that somebody else quantized holds a matrix: the tensors that are it, and
    what config.json has to say of them (checkpoint.decoding). ``form``: the format, ``dtype``: the
    tag of what it is decoded to, in which its consumers compute."""

    form: str
    dtype: str
    specs: tuple[TensorSpec, ...]
    stated: Mapping[str, Any] = field(hash=False)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, as the manifest holds it."""
        tensors = [{"name": s.name, "dtype": s.dtype, "shape": list(s.shape)} for s in self.specs]
        return {
            "form": self.form,
            "dtype": self.dtype,
            "tensors": tensors,
            "stated": dict(self.stated),
        }

    @staticmethod
    def read(held: Mapping[str, Any]) -> Held:
        """Inverse of :meth:`as_dict`."""
        specs = (TensorSpec(t["name"], t["dtype"], tuple(t["shape"])) for t in held["tensors"])
        return Held(held["form"], held["dtype"], tuple(specs), held["stated"])


@dataclass(frozen=True)
class Matrix:
    """A weight matrix that is to be, or was, quantized.

    ``name`` is the tensor's (``….weight``), ``dtype`` its safetensors tag in the source, ``shape``
    (out, in), whichever way it is stored. ``in_memory``: the name of its module in the class that
    config.json names, if that is another than on disk. ``cut``: of which tensor it is a part, if
    the source holds it with others in one. ``held``: how, if the backbone is somebody else's.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    method: str
    bits: int
    block_size: int
    kind: Kind = "linear"
    in_memory: str | None = None
    cut: Cut | None = None
    held: Held | None = None

    @property
    def stored_shape(self) -> tuple[int, int]:
        """The shape of the source's tensor."""
        return turned_shape(self.shape, self.kind)

    @property
    def module(self) -> str:
        """The module's name on disk."""
        return self.name.removesuffix(".weight")

    @property
    def adapted(self) -> str:
        """The module's name in the adapter, which is that in memory: so PEFT itself saves it."""
        return self.in_memory or self.module

    @property
    def elements(self) -> int:
        return self.shape[0] * self.shape[1]


def matrix_of(record: Mapping[str, Any]) -> Matrix:
    """The matrix that an entry of the manifest's ``matrices`` describes."""
    rows, columns = record["shape"]
    return Matrix(
        record["name"],
        (rows, columns),
        record["dtype"],
        record["method"],
        record["bits"],
        record["block_size"],
        record.get("kind", "linear"),
        record.get("in_memory"),
        Cut(**record["cut"]) if "cut" in record else None,
        Held.read(record["held"]) if "held" in record else None,
    )


GROUP_SIZES = (32, 64, 128)
"""Weights of a row that have one scale, in software that serves and trains uniform codes."""


def ungrouped(matrix: Matrix, holder: str) -> str | None:
    """Why the rows of ``matrix`` are not in whole groups that ``holder`` has; None if they are."""
    if matrix.block_size not in GROUP_SIZES:
        return f"{holder} holds groups of 32, 64 or 128, not {matrix.block_size}"
    if matrix.shape[1] % matrix.block_size:
        return f"in_features {matrix.shape[1]} is not a multiple of {matrix.block_size}"
    return None


@dataclass(frozen=True)
class Surroundings:
    """What else a consumer's config needs to know: the backbone's config.json so far, modules with
    two-dimensional weights that stay as they are, and the path of each stack of blocks. All names
    are those in memory."""

    config: Mapping[str, Any]
    kept_modules: Sequence[str]
    stacks: Sequence[str]


class Layout(ABC):
    """One way to store quantized matrices. Stateless. Whatever is not said here, or by a subclass
    in its own file, no other module knows of a layout."""

    name: ClassVar[str]
    imports: ClassVar[tuple[str, ...]]
    """The packages that have to be importable if an output is to be loaded and trained."""
    extra: ClassVar[str] = "train"
    """Our extra that installs them."""
    portable: ClassVar[bool] = False
    """Whether a quantizer rounds each scale to a portable one as it fits it."""
    scale_dtypes: ClassVar[tuple[ScaleDtype, ...]] = ("float32",)
    """What scales can be stored in, if somebody asks for less than the layout has."""
    scale_dtype: ScaleDtype = "float32"
    """What they are stored in, of those."""
    settings: ClassVar[tuple[str, ...]] = ()
    """Settings that concern this layout and not every other."""
    mixes: ClassVar[bool] = True
    """Whether matrices of several widths and methods can be in one output."""
    holds_everything: ClassVar[bool] = False
    """Whether it is what layout "auto" takes if no other layout can hold a matrix."""
    holds_experts: ClassVar[bool] = False
    """Whether PEFT can put adapters on experts that are stored so."""
    holds_fused_alike: ClassVar[bool] = False
    """Whether layers that servers fuse, such as q, k and v, have to have one width."""
    holds_values: ClassVar[bool] = False
    """Whether it takes values that are no codes of a method of ours (:meth:`encode_values`)."""
    holds_codes: ClassVar[bool] = True
    """Whether :meth:`quantized` gives them back."""
    keeps_decoded: ClassVar[bool] = False
    """Whether the library that trains it keeps every decoded weight from forward to backward."""
    packs: ClassVar[bool] = False
    """Whether :meth:`packed` gives what our own modules keep in memory."""
    keeps_conv1d: ClassVar[bool] = False
    """Whether a transposed linear layer stays one for whoever loads the output; else it is an
    ordinary one."""
    auto_rank: ClassVar[int | None] = None
    """When layout "auto" asks this one, the least first; None: never."""

    @classmethod
    def of(cls, recipe: Mapping[str, Any]) -> Layout:
        """The layout as the settings of ``recipe`` want it, which may be an old manifest's."""
        return cls()

    @classmethod
    def method_at(cls, bits: int) -> str | None:
        """What method "auto" means at that width, None if the layout does not mind."""
        return None

    def suits(self, name: str, bits: int, surroundings: Surroundings) -> bool:
        """Whether layout "auto" should try this one for a model that is quantized by the method
        ``name``."""
        return False

    def cannot_hold(self, matrix: Matrix) -> str | None:
        """Why this layout cannot hold ``matrix``, or None."""
        return None

    def cannot_describe(self, surroundings: Surroundings) -> str | None:
        """Why this layout's config cannot name the quantized modules of this model, or None."""
        return None

    def cannot_combine(self, matrices: Sequence[Matrix]) -> str | None:
        """Why these matrices, each of which it can hold, cannot be in one output, or None."""
        return None

    def remark(self, matrices: Sequence[Matrix]) -> str | None:
        """What whoever asks for this layout is to hear of an output with these, or None."""
        return None

    def loaded_bytes(self, matrix: Matrix, bits: int) -> int:
        """What the stored tensors take in memory, in a model whose dtype has so many ``bits``."""
        return sum(spec.nbytes for spec in self.specs(matrix))

    def rounding(self, matrix: Matrix) -> torch.dtype | None:
        """The dtype that Q itself is rounded to, None if codes and scales are stored."""
        return None

    @abstractmethod
    def specs(self, matrix: Matrix) -> list[TensorSpec]:
        """The tensors that :meth:`encode` will return, known before anything is computed."""

    @abstractmethod
    def encode(self, matrix: Matrix, quantized: Quantized) -> dict[str, torch.Tensor]:
        """The stored tensors of a quantized matrix, by name."""

    def encode_values(self, matrix: Matrix, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """The stored tensors of Q, float32 (out, in), if the layout ``holds_values``."""
        raise NotImplementedError(self.name)

    @abstractmethod
    def decode(self, matrix: Matrix, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Q, float32 (out, in), from stored tensors of the dtypes and shapes of :meth:`specs`.

        Raises CorruptFileError if their values make no sense."""

    def quantized(self, matrix: Matrix, tensors: Mapping[str, torch.Tensor]) -> Quantized | None:
        """Codes and parameters of stored tensors, None unless the layout ``holds_codes``. Raises as
        :meth:`decode`."""
        return None

    def packed(self, matrix: Matrix, tensors: Mapping[str, torch.Tensor]) -> Packed:
        """What our own modules keep in memory of stored tensors, if the layout ``packs``. Raises
        as :meth:`decode`."""
        raise NotImplementedError(self.name)

    def quantization_config(
        self, matrices: Sequence[Matrix], surroundings: Surroundings
    ) -> dict[str, Any] | None:
        """The entry for config.json, or None if the output is an ordinary checkpoint."""
        return None
