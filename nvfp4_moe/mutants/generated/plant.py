"""A generated mutant put into the modules of this process: only a child that ends soon may do it."""

# SPDX-License-Identifier: Apache-2.0
import importlib
import linecache
import sys
from types import FunctionType, ModuleType
from typing import Any

from ...kernels import moe
from ...reference import recipe
from .rules import Generated

_FOLDERS = {"reference": recipe.__package__, "kernels": moe.__package__}


def module_of(file: str) -> ModuleType:
    """The module of a file, `reference/numerics/e2m1.py` say."""
    folder, name = file.removesuffix(".py").split("/", 1)
    return importlib.import_module(f"{_FOLDERS[folder]}.{name.replace('/', '.')}")


def plant(mutant: Generated) -> None:
    """Exchange the function, or the constant, wherever it has been imported."""
    module = module_of(mutant.file)
    name = f"<{mutant.shown}>"
    text = mutant.source + "\n"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    made: dict[str, Any] = {}
    exec(compile(text, name, "exec"), module.__dict__, made)
    *outer, last = mutant.function.split(".")
    if not isinstance(made.get(last), FunctionType):
        _exchange_constant(module, made)
        return
    owner = module
    for part in outer:
        owner = getattr(owner, part)
    _exchange(owner.__dict__[last], made[last], text)


def _exchange_constant(module: ModuleType, made: dict[str, Any]) -> None:
    root = (module.__package__ or "").split(".")[0]
    for name, new in made.items():
        old = module.__dict__[name]
        for other in list(sys.modules.values()):
            if (
                getattr(other, "__name__", "").split(".")[0] == root
                and other.__dict__.get(name) is old
            ):
                setattr(other, name, new)
    for other in list(sys.modules.values()):  # what was made of the old one
        if getattr(other, "__name__", "").split(".")[0] == root:
            for kept in list(other.__dict__.values()):
                if hasattr(kept, "cache_clear"):
                    kept.cache_clear()


def _exchange(old: Any, new: FunctionType, source: str) -> None:
    """The code of a function, in place, since other modules hold it."""
    if hasattr(old, "_unsafe_update_src"):  # triton.JITFunction, nothing compiled yet
        old._unsafe_update_src(source)
        old.fn = new
    elif hasattr(old, "rewriter"):  # triton's InterpretedFunction
        old.fn, old.rewriter = new, type(old.rewriter)(new, **old.kwargs)
    elif isinstance(old, property):
        _exchange(old.fget, new, source)
    elif isinstance(old, staticmethod | classmethod):
        _exchange(old.__func__, new, source)
    elif hasattr(old, "__wrapped__"):  # functools.cache
        old.cache_clear()
        _exchange(old.__wrapped__, new, source)
    else:
        old.__code__, old.__defaults__ = new.__code__, new.__defaults__
        old.__kwdefaults__ = new.__kwdefaults__
