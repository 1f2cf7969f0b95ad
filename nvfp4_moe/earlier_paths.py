"""Modules of version 0.1 by the paths that they had: an import warns, and gives the module of today."""

# SPDX-License-Identifier: Apache-2.0
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

EARLIER_PATHS = {
    "nvfp4_moe.inputs": "nvfp4_moe.cases.inputs",
    "nvfp4_moe.reference.bounds_parallel": "nvfp4_moe.reference.bounds.parallel",
    "nvfp4_moe.reference.grouped": "nvfp4_moe.reference.moe.masked_layout",
    "nvfp4_moe.reference.moe.grouped": "nvfp4_moe.reference.moe.masked_layout",
    "nvfp4_moe.reference.routing": "nvfp4_moe.reference.moe.routing",
    "nvfp4_moe.reference.shards": "nvfp4_moe.reference.moe.shards",
}


class _Finder(MetaPathFinder, Loader):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in EARLIER_PATHS else None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        warnings.warn(f"{name} is now {EARLIER_PATHS[name]}", DeprecationWarning, stacklevel=2)
        sys.modules[name] = import_module(EARLIER_PATHS[name])


def install() -> None:
    """Look for these paths after all others."""
    sys.meta_path.append(_Finder())
