"""A checksum of experts, by which two processes can prove that they hold the same bits.

A tensor's bytes are read as little-endian words of 64 bits, w[0], w[1], ..., the last one filled with
zeros. For each of two seeds s:

    digest_s = sum over i of mix(w[i] xor mix(i + s))    modulo 2^64

with the finalizer of splitmix64 as mix (Steele, Lea, Flood, "Fast splittable pseudorandom number
generators", 2014). The sum has no order, so that every device gives the same digests at the speed of its
memory. SHA-256 then runs over names, dtypes, shapes, digests and the sizes, after the version of
FlashInfer and the functions of the routing where those are not the defaults. It finds accidents, not
forgeries.
"""

# SPDX-License-Identifier: Apache-2.0
import hashlib
from collections.abc import Iterator
from dataclasses import fields

import torch

from .. import checks
from ..numerics.functions import FUNCTIONS, FunctionsName
from ..numerics.functions import checksum as checksum_of_functions
from ..recipe import FLASHINFER, FlashInferVersion, check_flashinfer
from .copies import LAYOUTS
from .experts import Experts

_SEEDS = (0x243F6A8885A308D3, 0x13198A2E03707344)  # the first digits of pi
_WORDS = 1 << 22  # at a time
_LEFT_OUT = (*(layout.field for layout in LAYOUTS), "shard", "first_expert")
"""Copies of the weights for other kernels, which follow from the rest, and where these are from."""


def checksum(
    experts: Experts,
    flashinfer: FlashInferVersion = FLASHINFER,
    functions: FunctionsName = "exact",
) -> str:
    """`Experts.checksum`."""
    check_flashinfer(flashinfer)
    checks.one_of("functions", functions, FUNCTIONS)
    total = hashlib.sha256()
    if flashinfer != FLASHINFER:
        total.update(f"flashinfer: {flashinfer}\n".encode())
    if functions != "exact":
        total.update(f"functions: {functions} {checksum_of_functions(functions)}\n".encode())
    for name, value in _state(experts):
        if isinstance(value, torch.Tensor):
            shape = "x".join(map(str, value.shape))
            value = f"{value.dtype} [{shape}] " + " ".join(f"{d:016x}" for d in digests(value))
        total.update(f"{name}: {value}\n".encode())
    return total.hexdigest()


def digests(t: torch.Tensor) -> list[int]:
    """One digest for each seed."""
    data = t.detach().contiguous().reshape(-1).view(torch.uint8)
    whole = data.numel() // 8 * 8
    words = data[:whole]
    if words.data_ptr() % 8:
        words = words.clone()
    rest = torch.nn.functional.pad(data[whole:], (0, -data.numel() % 8))
    totals = torch.zeros(len(_SEEDS), dtype=torch.int64, device=t.device)
    parts = [*words.view(torch.int64).split(_WORDS), rest.clone().view(torch.int64)]
    place = 0
    for part in parts:
        index = torch.arange(place, place + part.numel(), dtype=torch.int64, device=t.device)
        place += part.numel()
        for i, seed in enumerate(_SEEDS):
            totals[i] += _mix(part ^ _mix(index + seed)).sum()
    return [total % 2**64 for total in totals.tolist()]


def _mix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's finalizer on int64, whose sums and products wrap as uint64's do."""
    x = (x ^ _shifted(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shifted(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    """A logical shift to the right."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _state(experts: Experts) -> Iterator[tuple[str, object]]:
    for field in fields(experts):
        value = getattr(experts, field.name)
        if field.name not in _LEFT_OUT and value is not None and value is not False:
            yield field.name, int(value) if isinstance(value, int) else value
