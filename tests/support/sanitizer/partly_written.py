"""Cases in which memory is read that nobody has written, and the proof that no result depends on it."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from unwritten import unwritten_memory_of_nan


@dataclass(frozen=True)
class PartlyWritten:
    """A case whose kernels read rows that nobody writes, here in memory that holds NaN.

    Initcheck sees that the NaN are written, and so does not report these reads. `check_results` takes
    its place.
    """

    case: Callable[[], Any]

    def __call__(self) -> Any:
        with unwritten_memory_of_nan():
            return self.case()


def check_results(name: str, results: tuple[torch.Tensor, ...]) -> None:
    """Raise a ValueError if a result of the case has a NaN."""
    for i, x in enumerate(results):
        if x.is_floating_point() and x.isnan().any():
            raise ValueError(f"{name}: result {i} has a NaN, from memory that nobody wrote")
