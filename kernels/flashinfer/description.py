"""A function of FlashInfer as data: its place, its arguments, and their values from our call."""

# SPDX-License-Identifier: Apache-2.0
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...reference.recipe import NVFP44Over6Config, SfLayout
from . import version
from .version import EVERY, SINCE_NEW, Version, Versions

POSITIONAL = inspect.Parameter.POSITIONAL_OR_KEYWORD
KEYWORD = inspect.Parameter.KEYWORD_ONLY
REST = inspect.Parameter.VAR_KEYWORD
REQUIRED: Any = inspect.Parameter.empty
OMITTED: Any = object()
"""A value that is not passed, so that the function takes its default."""


@dataclass(frozen=True)
class OfType:
    """A default of which only the type's name is known: a sentinel."""

    name: str


@dataclass(frozen=True)
class Argument:
    """One argument of a function.

    Args:
        name: its name in FlashInfer.
        value: makes its value from our call; None leaves the default.
        default: FlashInfer's default, REQUIRED without one.
        versions: the versions that have this argument, with this default and this place.
        kind: POSITIONAL, KEYWORD (by keyword alone) or REST (`**kwargs`).
    """

    name: str
    value: Callable[..., Any] | None = None
    default: Any = REQUIRED
    versions: Versions = EVERY
    kind: Any = POSITIONAL


BATCH_INVARIANT = Argument("batch_invariant", default=False, versions=SINCE_NEW, kind=KEYWORD)
WORKSPACE = Argument("workspace_buffer", default=None, versions=SINCE_NEW)
"""Arguments of several functions that no call of ours passes."""


@dataclass(frozen=True)
class Function:
    """One function, or method of a class, with its arguments in FlashInfer's order.

    Args:
        module: from which it is imported, as "flashinfer.fused_moe".
        name: its name there, as "mm_fp4" or "AutoTuner.choose_one".
        source: the file and line where flashinfer-python 0.7.2.post1 defines it.
        arguments: of all versions; an argument that changed has one row for each form.
    """

    module: str
    name: str
    source: str
    arguments: tuple[Argument, ...]

    def of_version(self, installed: Version | None = None) -> tuple[Argument, ...]:
        """Return the arguments in one version, by default in the installed one."""
        here = version.HERE.described_as if installed is None else installed
        return tuple(a for a in self.arguments if here in a.versions)

    def keywords(self, *call: Any) -> dict[str, Any]:
        """Return the arguments of a call by name, in our own types."""
        made = {a.name: a.value(*call) for a in self.of_version() if a.value is not None}
        return {name: value for name, value in made.items() if value is not OMITTED}

    def get(self) -> Callable[..., Any]:
        """Return the installed function."""
        found: Any = importlib.import_module(self.module)
        for part in self.name.split("."):
            found = getattr(found, part)
        return found

    def run(self, *call: Any) -> Any:
        """Call the installed function."""
        function = self.get()
        return function(**{name: as_theirs(v) for name, v in self.keywords(*call).items()})

    def differences(self) -> list[str]:
        """List the differences between the installed function and this description, one line each."""
        try:
            parameters = inspect.signature(self.get()).parameters
        except (ImportError, AttributeError, OSError, RuntimeError) as error:
            return [f"{self.name}: {error}"]
        described = {a.name: a for a in self.of_version()}
        lines = [f"{name} is gone" for name in described if name not in parameters]
        lines += [f"{name} is new" for name in parameters if name not in described]
        for name in described.keys() & parameters.keys():
            argument, actual = described[name], parameters[name]
            if actual.kind != argument.kind:
                lines.append(f"{name} is {actual.kind.description}")
            if not _same(argument.default, actual.default):
                had = "none" if argument.default is REQUIRED else repr(argument.default)
                lines.append(f"{name} has the default {actual.default!r}, not {had}")
        if not lines and list(described) != list(parameters):
            lines.append(f"the order is {', '.join(parameters)}")
        return [f"{self.name}: {line}" for line in sorted(lines)]


def _same(described: Any, actual: Any) -> bool:
    if isinstance(described, OfType):
        return type(actual).__name__ == described.name
    return bool(described == actual)


def as_theirs(value: Any) -> Any:
    """Convert a value to FlashInfer's own type of the same name, if it has one: a layout, 4over6."""
    if isinstance(value, SfLayout):
        from flashinfer import SfLayout as TheirLayout

        return TheirLayout(int(value))
    if isinstance(value, NVFP44Over6Config):
        from flashinfer.quantization.nvfp4_quantization_utils import NVFP44Over6Config as Theirs

        return Theirs(value.e4m3_max, int(value.err_mode), value.err_use_fast_math)
    return value
