"""Plain data (numbers, text, arrays, tensors, lists, dictionaries) as safetensors and JSON.

What is read was perhaps written by an enemy. Every size is checked against the size of the file
before memory is taken for it, and nothing that a file names is looked up, imported or called.
"""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from uq.errors import LoadError, ParameterError
from uq.texts import visible

STATE_FORMAT = "uq-state-1"

# A file's tensors take as much memory as the file; these bound what its header takes besides.
MAX_HEADER_BYTES = 2**24
MAX_ENTRIES = 2**19
MAX_TENSORS = 2**16
MAX_DEPTH = 64
_MAX_TEXT_ARRAY_BYTES = 2**26
_MAX_EMPTY_SIDE = 10**6
_MAX_SPARSE_BYTES = 2**27

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}
_NOT_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}

# What decoding a file that was tampered with may raise.
BROKEN = (
    LookupError,
    TypeError,
    ValueError,
    RuntimeError,  # RecursionError among them
    AttributeError,
    ArithmeticError,
    MemoryError,
)


class PlainWriter:
    """Encodes data as JSON whose tensors are set aside."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def encode(self, value: Any, where: str) -> Any:
        """Return ``value`` as JSON; ``where`` names it in errors, and its tensors."""
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int):
            if not _is_int64(value):
                raise ParameterError(f"{where} cannot be saved: {value} has more than 64 bits.")
            return value
        if isinstance(value, str):
            if not _is_unicode(value):
                raise ParameterError(f"{where} cannot be saved: {value!r} is not valid Unicode.")
            return value
        if isinstance(value, float):
            return value if np.isfinite(value) else {"float": repr(value)}
        if isinstance(value, np.generic):
            return self.encode(value.item(), where)
        if isinstance(value, list | tuple):
            items = [self.encode(v, f"{where}[{i}]") for i, v in enumerate(value)]
            return {"tuple": items} if isinstance(value, tuple) else items
        if isinstance(value, dict):
            pairs = [
                [self.encode(k, where), self.encode(v, f"{where}.{k}")] for k, v in value.items()
            ]
            return {"dict": pairs}
        if isinstance(value, np.ndarray):
            if value.dtype.kind in "OSUT":
                items = [self.encode(v, where) for v in value.ravel().tolist()]
                text = "str" if value.dtype.kind in "SUT" else "object"
                return {"array": items, "shape": list(value.shape), "dtype": text}
            return {"numpy": self.store(torch.from_numpy(np.ascontiguousarray(value)), where)}
        if isinstance(value, Tensor):
            return {"tensor": self.store(value, where)}
        return self.encode_other(value, where)

    def encode_other(self, value: Any, where: str) -> Any:
        """Encode what is not plain data."""
        raise ParameterError(
            f"{where} cannot be saved: a {type(value).__name__} is not plain data."
        )

    def store(self, tensor: Tensor, where: str) -> str:
        """Set a tensor aside and return its name."""
        name, n = where.encode(errors="replace").decode(), 1
        while name in self.tensors:  # the keys 1 and "1" of a dictionary
            name, n = f"{where} ({n})", n + 1
        # clone: safetensors refuses tensors that share memory.
        self.tensors[name] = tensor.detach().cpu().contiguous().clone()
        return name

    def to_bytes(self, header: dict[str, Any]) -> bytes:
        """Return the content of the file."""
        text = json.dumps(header, allow_nan=False)
        data: bytes = to_bytes(self.tensors, {"uq": text})
        _check_header(data[8 : 8 + int.from_bytes(data[:8], "little")], ParameterError)
        return data


class PlainReader:
    """Rebuilds what a PlainWriter encoded."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = dict(tensors)

    def decode(self, node: Any, depth: int = 0) -> Any:
        """Return the value of a JSON node."""
        if depth > MAX_DEPTH:
            raise LoadError(f"it is nested more than {MAX_DEPTH} deep.")
        if node is None or isinstance(node, bool):
            return node
        if isinstance(node, float):
            if not math.isfinite(node):
                raise LoadError("it holds a number that is too large.")
            return node
        if isinstance(node, int):
            if not _is_int64(node):
                raise LoadError("it holds a number of more than 64 bits.")
            return node
        if isinstance(node, str):
            if not _is_unicode(node):
                raise LoadError("it holds text that is not valid Unicode.")
            return node
        if isinstance(node, list):
            return [self.decode(v, depth + 1) for v in node]
        if node.keys() == {"array", "shape", "dtype"}:
            return self._text_array(**node)
        if len(node) == 1:
            ((kind, value),) = node.items()
            if kind == "float":
                return _NOT_FINITE[value]
            if kind == "tuple":
                return tuple(self.decode(_listed(value), depth + 1))
            if kind == "dict":
                pairs = [(_key(k), self.decode(v, depth + 1)) for k, v in _listed(value)]
                if len(made := dict(pairs)) != len(pairs):
                    raise LoadError("a dictionary in it has a key twice.")
                return made
            if kind == "numpy":
                return self.take(value).numpy()
            if kind == "tensor":
                return self.take(value)
        return self.decode_other(node, depth)

    def decode_other(self, node: dict[str, Any], depth: int) -> Any:
        """Decode what is not plain data."""
        raise LoadError(f"it holds an unknown entry {_shortly(next(iter(node), None))}.")

    def take(self, name: Any) -> Tensor:
        """Return the tensor of that name; each has one place."""
        if not isinstance(name, str) or name not in self._tensors:
            raise LoadError(f"the tensor {_shortly(name)} is missing, or is named twice.")
        return self._tensors.pop(name)

    def finish(self) -> None:
        """Refuse tensors that nothing names."""
        if self._tensors:
            raise LoadError(f"nothing names the tensor {_shortly(min(self._tensors))}.")

    def _text_array(self, array: Any, shape: Any, dtype: Any) -> np.ndarray:
        values = [self.decode(v, MAX_DEPTH) for v in _listed(array)]
        if not all(v is None or isinstance(v, bool | int | float | str) for v in values):
            raise LoadError("an array of text in it holds something else.")
        if dtype not in ("str", "object"):
            raise LoadError(f"it holds an array of type {_shortly(dtype)}.")
        sides = _shape(shape)
        if math.prod(sides) != len(values):
            raise LoadError(f"an array of shape {sides} in it has {len(values)} values.")
        items = np.empty(len(values), dtype=object)
        items[:] = values
        if dtype == "object":
            return items.reshape(sides)
        if not all(isinstance(v, str) for v in values):
            raise LoadError("an array of text in it holds something else.")
        if 4 * len(values) * max(map(len, values), default=0) > _MAX_TEXT_ARRAY_BYTES:
            raise LoadError("an array of text in it is too large.")  # as long as its longest item
        return items.astype(str).reshape(sides)


