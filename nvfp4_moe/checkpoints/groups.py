"""The `config_groups` of a quantization config: the number format of each module.

A group names its modules by `targets`: exact names, `re:` patterns that match the beginning of a name,
wildcards, or the class of a layer ("Linear"). Where several groups mean a module an exact name counts
before a pattern, and a pattern before a class, whatever their order.
"""

# SPDX-License-Identifier: Apache-2.0
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..reference.recipe import BLOCK_SIZE
from .patterns import matches

NVFP4_PACKED = "nvfp4-pack-quantized"
_CLASS = re.compile(r"Linear|\w*(Experts|MoE|MoeBlock)")


@dataclass(frozen=True)
class Group:
    """A group: `weights` describes the weights' numbers, `form` names their format."""

    name: str
    targets: tuple[str, ...]
    weights: Mapping[str, Any]
    form: str = ""

    @property
    def is_nvfp4(self) -> bool:
        w = self.weights
        if not w:
            return self.form == NVFP4_PACKED
        size = w.get("group_size")
        four = str(w.get("num_bits")) == "4" and str(w.get("type")).lower() == "float"
        return four and (size is None or str(size) == str(BLOCK_SIZE))

    @property
    def is_fp8(self) -> bool:
        w = self.weights
        return (not w and "nvfp4" not in self.form) or (
            str(w.get("num_bits")) == "8" and str(w.get("type")).lower() == "float"
        )

    @property
    def described(self) -> str:
        keys = ("num_bits", "type", "strategy", "group_size")
        told = [f"{key} {self.weights[key]}" for key in keys if self.weights.get(key) is not None]
        return ", ".join(told) or self.form or "no weights"

    def rank(self, names: Sequence[str]) -> int | None:
        """Return how closely the targets match a module of these names: 0 exactly; None: not at all.

        Without targets the group is everybody's.
        """
        if any(target in names for target in self.targets):
            return 0
        if any(matches(target, name) for target in self.targets for name in names):
            return 1
        return (
            2
            if not self.targets or any(_CLASS.fullmatch(target) for target in self.targets)
            else None
        )


def read_groups(config: Mapping[str, Any]) -> tuple[Group, ...]:
    """Return the groups of a quantization config; an empty list if it has none."""
    groups = config.get("config_groups") or {}
    return tuple(
        Group(
            name,
            tuple(group.get("targets") or ()),
            group.get("weights") or {},
            (group.get("format") or "").lower(),
        )
        for name, group in groups.items()
    )


def group_refusal(groups: Sequence[Group], names: Sequence[str]) -> str | None:
    """Say why a module of these names is not NVFP4; None if it is, or if there are no groups."""
    ranks = {group.name: rank for group in groups if (rank := group.rank(names)) is not None}
    if not groups:
        return None
    if not ranks:
        every = ", ".join(group.name for group in groups)
        return f"{names[0]}: no targets of the config_groups ({every}) match it"
    nearest = [g for g in groups if ranks.get(g.name) == min(ranks.values())]
    if any(group.is_nvfp4 for group in nearest):
        return None
    each = " and ".join(f"{group.name} ({group.described})" for group in nearest)
    return (
        f"{names[0]} belongs to config group {each}, which is not NVFP4: 4-bit float weights in groups "
        f"of {BLOCK_SIZE}; `nvfp4-moe convert` reads FP8 and makes NVFP4 of it"
    )
