"""Second copies of the experts' weights in the layouts of other layers: one table of all layouts."""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from .cute_dsl import refresh_cute_dsl, with_cute_dsl
from .cutlass import refresh_cutlass, with_cutlass
from .experts import Experts


@dataclass(frozen=True)
class Layout:
    """A second copy of the experts' weights, as one layer wants them.

    Args:
        field: the field of `Experts` that holds the copy.
        add: returns the experts with the copy. ValueError: the layer cannot hold these experts.
        refresh: brings the copy of some experts up to date in place, where there is one.
    """

    field: str
    add: Callable[[Experts], Experts]
    refresh: Callable[[Experts, slice], None]

    def is_in(self, experts: Experts) -> bool:
        """Return True if the experts hold the copy."""
        return getattr(experts, self.field) is not None


CUTE_DSL = Layout("cute_dsl", with_cute_dsl, refresh_cute_dsl)
CUTLASS = Layout("cutlass", with_cutlass, refresh_cutlass)
LAYOUTS = (CUTE_DSL, CUTLASS)


def refresh_layouts(experts: Experts, some: slice) -> None:
    """Bring every copy of some experts up to date, in place."""
    for layout in LAYOUTS:
        layout.refresh(experts, some)


def without_layouts(experts: Experts, **changes: Any) -> Experts:
    """The experts with these fields changed, and without copies in other layouts."""
    changes |= {layout.field: None for layout in LAYOUTS}
    return replace(experts, **changes)


def in_layouts_of(experts: Experts, other: Experts) -> Experts:
    """The experts in every layout that the other ones are in.

    Raises:
        ValueError: a layer cannot hold these experts.
    """
    for layout in LAYOUTS:
        if layout.is_in(other):
            experts = layout.add(experts)
    return experts
