"""Reads a safetensors file tensor by tensor, into memory. Knows no tensor names.

The file is never mapped: if somebody cuts a mapped file short, the process is killed."""

import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch

from loraplex.disk import CHANGED, WRITE_ELSEWHERE, Stamp, refuse_pointer, stamp_of
from loraplex.errors import ConfigurationError, quoted

MAX_HEADER_BYTES = 100_000_000  # as safetensors
MAX_DIMENSIONS = 64
OWN_PAGES_BYTES = 2**20
TYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
# First bytes of what may stand in the place of a safetensors file.
OTHER_FILES = {b"PK": "a zip archive, as torch.save writes it", b"\x80": "a pickle", b"<": "a page of HTML or XML"}
# Types of safetensors whose tensors cannot be read here. They may stand beside others that can.
OTHER_TYPES = {"F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}


class Entry(NamedTuple):
    """A tensor as the header describes it. begin, end: bytes, from the header's end."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorFile:
    """A safetensors file as it was when it was found. Any thread may read.

    entries:  what the header says of each tensor.
    The constructor and `read` raise `error` where the file is not a whole safetensors file, or has changed since."""

    def __init__(
        self, path: Path, error: type[ConfigurationError], *, max_header_bytes: int = MAX_HEADER_BYTES
    ) -> None:
        self._path, self._error = path, error
        self.entries: Mapping[str, Entry] = {}
        self._stamp: Stamp | None = None
        with self._open() as file:
            self.entries, self._start = self._read_header(file, max_header_bytes)

    def read(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Return the tensors of these names, each in memory of its own."""
        with self._open() as file:
            return {name: self._read_tensor(file, name) for name in names}

    @contextmanager
    def _open(self) -> Iterator[FileIO]:
        """Open the file. Raises `error` where it is not the file that was found, or changes before it is closed."""
        try:
            with self._path.open("rb", buffering=0) as file:
                self._stamp = self._stamp or stamp_of(os.fstat(file.fileno()))
                self._check_same(file)
                yield file
                self._check_same(file)
        except OSError as exc:
            raise self._unreadable(exc) from None

    def _check_same(self, file: FileIO) -> None:
        if stamp_of(os.fstat(file.fileno())) != self._stamp:
            raise self._error(self._path, CHANGED, remedy=WRITE_ELSEWHERE)

    def _read_tensor(self, file: FileIO, name: str) -> torch.Tensor:
        entry = self.entries[name]
        if entry.dtype not in TYPES:
            raise self._unreadable(f"tensor {quoted(name)} has the type {entry.dtype!r}")
        tensor = _empty(entry.shape, TYPES[entry.dtype], entry.end - entry.begin)
        file.seek(self._start + entry.begin)
        self._fill(file, tensor.reshape(-1).view(torch.uint8).numpy().data)
        return tensor

    def _read_header(self, file: FileIO, max_header_bytes: int) -> tuple[dict[str, Entry], int]:
        assert self._stamp is not None, "the file is open"
        size = self._stamp.size
        start = bytearray(min(size, 64))
        self._fill(file, memoryview(start))
        refuse_pointer(self._path, bytes(start), self._error)
        num_bytes = int.from_bytes(start[:8], "little")
        if size < 8 or num_bytes > min(max_header_bytes, size - 8):
            claimed = f"it claims a header of {num_bytes} bytes, and " if size >= 8 else ""
            other = next((f"it is {what}" for first, what in OTHER_FILES.items() if start.startswith(first)), None)
            raise self._unreadable(other or f"{claimed}the file has {size} bytes")
        text = bytearray(num_bytes)
        file.seek(8)
        self._fill(file, memoryview(text))
        try:
            header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
        except (ValueError, RecursionError) as exc:
            raise self._unreadable(f"its header is not JSON: {exc}") from None
        if not isinstance(header, dict) or not text.startswith(b"{"):
            raise self._unreadable("its header is not an object")
        header.pop("__metadata__", None)
        entries = {name: self._entry(name, one) for name, one in header.items()}
        end = 0
        for name, entry in sorted(entries.items(), key=lambda named: named[1][2:]):
            if entry.begin != end:
                raise self._unreadable(f"the bytes of tensor {quoted(name)} do not follow the tensor before it")
            end = entry.end
        if size != 8 + num_bytes + end:
            raise self._unreadable(
                f"its header describes {8 + num_bytes + end} bytes, and the file has {size}; "
                "it was cut short, or is still being written"
            )
        return entries, 8 + num_bytes

    def _entry(self, name: str, given: Any) -> Entry:
        match given:
            case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]} if (
                all(type(number) is int and number >= 0 for number in (*shape, begin, end))
                and begin <= end
                and len(shape) <= MAX_DIMENSIONS
            ):
                known = TYPES.get(dtype)
                is_right = dtype in OTHER_TYPES if known is None else math.prod(shape) * known.itemsize == end - begin
                if is_right:
                    return Entry(dtype, tuple(shape), begin, end)
        raise self._unreadable(f"its header describes tensor {quoted(name)} wrongly")

    def _fill(self, file: FileIO, view: memoryview) -> None:
        while view:
            num_bytes = file.readinto(view)
            if not num_bytes:
                raise self._error(self._path, f"{CHANGED}: it became shorter", remedy=WRITE_ELSEWHERE)
            view = view[num_bytes:]

    def _unreadable(self, reason: object) -> ConfigurationError:
        return self._error(
            self._path,
            f"not readable as safetensors: {reason}",
            remedy="save or copy the file again, to a new folder, and load the folder when the copy is complete",
        )


def _empty(shape: tuple[int, ...], dtype: torch.dtype, num_bytes: int) -> torch.Tensor:
    """Return a tensor with any content. A large one has pages of its own, which the machine has back as soon as the
    tensor is freed; malloc would keep some of them. A small one has none, because a process has 65,530 maps at most."""
    if num_bytes >= OWN_PAGES_BYTES:
        with suppress(OSError):  # too many maps
            memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            return torch.frombuffer(memory, dtype=dtype).reshape(shape)
    return torch.empty(shape, dtype=dtype)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("it names something twice")
    return made
