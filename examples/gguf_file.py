"""Reads a GGUF file, version 3, whose tensors are F32, Q4_1 or Q8_0, into PyTorch tensors.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the blocks of Q4_1 and Q8_0:
ggml's `ggml-common.h` and `dequantize_row_q4_1`, `dequantize_row_q8_0` in `ggml-quants.c`.
"""

# SPDX-License-Identifier: Apache-2.0
import math
import struct
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

VERSION = 3
DEEPEST = 8
"""The most arrays that are one inside the other; GGUF sets no limit."""
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
"""The number of a metadata value's type, and its `struct` format."""


@dataclass(frozen=True)
class GGUF:
    """Holds the values of a file's metadata by key, and its tensors, fp32 on the CPU, by name.

    A tensor's shape is in PyTorch's order, the last dimension contiguous: a weight is [out, in].
    """

    metadata: dict[str, Any]
    tensors: dict[str, torch.Tensor]


def q4_1(blocks: torch.Tensor) -> torch.Tensor:
    """Decode [N, 20] bytes to [N, 32] fp32: code * d + m of an fp16 d and m and 32 codes of 4 bits.

    The low half of byte j is element j, and its high half element j + 16.
    """
    d, m = blocks[:, :4].contiguous().view(torch.float16).float().split(1, 1)
    codes = torch.cat((blocks[:, 4:] & 15, blocks[:, 4:] >> 4), 1)
    return codes.float() * d + m


def q8_0(blocks: torch.Tensor) -> torch.Tensor:
    """Decode [N, 34] bytes to [N, 32] fp32: code * d of an fp16 d and 32 signed bytes."""
    d = blocks[:, :2].contiguous().view(torch.float16).float()
    return blocks[:, 2:].contiguous().view(torch.int8).float() * d


def f32(values: torch.Tensor) -> torch.Tensor:
    """Take [N, 4] bytes as [N, 1] fp32."""
    return values.view(torch.float32)


class Encoding(NamedTuple):
    """A type of tensors: how many elements are how many bytes, and what decodes these."""

    elements: int
    bytes: int
    decode: Callable[[torch.Tensor], torch.Tensor]


ENCODINGS = {
    0: Encoding(1, 4, f32),
    3: Encoding(32, 20, q4_1),
    8: Encoding(32, 34, q8_0),
}
"""By ggml's number of the type."""


def read(path: Path) -> GGUF:
    """Read a whole file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no GGUF file of this version, it ends early, a tensor has another type, or a
            name, a shape or a place that no GGUF file has.
    """
    content = _Content(path)
    if content.take(4) != b"GGUF":
        raise ValueError(f"{path} is no GGUF file: it does not begin with the bytes GGUF")
    if (version := content.scalar("I")) != VERSION:
        raise ValueError(f"{path} has version {version} of GGUF; it must be {VERSION}")
    count, keys = content.scalar("Q"), content.scalar("Q")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = content.new_name(metadata)
        metadata[key] = content.value(content.scalar("I"))
    named: dict[str, tuple[list[int], int, int]] = {}
    for _ in range(count):
        name = content.new_name(named)
        shape = [content.scalar("Q") for _ in range(content.scalar("I"))][::-1]
        named[name] = shape, content.scalar("I"), content.scalar("Q")
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise ValueError(
            f"{path} has general.alignment {alignment!r}; it must be an integer above 0"
        )
    start = -(-content.position // alignment) * alignment
    tensors = {}
    for name, (shape, number, offset) in named.items():
        if offset % alignment:
            raise ValueError(
                f"{path}: {name} begins at byte {offset} of the data, which must be a multiple of "
                f"general.alignment, {alignment}"
            )
        tensors[name] = content.tensor(name, shape, number, start + offset)
    return GGUF(metadata, tensors)


class _Content:
    """The bytes of a file and a position in them; the numbers are little-endian."""

    def __init__(self, path: Path) -> None:
        self.path, self.position = path, 0
        self._bytes = bytearray(path.read_bytes())  # torch wants memory that can be written

    def take(self, size: int) -> bytearray:
        end = self.position + size
        if end > len(self._bytes):
            raise ValueError(
                f"{self.path} ends early: it has {len(self._bytes)} bytes, and what begins at "
                f"byte {self.position} ends at {end}"
            )
        taken = self._bytes[self.position : end]
        self.position = end
        return taken

    def scalar(self, form: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def string(self) -> str:
        taken = self.take(self.scalar("Q"))
        try:
            return taken.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} has a string that is not UTF-8: {error}") from None

    def new_name(self, known: Container[str]) -> str:
        name = self.string()
        if name in known:
            raise ValueError(f"{self.path} has {name!r} twice")
        return name

    def value(self, number: int, depth: int = 0) -> Any:
        if number == _STRING:
            return self.string()
        if number == _ARRAY:
            if depth == DEEPEST:
                raise ValueError(f"{self.path} has more than {DEEPEST} arrays inside each other")
            each = self.scalar("I")
            return [self.value(each, depth + 1) for _ in range(self.scalar("Q"))]
        if number not in _SCALARS:
            raise ValueError(f"{self.path} has a metadata value of type {number}, which GGUF lacks")
        return self.scalar(_SCALARS[number])

    def tensor(self, name: str, shape: list[int], number: int, at: int) -> torch.Tensor:
        if number not in ENCODINGS:
            raise ValueError(
                f"{self.path}: {name} has ggml's type {number}; it must be one of {[*ENCODINGS]}"
            )
        if not shape or 0 in shape:
            raise ValueError(f"{self.path}: {name} has shape {shape}; every size must be above 0")
        encoding = ENCODINGS[number]
        if shape[-1] % encoding.elements:
            raise ValueError(
                f"{self.path}: {name} has rows of {shape[-1]} elements; of ggml's type {number} "
                f"they must be a multiple of {encoding.elements}"
            )
        self.position = at
        raw = self.take(math.prod(shape) // encoding.elements * encoding.bytes)
        blocks = torch.frombuffer(raw, dtype=torch.uint8).view(-1, encoding.bytes)
        return encoding.decode(blocks).reshape(shape)