def state_bytes(state: Any) -> bytes:
    """Encode plain data as the content of a file."""
    writer = PlainWriter()
    root = writer.encode(state, "state")
    return writer.to_bytes({"format": STATE_FORMAT, "state": root})


def read_state(path: str | Path) -> Any:
    """Decode what :func:`state_bytes` gave.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    LoadError
        If the file is damaged or is something else.
    """
    header, tensors = read_file(path, "checkpoint")
    if header.get("format") != STATE_FORMAT:
        raise LoadError(f"{str(path)!r} is not a checkpoint of uq.")
    try:
        reader = PlainReader(tensors)
        state = reader.decode(header["state"])
        reader.finish()
        return state
    except BROKEN as error:
        raise LoadError(
            f"{str(path)!r} does not hold a usable checkpoint: {one_line(error)}"
        ) from error


# -- files ---------------------------------------------------------------------------------------


def read_file(path: str | Path, what: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the JSON header and the tensors of a file.

    Parameters
    ----------
    path : str or Path
        File to read.
    what : str
        What the file should be, for errors.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    LoadError
        If it is not a regular file, or not one that this module wrote.
    """
    if not isinstance(path, str | os.PathLike):
        raise ParameterError(f"a {what} is read from a path, got {type(path).__name__}.")
    try:
        # A pipe would wait for a writer, for ever.
        with open(path, "rb", buffering=0, opener=_open_at_once) as file:
            _check_kind(os.fstat(file.fileno()))
            return _read(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {what} file at {str(path)!r}.") from None
    except OSError as error:
        raise LoadError(f"{str(path)!r} cannot be read: {error.strerror or error}.") from error
    except _Foreign as error:
        raise LoadError(
            f"{str(path)!r} is a safetensors file, but not a {what} saved by uq."
        ) from error
    except LoadError as error:
        raise LoadError(
            f"{str(path)!r} is not a uq {what}, or is damaged: {one_line(error)}"
        ) from error
    except BROKEN as error:
        raise LoadError(
            f"{str(path)!r} is not a uq {what}, or is damaged: {one_line(error)}"
        ) from error


def load_json(text: str | bytes) -> Any:
    """Parse strict JSON: no NaN or infinity, no key twice.

    Raises
    ------
    ValueError, RecursionError
        If the text is not strict JSON.
    """
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse)


def one_line(error: Exception) -> str:
    """Message of an error that may quote a file: without line breaks and terminal sequences."""
    return visible(" ".join(str(error).split())[:1000])


class _Foreign(Exception):
    """The file is in order, but another program's."""


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _check_kind(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise LoadError("it is a folder, pipe or device.")
    on_disk = 512 * getattr(status, "st_blocks", status.st_size)
    if status.st_size > _MAX_SPARSE_BYTES and on_disk < status.st_size / 2:
        raise LoadError("most of it is not on the disk: a hole that would be read as zeros.")


def _read(file: BinaryIO | Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(_exactly(file, 8) if size >= 8 else b"\xff" * 8, "little")
    if length > size - 8:
        raise LoadError("its header is not whole.")
    if length > MAX_HEADER_BYTES:
        raise LoadError(f"its header has more than {MAX_HEADER_BYTES} bytes.")
    raw = _exactly(file, length)
    _check_header(raw, LoadError)
    entries = load_json(raw)
    del raw
    if not isinstance(entries, dict):
        raise LoadError("its header is not a table.")
    metadata = entries.pop("__metadata__", None)
    places = _places(entries, size - 8 - length)
    text = metadata.get("uq") if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise _Foreign
    header = load_json(text)
    if not isinstance(header, dict):
        raise _Foreign
    return header, {name: _tensor(file, dtype, shape) for name, dtype, shape in places}


def _check_header(raw: bytes, error: type[Exception]) -> None:
    if len(raw) > MAX_HEADER_BYTES:
        raise error(
            f"a file's header has at most {MAX_HEADER_BYTES} bytes; this one needs {len(raw)}."
        )
    if sum(map(raw.count, (b",", b"[", b"{"))) > MAX_ENTRIES:
        raise error(f"a file's header has at most {MAX_ENTRIES} entries; this one has more.")


def _places(
    entries: dict[str, Any], n_bytes: int
) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Names, types and shapes of the tensors in the order of the file, which they fill."""
    if len(entries) > MAX_TENSORS:
        raise LoadError(f"it holds more than {MAX_TENSORS} tensors.")
    found = []
    for name, entry in entries.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise LoadError(f"the tensor {_shortly(name)} is not described as it should be.")
        if entry["dtype"] not in _DTYPES:
            raise LoadError(f"the tensor {_shortly(name)} has the type {_shortly(entry['dtype'])}.")
        dtype, shape = _DTYPES[entry["dtype"]], _shape(entry["shape"])
        start, end = _listed(entry["data_offsets"])
        if not all(isinstance(at, int) and not isinstance(at, bool) for at in (start, end)):
            raise LoadError(f"the tensor {_shortly(name)} has no place in the file.")
        if end - start != math.prod(shape) * dtype.itemsize:
            raise LoadError(f"the tensor {_shortly(name)} does not have the size of its shape.")
        found.append((start, end, name, dtype, shape))
    found.sort(key=lambda place: place[:3])
    at = 0
    for start, end, name, _, _ in found:
        if start != at:
            raise LoadError(f"the tensor {_shortly(name)} does not follow the one before.")
        at = end
    if at != n_bytes:
        raise LoadError(f"its tensors take {at} bytes, but it has {n_bytes}.")
    return [place[2:] for place in found]


def _tensor(file: BinaryIO, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    # Memory of torch's own: products of values that are aligned otherwise round differently.
    tensor = torch.empty(shape, dtype=dtype, device="cpu")
    if tensor.numel():
        raw = tensor.view(-1).view(torch.uint8)
        view = memoryview(raw.numpy())  # type: ignore[arg-type]
        while len(view):
            n_read = file.readinto(view)  # type: ignore[attr-defined]
            if not n_read:
                raise LoadError("it ends too early.")
            view = view[n_read:]
        if dtype == torch.bool and bool((raw > 1).any()):
            raise LoadError("a truth value in it is neither true nor false.")
    return tensor


def _exactly(file: BinaryIO, n: int) -> bytes:
    parts = []
    while n:
        part = file.read(n)
        if not part:
            raise LoadError("it ends too early.")
        parts.append(part)
        n -= len(part)
    return b"".join(parts)


def _shape(value: Any) -> tuple[int, ...]:
    sides = tuple(_listed(value))
    if len(sides) > 32 or not all(
        isinstance(side, int) and not isinstance(side, bool) and side >= 0 for side in sides
    ):
        raise LoadError(f"{_shortly(value)} is not a shape.")
    if 0 in sides and math.prod(side for side in sides if side) > _MAX_EMPTY_SIDE:
        raise LoadError(f"the shape {_shortly(value)} is too large.")
    return sides


def _listed(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise LoadError(f"{_shortly(value)} is not a list.")
    return value


def _key(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str) and _is_unicode(value):
        return value
    raise LoadError(f"{_shortly(value)} is not a key of a dictionary.")


def _is_int64(value: int) -> bool:
    return -(2**63) <= value < 2**64


def _is_unicode(text: str) -> bool:
    """Whether the text has no lone surrogate, which could neither be shown nor written."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key is there twice")
    return made


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _shortly(value: Any) -> str:
    """``repr`` that is short and plain, whatever a file holds."""
    text = ascii(value[:40] if isinstance(value, str | list) else value)
    return text if len(text) <= 80 else text[:77] + "..."
