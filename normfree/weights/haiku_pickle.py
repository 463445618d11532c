"""An interpreter for pickles of arrays in mappings, restricted to the instructions that such a pickle needs.

Names in the file select one of eight rules for rebuilding arrays. Nothing is imported, called or evaluated, and no
array is allocated before the whole file has been interpreted. tests/weights/test_haiku_hostile.py has the attacks that
are tested.
"""

from __future__ import annotations

import math
import pickletools
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

# Allowed array types: floats and integers; no objects, records, text or dates.
DTYPES = frozenset(("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"))
# Our limits, all far above NFNet-F6 (598 modules, 1,457 arrays, about 49,000 instructions).
MAX_ARRAYS, MAX_INSTRUCTIONS, MAX_DIMENSIONS = 100_000, 500_000, 8
# Bytes by which the arrays may exceed the file; those of a valid file never do.
SLACK = 1 << 20

# Which naming the names belong to is checked in `names`.
MODULE = re.compile(r"(?=.{1,200}$)\w+(/(~|\w+))*", re.ASCII)
NAME = re.compile(r"\w{1,64}", re.ASCII)


class HaikuFileError(Exception):
    """A file cannot be read. The message is the reason; `read_haiku` makes it part of a one-line ValueError."""


def check_names(module: object, name: object) -> None:
    """Raise HaikuFileError unless both are strings that can name a module and a parameter."""
    for pattern, value in ((MODULE, module), (NAME, name)):
        if not isinstance(value, str) or not pattern.fullmatch(value):
            title = value[:60] if isinstance(value, str) else type(value).__name__
            raise HaikuFileError(f"it has an entry called {title!a}")


def checked_shape(shape: object, itemsize: int, size: int) -> tuple[int, ...]:
    """Return `shape` if it is a valid shape whose array fits into `size` bytes, else raise HaikuFileError."""
    if (
        not isinstance(shape, tuple)
        or len(shape) > MAX_DIMENSIONS
        or not all(type(n) is int and n > 0 for n in shape)
    ):
        raise HaikuFileError("it has an array without a valid shape")
    if max(shape, default=1) > size or math.prod(shape) * itemsize > size:
        raise HaikuFileError("it announces an array larger than the file")
    return shape


@dataclass(frozen=True, slots=True)
class _Global:
    """A name in the file for which there is a rule; `rule` selects it in `PickledArrays._call`."""

    rule: str


@dataclass(frozen=True, slots=True)
class _Span:
    """A range of bytes of the file; with `coding`, text that is not decoded yet because it is long."""

    start: int
    stop: int
    coding: str = ""


@dataclass(slots=True)
class _Dtype:
    code: str
    order: str = ""


@dataclass(slots=True)
class _Array:
    """The description of an array, which is allocated after the whole file has been interpreted."""

    shape: tuple[int, ...] = ()
    dtype: _Dtype | None = None
    order: str = "C"
    raw: _Span | bytes = b""
    axes: tuple[int, ...] | None = None


class _Mark:
    """The start of a tuple or a group of items on the stack."""


_MARK = _Mark()


def _globals() -> dict[tuple[str, str], _Global]:
    """Return the rules by module and name, in the spellings of all versions of the libraries that wrote such files."""
    # numpy's module is `core` up to 1.26 and `_core` since 2.0; dill's was dill.dill before 0.3.2. A JAX array is
    # pickled as a numpy array with a note on its type. Haiku has FlatMapping since 2021, before frozendict and FlatMap.
    cores = ("numpy.core", "numpy._core")
    rules: dict[tuple[str, str], str] = {(f"{c}.multiarray", "_reconstruct"): "reconstruct" for c in cores}
    rules |= {(f"{c}.multiarray", "scalar"): "scalar" for c in cores}
    rules |= {(f"{c}.numeric", "_frombuffer"): "frombuffer" for c in cores}
    rules |= {("numpy", "ndarray"): "ndarray", ("numpy", "dtype"): "dtype", ("_codecs", "encode"): "encode"}
    rules |= {(m, "_create_array"): "rebuild" for m in ("dill._dill", "dill.dill")}
    rules |= {("jax._src.array", "_reconstruct_array"): "rebuild"}
    rules |= {("jax._src.device_array", "reconstruct_device_array"): "rebuild"}
    rules |= {("collections", "OrderedDict"): "mapping"}
    for module in ("haiku._src.data_structures", "haiku.data_structures"):
        rules |= {(module, name): "mapping" for name in ("FlatMapping", "FlatMap", "frozendict")}
    return {name: _Global(rule) for name, rule in rules.items()}


