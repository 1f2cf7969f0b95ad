"""Answers of the unchanged code, kept, and the first answer of changed code that is another."""

# SPDX-License-Identifier: Apache-2.0
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch

Answers = Iterator[tuple[str, Any]]
Asked = Callable[[], Answers]
"""Answers one after the other, each with what was asked."""


class Kept:
    """The answers of a question when this was made, which later ones must equal to the bit."""

    def __init__(self, asked: Asked):
        self.asked = asked
        self.right = [(label, digest(value)) for label, value in asked()]

    def __call__(self) -> Iterator[str]:
        count = 0
        for (label, value), (_, right) in zip(self.asked(), self.right, strict=False):
            count += 1
            if digest(value) != right:
                yield label
        if count != len(self.right):
            yield f"{len(self.right) - count} answers fewer"


def raised(call: Callable[[], Any]) -> Any:
    """Return the result of a call, or the words with which it refuses its arguments."""
    try:
        return call()
    except (TypeError, ValueError) as error:
        return str(error)


def digest(value: Any) -> bytes:
    """Digest every bit of tensors, also within containers, except the bits of a NaN."""
    state = hashlib.blake2b(digest_size=16)
    _feed(state, value)
    return state.digest()


def _feed(state: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        t = value.detach().cpu().contiguous()
        state.update(f"{t.dtype} {tuple(t.shape)}".encode())
        if t.dtype != torch.float8_e4m3fn and t.is_floating_point():  # a NaN is any NaN
            t = t.masked_fill(t.isnan(), torch.nan)
        state.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif is_dataclass(value) and not isinstance(value, type):
        for f in fields(value):
            _feed(state, getattr(value, f.name))
    elif isinstance(value, dict):
        for key in value:
            state.update(str(key).encode())
            _feed(state, value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            _feed(state, item)
    else:
        state.update(repr(value).encode())
