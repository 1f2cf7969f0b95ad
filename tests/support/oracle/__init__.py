"""Outputs of FlashInfer's own kernels, and our implementations on the same inputs.

`cases.py` reads the arrays and the list of cases. `draw.py` and `inputs.py` make each case's inputs
again, so that the files hold outputs alone. `routing.py`, `finalize.py`, `quantizers.py` and
`cutlass.py` compare. `implementations.py` has what is compared: the reference, and Triton.
`python -m oracle` runs all of it and prints a table.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator

from . import cutlass, finalize, quantizers, routing
from .cases import Golden, Outcome
from .implementations import REFERENCE, Implementation


def compare_all(golden: Golden, ours: Implementation, every: int = 1) -> Iterator[Outcome]:
    """Every n-th case of every kind."""
    yield from routing.compare(golden, ours, every)
    yield from routing.compare_exactly(golden, ours, every)
    yield from finalize.compare(golden, ours, every)
    yield from quantizers.compare(golden, ours, every)
    if ours is REFERENCE:
        yield from cutlass.compare(golden, every)
        if golden.part[0] == 0:  # arrays that no list of cases has
            yield from finalize.compare_activation(golden)
            yield from cutlass.compare_sums(golden)
