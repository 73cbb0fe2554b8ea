"""Pickles as data: what a pickle asks to be called is written down, and never called.

Python's unpickler is not used at all. `pickletools` cuts the file into opcodes, and the machine below obeys those that
checkpoints are made of, on plain lists and dictionaries. It imports no name, calls nothing, looks up no extension
code and takes no buffer from outside; its memory grows with the file (a five-byte "put" at place 2^32 reserves nothing
here, and keys are strings and numbers, so that no hash runs through nested data).
"""

from __future__ import annotations

import pickletools
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

from relay_diffusion.errors import UserError

MAX_OPCODES = 5_000_000  # a published checkpoint has fewer than a million
MAX_PROTOCOL = 5
_KEYS = (str, int, float, bytes, type(None))  # and bool, an int

# opcodes that push their argument, or a constant
_NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT")
_TEXTS = ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_CONTAINERS = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_SMALL_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True, slots=True)
class Global:
    """A name in a module, as text; nothing is imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return ascii(f"{self.module}.{self.name}")[1:-1][:100]  # one line, whatever the file holds


@dataclass(eq=False, slots=True)
class Record:
    """A call that was not made: of `function` with `arguments`, then `state` set, then `items` stored."""

    function: Global
    arguments: tuple[Any, ...]
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class Reference:
    """A persistent id: data that lies outside of the pickle."""

    id: Any


class Pickle(NamedTuple):
    """The content of one pickle, and all records in it."""

    value: Any
    records: list[Record]


class _Machine:
    """The stack, the marks and the memo of one pickle."""

    def __init__(self, allowed: Collection[Global], name: str) -> None:
        self.allowed, self.name = allowed, name
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.records: list[Record] = []

    def step(self, opcode: str, argument: Any) -> None:
        """Obey one opcode. Raises UserError for a global that is not allowed, ValueError and the like for damage."""
        stack = self.stack
        if opcode in _NUMBERS or opcode in _TEXTS:
            stack.append(argument)
        elif opcode in _CONSTANTS:
            stack.append(_CONSTANTS[opcode])
        elif opcode in _CONTAINERS:
            stack.append(_CONTAINERS[opcode]())
        elif opcode in _SMALL_TUPLES:
            count = _SMALL_TUPLES[opcode]
            if len(stack) < count:
                raise ValueError("a tuple lacks items")
            stack[-count:] = [tuple(stack[-count:])]
        elif opcode in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif opcode in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif opcode in ("PROTO", "FRAME"):
            if opcode == "PROTO" and argument > MAX_PROTOCOL:
                raise ValueError(f"protocol {argument} is unknown")
        else:
            handler = getattr(self, f"_{opcode.lower()}", None)  # opcode names come from pickletools, not the file
            if handler is None:
                raise ValueError(f"its opcode {opcode} has no use in a checkpoint")
            handler(argument)

    def _global(self, argument: str) -> None:
        self._push_global(*argument.split(" ", 1))

    def _stack_global(self, _: None) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not (isinstance(module, str) and isinstance(name, str)):
            raise ValueError("the name of a global is no text")
        self._push_global(module, name)

    def _inst(self, argument: str) -> None:
        self._push_global(*argument.split(" ", 1))  # refused by name, if it is no known one
        raise ValueError("its opcode INST has no use in a checkpoint")

    def _push_global(self, module: str, name: str) -> None:
        wanted = Global(module, name)
        if wanted not in self.allowed:
            raise UserError(
                f"{self.name} names {wanted}, which a checkpoint has no use for: refused; nothing in it was run"
            )
        self.stack.append(wanted)

    def _reduce(self, _: None) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not (isinstance(function, Global) and isinstance(arguments, tuple)):
            raise ValueError("a call of something that is no global")
        self.records.append(Record(function, arguments))
        self.stack.append(self.records[-1])

    _newobj = _reduce

    def _build(self, _: None) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], Record):
            raise ValueError("a state of something that has none")
        self.stack[-1].state = state

    def _binpersid(self, _: None) -> None:
        self.stack.append(Reference(self.stack.pop()))

    def _memoize(self, _: None) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _mark(self, _: None) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def _since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def _pop(self, _: None) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self._since_mark()

    def _pop_mark(self, _: None) -> None:
        self._since_mark()

    def _tuple(self, _: None) -> None:
        items = self._since_mark()
        self.stack.append(tuple(items))

    def _append(self, _: None) -> None:
        self._extend([self.stack.pop()])

    def _appends(self, _: None) -> None:
        self._extend(self._since_mark())

    def _extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError("items of something that is no list")
        self.stack[-1].extend(items)

    def _additems(self, _: None) -> None:
        items = self._since_mark()
        if not isinstance(self.stack[-1], set) or not all(isinstance(item, _KEYS) for item in items):
            raise ValueError("a set of something other than text and numbers")
        self.stack[-1].update(items)

    def _setitem(self, _: None) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def _setitems(self, _: None) -> None:
        self._set(self._since_mark())

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        entries = target.items if isinstance(target, Record) else target
        if not isinstance(entries, dict) or len(items) % 2:
            raise ValueError("entries of something that is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, _KEYS):
                raise ValueError("a key other than text or a number")
            entries[key] = value


def read_records(file: IO[bytes], allowed: Collection[Global], name: str) -> Pickle:
    """The next pickle of a file, as plain values, Records and References; the file stands behind it afterwards.

    `allowed`: the globals that it may name. Raises UserError that names the file (`name`) and any other global, and
    for a file that is damaged.
    """
    machine = _Machine(allowed, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickletools, on odd escapes in a damaged file
            for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
                if count >= MAX_OPCODES:
                    raise ValueError("it is larger than any checkpoint")
                if opcode.name == "STOP":
                    break
                machine.step(opcode.name, argument)
        return Pickle(machine.stack.pop(), machine.records)
    except UserError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:
        detail = ascii(str(error))[1:-1][:120]
        raise UserError(f"{name} is damaged or no checkpoint: its pickle cannot be read ({detail})") from None
