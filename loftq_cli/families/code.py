"""What the code of a model does with the weights of its layers, read from its source.

A packed layer, and an adapter around a layer, take part in a model if its code calls the layer.
Code that reads ``self.out_proj.weight`` and computes with it (fused kernels, functions of torch
that take weights, coefficients that are clamped in place) passes both by.
"""

from __future__ import annotations

import ast
import inspect
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from torch import nn

Use = Literal["value", "dtype"]

_SETUP = re.compile(r"_*(?:init|reset|resize|tie|set|post_init|smart_apply)")
"""Methods that make a model, not run it."""
_HARMLESS = ("device", "shape", "ndim", "is_cuda", "size", "dim", "numel", "requires_grad")
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
_UNKNOWN = object()


@dataclass(frozen=True)
class _Read:
    """``.weight`` of ``path`` below the module itself (``own``), or below something in it; or that
    of whatever holds the ``first`` parameter there."""

    path: tuple[str, ...]
    own: bool
    use: Use
    first: bool = False


def weights_read(model: nn.Module) -> dict[str, Use]:
    """The modules of ``model`` whose ``weight`` its code uses itself: its "value", or, to cast
    other tensors to it, its "dtype". Branches that the model's settings rule out do not count."""
    found: dict[str, Use] = {}
    for name, module in model.named_modules():
        reads = list(_reads(module))
        if not reads:
            continue
        for below, part in module.named_modules():
            parts = tuple(below.split(".")) if below else ()
            for read in reads:
                if parts == read.path or (not read.own and parts[-len(read.path) :] == read.path):
                    inside = _first_owner(part) if read.first else ""
                    path = ".".join(filter(None, (name, below, inside)))
                    found[path] = "value" if "value" in (read.use, found.get(path)) else "dtype"
    return found


def _first_owner(module: nn.Module) -> str:
    """The module below ``module`` whose parameter ``module.parameters()`` gives first."""
    return next((name.rpartition(".")[0] for name, _ in module.named_parameters()), "")


def _reads(module: nn.Module) -> Iterator[_Read]:
    kind: Any = type(module)  # mypy takes no metaclass for hashable
    for function in _methods(kind):
        yield from _Reader(module).of(function)


@lru_cache(maxsize=4096)
def _methods(kind: Any) -> tuple[ast.FunctionDef, ...]:
    """The methods of a class of a model that mention weights, each as the class itself sees it."""
    found: dict[str, ast.FunctionDef | None] = {}
    for owner in kind.__mro__:
        if owner.__module__.startswith(("torch.", "builtins", "transformers.modeling_utils")):
            continue
        for node in _bodies(owner.__module__).get(owner.__qualname__, ()):
            found.setdefault(node.name, node)
    return tuple(
        node
        for name, node in found.items()
        if node is not None
        and not _SETUP.match(name)
        and any(word in ast.dump(node) for word in ("'weight'", "'parameters'"))
    )


@lru_cache(maxsize=256)
def _bodies(module: str) -> dict[str, tuple[ast.FunctionDef, ...]]:
    """Class to methods, of a module's source; empty if there is no source to read."""
    try:
        tree = ast.parse(inspect.getsource(__import__(module, fromlist=["_"])))
    except (ImportError, OSError, TypeError, SyntaxError):
        return {}
    return {
        node.name: tuple(item for item in node.body if isinstance(item, ast.FunctionDef))
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }


class _Reader:
    """Collects the reads in a method of ``module``."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def of(self, node: ast.AST, parent: ast.AST | None = None) -> Iterator[_Read]:
        """The reads in ``node`` that the module's settings do not rule out."""
        if isinstance(node, (ast.If, ast.IfExp)):
            yield from self._branches(node)
            return
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
            return
        if isinstance(node, ast.Attribute):
            read = _read(node, parent) if node.attr == "weight" else _read_of_first(node)
            if read is not None:
                yield read
        for child in ast.iter_child_nodes(node):
            yield from self.of(child, node)

    def _branches(self, node: ast.If | ast.IfExp) -> Iterator[_Read]:
        truth = self._value(node.test)
        parts: list[ast.AST] = [node.test]
        for branch, taken in ((node.body, True), (node.orelse, False)):
            if truth is _UNKNOWN or bool(truth) is taken:
                parts += branch if isinstance(branch, list) else [branch]
        for part in parts:
            yield from self.of(part, node)

    def _value(self, node: ast.AST) -> Any:
        """What an expression is for this module, _UNKNOWN if its settings do not say."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Attribute):
            return self._setting(node)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            value = self._value(node.operand)
            return value if value is _UNKNOWN else not value
        if isinstance(node, ast.BoolOp):
            values = [self._value(item) for item in node.values]
            decisive = isinstance(node.op, ast.Or)
            if any(value is not _UNKNOWN and bool(value) is decisive for value in values):
                return decisive
            return _UNKNOWN if _UNKNOWN in values else not decisive
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            left, right = self._value(node.left), self._value(node.comparators[0])
            compare = _COMPARISONS.get(type(node.ops[0]))
            if compare is not None and _UNKNOWN not in (left, right):
                try:
                    return compare(left, right)
                except TypeError:
                    return _UNKNOWN
        return _UNKNOWN

    def _setting(self, node: ast.Attribute) -> Any:
        """The value of ``self.….name``, if it is one that is fixed when the model is made."""
        names = _chain(node)
        if names is None or names[0] != "self" or names[1] == "training":
            return _UNKNOWN
        value: Any = self._module
        for name in names[1:]:
            value = getattr(value, name, _UNKNOWN)
        return value if value is None or isinstance(value, (bool, int, float, str)) else _UNKNOWN


def _read(node: ast.Attribute, parent: ast.AST | None) -> _Read | None:
    names = _chain(node.value)
    if names is None or len(names) < 2:
        return None
    use: Use = "value"
    if isinstance(parent, ast.Attribute):
        if parent.attr in _HARMLESS:
            return None
        use = "dtype" if parent.attr == "dtype" else "value"
    return _Read(tuple(names[1:]), names[0] == "self", use)


def _read_of_first(node: ast.Attribute) -> _Read | None:
    """That of ``next(self.….parameters()).dtype``."""
    call = node.value
    if node.attr != "dtype" or not isinstance(call, ast.Call) or ast.unparse(call.func) != "next":
        return None
    inner = call.args[0]
    if not isinstance(inner, ast.Call) or not isinstance(inner.func, ast.Attribute):
        return None
    names = _chain(inner.func.value)
    if names is None or inner.func.attr != "parameters":
        return None
    return _Read(tuple(names[1:]), names[0] == "self", "dtype", first=True)


def _chain(node: ast.AST) -> list[str] | None:
    """``["self", "a", "0", "b"]`` of ``self.a[0].b``, None for anything else."""
    names: list[str] = []
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        if isinstance(node, ast.Attribute):
            names.append(node.attr)
        elif isinstance(node.slice, ast.Constant):
            names.append(str(node.slice.value))
        else:
            return None
        node = node.value
    return [node.id, *reversed(names)] if isinstance(node, ast.Name) else None
