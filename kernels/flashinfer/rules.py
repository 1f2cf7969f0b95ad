"""Rules by which a backend of FlashInfer refuses a call: their type, and those that adapters share."""

# SPDX-License-Identifier: Apache-2.0
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

from ...reference.recipe import Build, Recipe
from .. import environment
from . import version
from .version import DESCRIBED, EVERY, NEW, Versions, written

Capability = tuple[int, int]
SM100: tuple[Capability, ...] = ((10, 0), (10, 3))
SM10X = (*SM100, (10, 7))
SM12X: tuple[Capability, ...] = ((12, 0), (12, 1))
BLACKWELL = (*SM10X, (11, 0), *SM12X)


class Call(Protocol):
    """The field that every call has: the capability of its GPU, None on the CPU."""

    @property
    def capability(self) -> Capability | None: ...


class RecipeCall(Call, Protocol):
    """A call whose bits a recipe decides."""

    @property
    def recipe(self) -> Recipe: ...


C = TypeVar("C", bound=Call, contravariant=True)


@dataclass(frozen=True)
class Rule(Generic[C]):
    """One reason for which a backend cannot serve a call.

    Args:
        refuses: true if the call is refused.
        reason: a text, with the fields {r.…} of the call and {sm}, its GPU's "sm_100"; or a function
            that makes one from the call.
        source: the file and line of flashinfer-python 0.7.2.post1 from which the rule follows, as
            "gemm/gemm_base.py:7840"; empty for a rule that is ours.
        versions: the versions of FlashInfer that have the limit.
    """

    refuses: Callable[[C], Any]
    reason: str | Callable[[C], str]
    source: str = ""
    versions: Versions = EVERY

    def text(self, call: C) -> str:
        """Return the reason for a call that is refused."""
        if not isinstance(self.reason, str):
            return self.reason(call)
        return self.reason.format(r=call, sm=sm_of(call.capability))


def first_reason(rules: Iterable[Rule[C]], call: C) -> str | None:
    """Return the first reason for which the installed version refuses the call; None without one."""
    here = version.HERE.described_as
    for rule in rules:
        if here in rule.versions and rule.refuses(call):
            return rule.text(call)
    return None


def every_text(rules: Iterable[Rule[C]], call: C) -> list[str]:
    """Return all reasons for which the installed version refuses the call."""
    here = version.HERE.described_as
    return [rule.text(call) for rule in rules if here in rule.versions and rule.refuses(call)]


def sm_of(capability: Capability | None) -> str:
    """ "sm_100" of (10, 0); "" of None."""
    return "" if capability is None else f"sm_{capability[0]}{capability[1]}"


def _other_version(_: Call) -> str:
    here, oldest = version.HERE.version, DESCRIBED[0]
    assert here is not None and oldest.before is not None
    if here and here < oldest.since:
        return f"flashinfer-python is older than {written(oldest.since)}, whose functions we call"
    name = written(here) or "of an unknown version"
    known = f"those before {written(oldest.before)} and {written(NEW)} are"
    return f"flashinfer-python {name} is not described; {known}. {_what_differs(here)}"


@functools.cache
def _what_differs(_: version.Version) -> str:
    from .functions import differences  # which imports the adapters, and they this

    found = differences()
    if not found:
        return "Its functions have the arguments that we know, but nobody compared its bits"
    return f"Its functions differ: {'; '.join(found)}"


COMMON: tuple[Rule[Call], ...] = (
    Rule(
        lambda _: version.HERE.version is None,
        "flashinfer-python is not installed (pip install 'nvfp4-moe[flashinfer]')",
    ),
    # Its custom ops are not registered, and its first call builds a module.
    Rule(
        lambda _: torch.compiler.is_compiling(),
        "torch.compile cannot trace FlashInfer's Python",
        "utils.py:438",
    ),
    Rule(lambda _: not version.HERE.is_described, _other_version),
)
"""The limits of every function."""


def on_no_gpu(reason: str) -> Rule[Call]:
    """FlashInfer's kernels need a GPU."""
    return Rule(lambda r: r.capability is None, reason)


def no_kernels_beside(capabilities: tuple[Capability, ...], source: str) -> Rule[Call]:
    """A backend has kernels for these GPUs alone."""
    *others, last = map(sm_of, capabilities)
    names = f"{', '.join(others)} and {last}"
    return Rule(
        lambda r: r.capability not in capabilities, f"{{sm}} has no kernels; {names} have", source
    )


_TILE = 256
"""The widest tile along K of TRT-LLM's block-scaled GEMMs."""


def whole_tiles(hidden_size: Callable[[C], int]) -> Rule[C]:
    """Hold a layer of TRT-LLM to a hidden size, padded, in whole tiles along K of its first GEMM.

    0.7.4 says that the padded size "must be a multiple of 256 for MxFP8 and NVFP4 (128 is rejected or
    gives wrong results)", `fused_moe/core.py:582`. 0.7.2 has the same compiled kernels
    (`artifacts.py:145`) and the same runner, but does not say so.
    """
    return Rule(
        lambda r: hidden_size(r) % _TILE,
        lambda r: (
            f"hidden_size is {hidden_size(r)}, padded; it must be a multiple of {_TILE}, of 128 alone "
            "its kernels reject it or give wrong results"
        ),
        "trtllm_fused_moe_runner.cu:80",
    )


def math_of(build: Build, source: str) -> Rule[RecipeCall]:
    """The quantizers of this build read fast or exact math from the environment."""

    def reason(r: RecipeCall) -> str:
        return (
            f"it reads the math from the environment, which says {environment.math(build)}, not "
            f"{r.recipe.math}: {environment.how_to_get(r.recipe.math, build)}"
        )

    return Rule(lambda r: r.recipe.math != environment.math(build), reason, source)