GLOBALS = _globals()

_CONSTANTS: dict[int, Any] = {ord("N"): None, 0x88: True, 0x89: False}
_NUMBERS = {ord("K"): "<B", ord("M"): "<H", ord("J"): "<i"}
_COUNTED = {
    ord("X"): ("<I", "utf-8"), 0x8C: ("<B", "utf-8"), 0x8D: ("<Q", "utf-8"),
    ord("B"): ("<I", ""), ord("C"): ("<B", ""), 0x8E: ("<Q", ""), 0x96: ("<Q", ""),
}  # fmt: skip
_PUT = {ord("q"): "<B", ord("r"): "<I"}
_GET = {ord("h"): "<B", ord("j"): "<I"}
_TUPLES = {ord(")"): 0, 0x85: 1, 0x86: 2, 0x87: 3}
_INSTRUCTIONS = {ord(op.code): op.name for op in pickletools.opcodes}
# Characters from which on text is not decoded at once. Names are shorter; arrays in protocols 0 to 2 are longer text.
_LONG_TEXT = 256


class PickledArrays:
    """The arrays of one pickle of protocol 0 to 5.

    `tree()` interprets it and returns `{module: {name: array}}`, or raises HaikuFileError.
    """

    def __init__(self, data: bytes) -> None:
        self.data, self.view, self.at = data, memoryview(data), 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.steps: dict[int, Callable[[], None]] = {
            ord("("): lambda: self.stack.append(_MARK), ord("}"): lambda: self.stack.append({}),
            ord("d"): self._dict, ord("t"): lambda: self.stack.append(tuple(self._to_mark())),
            ord("s"): self._set_item, ord("u"): self._set_items, ord("R"): self._reduce, ord("b"): self._build,
            ord("c"): lambda: self._global(self._line(), self._line()), 0x93: self._stack_global,
            ord("I"): self._int_line, ord("V"): self._unicode_line,
            ord("p"): lambda: self._put(self._digits(self._line())),
            ord("g"): lambda: self._get(self._digits(self._line())), 0x94: lambda: self._put(len(self.memo)),
        }  # fmt: skip

    def tree(self) -> dict[str, dict[str, np.ndarray]]:
        modules = self._run()
        if not isinstance(modules, dict) or not modules:
            raise HaikuFileError("it has no mapping of modules" if self.data else "it is empty")
        tree: dict[str, dict[str, np.ndarray]] = {}
        count = used = 0
        for module, arrays in modules.items():
            if not isinstance(arrays, dict):
                raise HaikuFileError("it has a module that is not a mapping")
            if not arrays:
                raise HaikuFileError("it has a module without arrays")
            for name, token in arrays.items():
                check_names(module, name)
                if not isinstance(token, _Array) or token.dtype is None:
                    raise HaikuFileError(f"it has no array at {module}, {name}")
                count, used = count + 1, used + math.prod(token.shape) * int(token.dtype.code[1])
                if count > MAX_ARRAYS or used > len(self.data) + SLACK:
                    raise HaikuFileError("its arrays are larger than the file")
                tree.setdefault(module, {})[name] = self._make(token, token.dtype)
        return tree

    def _run(self) -> Any:
        for _ in range(MAX_INSTRUCTIONS):
            op = self._take(1)[0]
            if op == ord("."):
                break
            self._step(op)
        else:
            raise HaikuFileError(f"it has more than {MAX_INSTRUCTIONS:,} instructions")
        if self.at != len(self.data) or len(self.stack) != 1:
            raise HaikuFileError("it continues after its end, or leaves objects on the stack")
        return self.stack.pop()

    def _step(self, op: int) -> None:
        if op in self.steps:
            self.steps[op]()
        elif op in _COUNTED:
            form, coding = _COUNTED[op]
            self._span(self._number(form), coding)
        elif op in _TUPLES:
            self.stack.append(tuple([self._pop() for _ in range(_TUPLES[op])][::-1]))
        elif op in _GET:
            self._get(self._number(_GET[op]))
        elif op in _PUT:
            self._put(self._number(_PUT[op]))
        elif op in _NUMBERS:
            self.stack.append(self._number(_NUMBERS[op]))
        elif op in _CONSTANTS:
            self.stack.append(_CONSTANTS[op])
        elif op == 0x80:  # protocol
            if self._take(1)[0] > 5:
                raise HaikuFileError("its pickle protocol is above 5")
        elif op == 0x95:  # frame: a hint for reading, which a file in memory does not need
            self._number("<Q")
        else:
            name = _INSTRUCTIONS.get(op)
            raise HaikuFileError(f"it uses the pickle instruction {name}" if name else "it is not a pickle")

    # reading

    def _take(self, count: int) -> memoryview:
        if count > len(self.data) - self.at:
            raise HaikuFileError("it ends early" if self.data else "it is empty")
        self.at += count
        return self.view[self.at - count : self.at]

    def _number(self, form: str) -> int:
        return int(struct.unpack(form, self._take(struct.calcsize(form)))[0])

    def _line(self, limit: int = 200) -> str:
        end = self.data.find(b"\n", self.at, self.at + limit)
        if end < 0:
            raise HaikuFileError("it is not a pickle" if not self.memo else "it ends early")
        line, self.at = self.data[self.at : end], end + 1
        return line.decode("latin-1")

    def _digits(self, text: str) -> int:
        if not re.fullmatch(r"-?[0-9]{1,18}", text):
            raise HaikuFileError("it is not a pickle")
        return int(text)

    def _int_line(self) -> None:
        line = self._line()
        self.stack.append({"00": False, "01": True}[line] if line in ("00", "01") else self._digits(line))

    def _unicode_line(self) -> None:
        end = self.data.find(b"\n", self.at)
        if end < 0:
            raise HaikuFileError("it ends early")
        self._span(end - self.at, "raw-unicode-escape")
        self.at = end + 1

    def _span(self, length: int, coding: str) -> None:
        span = _Span(self.at, self.at + length, coding)
        self._take(length)
        self.stack.append(self._decode(span) if coding and length <= _LONG_TEXT else span)

    def _decode(self, span: _Span) -> str:
        try:
            return str(self.view[span.start : span.stop], span.coding)
        except UnicodeError:
            raise HaikuFileError("it has text that cannot be decoded") from None

    # stack and memo

    def _pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise HaikuFileError("it is not a pickle")
        return self.stack.pop()

    def _to_mark(self) -> list[Any]:
        items: list[Any] = []
        while self.stack and self.stack[-1] is not _MARK:
            items.append(self.stack.pop())
        if not self.stack:
            raise HaikuFileError("it is not a pickle")
        self.stack.pop()
        return items[::-1]

    def _put(self, index: int) -> None:
        self.memo[index] = self._pop()
        self.stack.append(self.memo[index])

    def _get(self, index: int) -> None:
        if index not in self.memo:
            raise HaikuFileError("it is not a pickle")
        self.stack.append(self.memo[index])

    def _fill(self, items: list[Any]) -> dict[str, Any]:
        target = self._pop()
        if not isinstance(target, dict) or len(items) % 2:
            raise HaikuFileError("it is not a pickle")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str or key in target:  # hashing nested tuples can take forever
                raise HaikuFileError("it has a mapping with a key that is not text or is a duplicate")
            target[key] = value
        return target

    def _dict(self) -> None:
        items = self._to_mark()
        self.stack.append({})
        self.stack.append(self._fill(items))

    def _set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self.stack.append(self._fill([key, value]))

    def _set_items(self) -> None:
        items = self._to_mark()
        self.stack.append(self._fill(items))

    # building

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        if type(name) is not str or type(module) is not str:
            raise HaikuFileError("it is not a pickle")
        self._global(module, name)

    def _global(self, module: str, name: str) -> None:
        if (module, name) not in GLOBALS:
            raise HaikuFileError(f"it asks for {f'{module[:60]}.{name[:60]}'!a}")
        self.stack.append(GLOBALS[module, name])

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise HaikuFileError("it calls something that does not build arrays")
        self.stack.append(self._call(function.rule, arguments))

    def _call(self, rule: str, arguments: tuple[Any, ...]) -> Any:
        match rule, arguments:
            case "mapping", ():
                return {}
            case "mapping", (dict() as items,):
                return items
            case "dtype", (str() as code, 0 | 1, 0 | 1) if code in DTYPES:
                return _Dtype(code)
            case "reconstruct", (_Global("ndarray"), (0,), bytes() | str() | _Span()):
                return _Array()
            case "rebuild", (_Global("reconstruct"), tuple() as inner, state, None | dict()):
                return self._fill_array(self._call("reconstruct", inner), state)
            case "scalar", (_Dtype() as dtype, raw):
                return self._fill_array(_Array(), (1, (), dtype, False, raw))
            case "frombuffer", (raw, _Dtype() as dtype, shape, "C" | "F" as order):
                return self._fill_array(_Array(), (1, shape, dtype, order == "F", raw))
            case "frombuffer", (raw, _Dtype() as dtype, tuple() as shape, "K", tuple() as axes):
                if not all(type(a) is int for a in axes) or sorted(axes) != list(range(len(shape))):
                    raise HaikuFileError("it has an array without a valid shape")
                array = self._fill_array(_Array(), (1, shape, dtype, False, raw))
                array.axes = axes
                return array
            case "encode", (str() as text, "latin1" | "latin-1"):
                return self._latin(text)
            case "encode", (_Span(_, _, coding) as span, "latin1" | "latin-1") if coding:
                return span  # decoded when its array is allocated
        raise HaikuFileError(f"it calls the rule {rule!r} with wrong arguments")

    def _build(self) -> None:
        state, target = self._pop(), self._pop()
        match target, state:
            case _Array(), _:
                self._fill_array(target, state)
            case _Dtype(order=""), (3, "<" | ">" | "|" | "=" as order, None, None, None, -1, -1, 0):
                target.order = order
            case _:
                raise HaikuFileError("it sets the state of an object that is not an array of numbers")
        self.stack.append(target)

    def _fill_array(self, array: _Array, state: object) -> _Array:
        match state:
            case (1, shape, _Dtype() as dtype, 0 | 1 as fortran, bytes() | _Span() as raw) if (
                array.dtype is None
            ):
                array.shape = checked_shape(shape, int(dtype.code[1]), len(self.data))
                array.dtype, array.order, array.raw = dtype, "F" if fortran else "C", raw
                return array
        raise HaikuFileError("it has an array that does not contain numbers")

    def _latin(self, text: str) -> bytes:
        try:
            return text.encode("latin-1")
        except UnicodeError:
            raise HaikuFileError("it has an array that does not contain numbers") from None

    def _make(self, token: _Array, dtype: _Dtype) -> np.ndarray:
        raw: bytes | memoryview
        if isinstance(token.raw, bytes):
            raw = token.raw
        elif token.raw.coding:
            raw = self._latin(self._decode(token.raw))
        else:
            raw = self.view[token.raw.start : token.raw.stop]
        if len(raw) != math.prod(token.shape) * int(dtype.code[1]):
            raise HaikuFileError(f"it has an array of shape {token.shape} with {len(raw)} bytes")
        order = dtype.order.replace("|", "") + dtype.code
        flat = np.frombuffer(raw, np.dtype(order))
        array = flat.reshape(token.shape, order="F" if token.order == "F" else "C")
        return np.array(
            array.transpose(token.axes) if token.axes is not None else array, dtype.code, order="C"
        )
