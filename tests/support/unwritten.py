"""Memory in which NaN shows what is read before anybody has written it."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def unwritten_memory_of_nan() -> Iterator[None]:
    """Make new memory hold NaN, and the largest number of an integer type, until somebody writes it."""
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")
    try:
        assert torch.empty(1, dtype=torch.float32, device="cpu").isnan()
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
