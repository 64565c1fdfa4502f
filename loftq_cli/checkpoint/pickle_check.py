"""What a pickle asks for, before it is unpickled: every opcode is followed without doing it.

torch's weights_only unpickler runs no foreign code, but it makes storages and byte arrays of any
length, copies containers as often as it is told to, and hashes tuples of tuples for ever. What
torch.save writes for a state dict needs none of that; anything else is refused here, so that
memory and time are bounded by the length of the pickle. Opcodes: Lib/pickletools.py of Python.
"""

from __future__ import annotations

import pickletools
import warnings
from typing import Any

import torch

from loftq_cli.checkpoint.header import HeaderError, shown

MAX_TENSORS = 100_000
"""Of one file: a fake tensor takes kilobytes, what asks for it a few bytes."""

_MOST_ITEMS = 64  # of a tuple; torch.save writes seven, or one a dimension
_DICT = "collections OrderedDict"
_REBUILDS = {
    f"torch._utils {name}"
    for name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter")
}
_DTYPES = {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_PLAIN = {
    "BINUNICODE": "text",
    "BININT": "number",
    "BININT1": "number",
    "BININT2": "number",
    "LONG1": "number",
    "BINFLOAT": "number",
    "NONE": "nothing",
    "NEWTRUE": "truth",
    "NEWFALSE": "truth",
    "EMPTY_TUPLE": "empty tuple",
    "EMPTY_DICT": "dict",
    "EMPTY_LIST": "list",
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def check(content: bytes) -> None:
    """Raises HeaderError, which says what it is, where ``content`` is no pickle or asks for
    anything but dicts, lists, numbers, text and tensors."""
    follower = _Follower()
    try:
        with warnings.catch_warnings():  # of escapes in names that are not known anyway
            warnings.simplefilter("ignore", DeprecationWarning)
            for opcode, argument, _ in pickletools.genops(content):
                follower.step(opcode.name, argument)
    except HeaderError:
        raise
    except (ValueError, IndexError, KeyError) as error:  # not a pickle, or its stack is empty
        raise HeaderError(f"a broken pickle: {shown(str(error))}") from error


class _Follower:
    """The unpickler's stack and memo, with the kind of each value in its place."""

    def __init__(self) -> None:
        self._stack: list[str] = []
        self._marks: list[int] = []
        self._memo: dict[int, str] = {}
        self._tensors = 0
        self._attributes = False

    def step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in ("PROTO", "STOP"):
            return
        if name in _PLAIN:
            stack.append(_PLAIN[name])
        elif name == "GLOBAL":
            stack.append(_known(str(argument)))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name == "MARK":
            self._marks.append(len(stack))
        elif name == "TUPLE":
            self._tuple(len(stack) - self._marks.pop())
        elif name in _TUPLES:
            self._tuple(_TUPLES[name])
        elif name == "BINPERSID":
            _expect(stack.pop(), ("tuple",), name)
            stack.append("storage")
        elif name == "REDUCE":
            self._reduce()
        elif name in ("SETITEM", "SETITEMS"):
            items = self._popped(2 if name == "SETITEM" else len(stack) - self._marks.pop())
            for key in items[::2]:
                _expect(key, ("text", "number"), f"the key of a dict, {name},")
            _expect(stack[-1], ("dict",), name)
        elif name in ("APPEND", "APPENDS"):
            self._popped(1 if name == "APPEND" else len(stack) - self._marks.pop())
            _expect(stack[-1], ("list",), name)
        elif name == "BUILD":
            self._build()
        else:
            raise HeaderError(f"its pickle holds more than tensors: opcode {name}")

    def _popped(self, count: int) -> list[str]:
        if not 0 <= count <= len(self._stack):
            raise ValueError("its stack runs empty")
        taken = self._stack[len(self._stack) - count :]
        del self._stack[len(self._stack) - count :]
        return taken

    def _tuple(self, count: int) -> None:
        if count > _MOST_ITEMS:
            raise HeaderError(f"its pickle holds a tuple of {count} items")
        self._popped(count)
        self._stack.append("tuple")

    def _reduce(self) -> None:
        function, arguments = self._popped(2)
        if function == _DICT:  # of something, it would be a copy
            _expect(arguments, ("empty tuple",), function)
            self._stack.append("dict")
            return
        if function not in _REBUILDS:
            raise HeaderError(f"its pickle holds more than tensors: a call of {shown(function)}")
        self._tensors += 1
        if self._tensors > MAX_TENSORS:
            raise HeaderError(f"its pickle holds more than {MAX_TENSORS:,} tensors")
        self._stack.append("tensor")

    def _build(self) -> None:
        """``state_dict()._metadata``, once: attributes are copied each time."""
        self._popped(1)
        if self._attributes:
            raise HeaderError("its pickle sets attributes more than once")
        _expect(self._stack[-1], ("dict",), "BUILD")
        self._attributes = True


def _expect(kind: str, allowed: tuple[str, ...], what: str) -> None:
    if kind not in allowed:
        raise HeaderError(f"its pickle holds more than tensors: {what} with {shown(kind)}")


def _known(name: str) -> str:
    """``name``, as the opcode has it ("module attribute"), where torch.save writes it."""
    module, _, attribute = name.partition(" ")
    if name == _DICT or name in _REBUILDS or name == "torch.storage UntypedStorage":
        return name
    if module == "torch" and (attribute.endswith("Storage") or attribute in _DTYPES):
        return name
    raise HeaderError(f"its pickle holds more than tensors: {shown(name)}")
