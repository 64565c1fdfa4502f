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

_MOST_OPCODES = 40 * MAX_TENSORS  # torch.save writes about 25 a tensor
_MOST_ITEMS = 64  # of a tuple; torch.save writes seven, or one a dimension
_MOST_ATTRIBUTES = 16  # settings of an object's attributes; torch.save writes one, _metadata
_NEWEST_PROTOCOL = 3
_MORE = "its pickle holds more than tensors"
HINT = "load it, if you trust it, and save it with safetensors: save_pretrained(DIR)"
_DICT = "collections OrderedDict"
_REBUILDS = {
    f"torch._utils {name}"
    for name in ("_rebuild_tensor_v2", "_rebuild_tensor_v3", "_rebuild_parameter")
}
_WITH_ATTRIBUTES = {
    "torch._utils _rebuild_parameter_with_state",
    "torch._tensor _rebuild_from_type_v2",
}
_DTYPES = {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_STORAGE = "torch.storage UntypedStorage"
_Kind = str | tuple[str, ...]
_PLAIN = {
    "BINUNICODE": "text",
    "BININT": "number",
    "BININT1": "number",
    "BININT2": "number",
    "LONG1": "large number",  # of a hash that can be chosen
    "BINFLOAT": "float",
    "NONE": "nothing",
    "NEWTRUE": "truth",
    "NEWFALSE": "truth",
    "EMPTY_TUPLE": "empty tuple",
    "EMPTY_DICT": "dict",
    "EMPTY_LIST": "list",
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def check(content: bytes) -> None:
    """Raises HeaderError, which says what it is, if ``content`` is no pickle or asks for
    anything but dicts, lists, numbers, text and tensors."""
    follower = _Follower()
    try:
        with warnings.catch_warnings():  # of escapes in names that are not known anyway
            warnings.simplefilter("ignore", DeprecationWarning)
            for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
                if count == _MOST_OPCODES:
                    raise HeaderError(f"its pickle has more than {_MOST_OPCODES:,} opcodes")
                follower.step(opcode.name, argument)
    except HeaderError:
        raise
    except (ValueError, IndexError, KeyError) as error:  # not a pickle, or its stack is empty
        raise HeaderError(f"a broken pickle: {shown(str(error))}") from error


class _Follower:
    """The unpickler's stack and memo, with the kind of each value in its place: of a tuple those
    of its items, a tuple in it being just that."""

    def __init__(self) -> None:
        self._stack: list[_Kind] = []
        self._marks: list[int] = []
        self._memo: dict[int, _Kind] = {}
        self._tensors = 0
        self._attributes = 0

    def step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name == "PROTO" and argument > _NEWEST_PROTOCOL:
            raise HeaderError(
                f"saved with pickle protocol {argument} (save it again with torch.save's default)"
            )
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
            self._storage()
        elif name == "REDUCE":
            self._reduce()
        elif name in ("SETITEM", "SETITEMS"):
            items = self._popped(2 if name == "SETITEM" else len(stack) - self._marks.pop())
            for key in items[::2]:
                _expect(key, ("text", "number"), "the key of a dict is")
            _expect(stack[-1], ("dict",), "entries of a dict in")
        elif name in ("APPEND", "APPENDS"):
            self._popped(1 if name == "APPEND" else len(stack) - self._marks.pop())
            _expect(stack[-1], ("list",), "entries of a list in")
        elif name == "BUILD":
            self._build()
        else:
            raise HeaderError(f"{_MORE}: opcode {name} ({HINT})")

    def _popped(self, count: int) -> list[_Kind]:
        if not 0 <= count <= len(self._stack):
            raise ValueError("its stack runs empty")
        taken = self._stack[len(self._stack) - count :]
        del self._stack[len(self._stack) - count :]
        return taken

    def _tuple(self, count: int) -> None:
        if count > _MOST_ITEMS:
            raise HeaderError(f"its pickle holds a tuple of {count} items")
        items = self._popped(count)
        kinds = tuple(item if isinstance(item, str) else "tuple" for item in items)
        self._stack.append(kinds or "empty tuple")

    def _storage(self) -> None:
        """("storage", type, key, location, size): torch prints and hashes what is in it."""
        match self._stack.pop():
            case ("text", kind, "text", "text", "number" | "large number") if _is_storage(kind):
                self._stack.append("storage")
            case other:
                raise HeaderError(f"{_MORE}: a persistent id of {shown(other)} ({HINT})")

    def _reduce(self) -> None:
        function, arguments = self._popped(2)
        if function == _DICT:  # of something, it would be a copy
            _expect(arguments, ("empty tuple",), "an OrderedDict of")
            self._stack.append("dict")
            return
        if function not in _REBUILDS:
            raise HeaderError(f"{_MORE}: a call of {shown(function)} ({HINT})")
        self._tensors += 1
        if self._tensors > MAX_TENSORS:
            raise HeaderError(f"its pickle holds more than {MAX_TENSORS:,} tensors")
        self._stack.append("tensor")

    def _build(self) -> None:
        """``state_dict()._metadata``: attributes are copied each time."""
        self._popped(1)
        self._attributes += 1
        if self._attributes > _MOST_ATTRIBUTES:
            raise HeaderError(f"{_MORE}: attributes are set {self._attributes} times ({HINT})")
        _expect(self._stack[-1], ("dict",), "attributes of")


def _expect(kind: _Kind, allowed: tuple[str, ...], what: str) -> None:
    if kind not in allowed:
        held = kind if isinstance(kind, str) else "a tuple"
        raise HeaderError(f"{_MORE}: {what} {shown(held)} ({HINT})")


def _is_storage(name: str) -> bool:
    return name == _STORAGE or (name.startswith("torch ") and name.endswith("Storage"))


def _known(name: str) -> str:
    """``name``, as the opcode has it ("module attribute"), if torch.save writes it."""
    module, _, attribute = name.partition(" ")
    if name == _DICT or name in _REBUILDS or _is_storage(name):
        return name
    if module == "torch" and attribute in _DTYPES:
        return name
    if name in _WITH_ATTRIBUTES:
        raise HeaderError(f"holds tensors with attributes of their own ({HINT})")
    raise HeaderError(f"{_MORE}: {shown(name)} ({HINT})")
