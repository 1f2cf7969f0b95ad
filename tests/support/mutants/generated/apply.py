"""Put a generated mutant into the modules of this process, and take it out again."""

# SPDX-License-Identifier: Apache-2.0
import ast
import importlib
import linecache
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

from triton.runtime.jit import JITCallable

from nvfp4_moe.kernels import launcher

from .rules import Generated

_CHANGED = "nvfp4_moe"
_PACKAGES = (_CHANGED, __name__.split(".")[0])
"""The packages in which a function or constant is exchanged: the library and its probes."""


def module_of(file: str) -> ModuleType:
    """The module of a file, `reference/numerics/e2m1.py` say."""
    return importlib.import_module(f"{_CHANGED}.{file.removesuffix('.py').replace('/', '.')}")


@contextmanager
def applied(mutant: Generated) -> Iterator[None]:
    """Exchange the function, or the constant, wherever it has been imported."""
    module = module_of(mutant.file)
    name = f"<{mutant.shown}>"
    text = mutant.source + "\n"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    made: dict[str, Any] = {}
    exec(compile(text, name, "exec"), module.__dict__, made)
    dependent = _that_use(set(made))
    compiled = [f.__dict__.copy() for f in dependent]
    *outer, last = mutant.function.split(".")
    if not isinstance(made.get(last), FunctionType):
        restore = _exchange_constants(module, made)
    else:
        owner = module
        for part in outer:
            owner = getattr(owner, part)
        restore = _exchange(owner.__dict__[last], made[last], text)
    for f in dependent:
        f.hash, f.used_global_vals = None, {}
        if hasattr(f, "device_caches"):
            f.device_caches = type(f.device_caches)(f.device_caches.default_factory)
    _forget_launches(dependent)
    _forget([module])  # what the function has made is of the unchanged one
    try:
        yield
    finally:
        restore()
        _forget([module])
        for f, before in zip(dependent, compiled, strict=True):
            f.__dict__.update(before)
        _forget_launches(dependent)
        del linecache.cache[name]


def _modules() -> list[ModuleType]:
    return [
        module
        for module in list(sys.modules.values())
        if getattr(module, "__name__", "").split(".")[0] in _PACKAGES
    ]


def _that_use(names: set[str]) -> list[Any]:
    """The functions that Triton compiles into which these names go, directly or through others."""
    functions = {
        id(f): f for m in _modules() for f in m.__dict__.values() if isinstance(f, JITCallable)
    }
    reads = {
        i: {n.id for n in ast.walk(f.parse()) if isinstance(n, ast.Name)} | {f.__name__}
        for i, f in functions.items()
    }
    found: dict[int, Any] = {}
    while more := [i for i in functions if i not in found and reads[i] & names]:
        found |= {i: functions[i] for i in more}
        names = names | {functions[i].__name__ for i in more}
    return list(found.values())


def _forget_launches(kernels: list[Any]) -> None:
    """Let the launcher ask Triton for these kernels again: it keeps what it has compiled itself."""
    for kernel in kernels:
        launcher._LAUNCHES.pop(id(kernel), None)


def _exchange_constants(module: ModuleType, made: dict[str, Any]) -> Callable[[], None]:
    """Exchange constants in modules that have them by name; those that are no numbers also in tables."""
    places: list[tuple[dict[Any, Any], Any, Any]] = []
    for name, new in made.items():
        old = module.__dict__[name]
        for other in _modules():
            found = [(other.__dict__, name)] if other.__dict__.get(name) is old else []
            for table in other.__dict__.values() if not isinstance(old, int | float) else []:
                if type(table) is dict:
                    found += [(table, key) for key, value in table.items() if value is old]
            for where, key in found:
                where[key] = new
                places.append((where, key, old))
    _forget(_modules())

    def restore() -> None:
        for where, key, old in places:
            where[key] = old
        _forget(_modules())

    return restore


def _forget(modules: list[ModuleType]) -> None:
    """Empty the caches of modules, since what is in them may be made of what is exchanged."""
    for module in modules:
        for kept in list(module.__dict__.values()):
            if hasattr(kept, "cache_clear"):
                kept.cache_clear()


def _exchange(old: Any, new: FunctionType, source: str) -> Callable[[], None]:
    """The code of a function, in place, since other modules hold it; what undoes that."""
    if hasattr(old, "_unsafe_update_src"):  # triton.JITFunction
        before, text = old.fn, old.src
        old._unsafe_update_src(source)
        old.fn = new

        def restore() -> None:
            old._unsafe_update_src(text)
            old.fn = before

        return restore
    if hasattr(old, "rewriter"):  # triton's InterpretedFunction
        kept = {"fn": old.fn, "rewriter": old.rewriter}
        old.fn, old.rewriter = new, type(old.rewriter)(new, **old.kwargs)
        return lambda: old.__dict__.update(kept)
    if isinstance(old, property):
        return _exchange(old.fget, new, source)
    if isinstance(old, staticmethod | classmethod):
        return _exchange(old.__func__, new, source)
    if hasattr(old, "__wrapped__"):  # functools.cache
        old.cache_clear()
        undo = _exchange(old.__wrapped__, new, source)

        def uncached() -> None:
            undo()
            old.cache_clear()

        return uncached
    code = old.__code__, old.__defaults__, old.__kwdefaults__
    old.__code__, old.__defaults__ = new.__code__, new.__defaults__
    old.__kwdefaults__ = new.__kwdefaults__

    def back() -> None:
        old.__code__, old.__defaults__, old.__kwdefaults__ = code

    return back
