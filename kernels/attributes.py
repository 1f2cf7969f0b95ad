"""Read many attributes of a value by one function, in a fraction of the time of a loop."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from typing import Any


def reader(*paths: str) -> Callable[[Any], tuple[Any, ...]]:
    """Return a function that reads attributes, such as `experts.gemm1_bias`, of a value into a tuple."""
    read: Callable[[Any], tuple[Any, ...]] = eval(
        f"lambda value: ({', '.join(f'value.{path}' for path in paths)},)"
    )
    return read
