"""Environment variables, read in this one place and never changed.

FlashInfer chooses fast or exact math, and 4over6 where the argument is omitted, from them at each
launch. A variable counts as on when it is exactly "1" (flashinfer-python 0.7.2, `envUtils.cpp:61`,
`nvfp4_quantization_utils.py:env_flag_enabled`). The switch of a serving stack has SGLang's spellings.
The command line imports this module before torch, so nothing here imports torch at once.
"""

# SPDX-License-Identifier: Apache-2.0
import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..reference.environment import VALUES_VARIABLE

if TYPE_CHECKING:
    from ..reference.recipe import Build, Math, NVFP44Over6Config, Recipe

EXACT_VARIABLES: "dict[Build, tuple[str, ...]]" = {
    # `envUtils.cpp:365`
    "cuda": ("FLASHINFER_DISABLE_FP4_QUANT_FAST_MATH", "TRTLLM_DISABLE_FP4_QUANT_FAST_MATH"),
    # `kernels/nvfp4_quantize.py`: the older name is not read
    "cute-dsl": ("FLASHINFER_DISABLE_FP4_QUANT_FAST_MATH",),
}
FOUR_OVER_SIX_VARIABLES = (
    "FLASHINFER_NVFP4_4OVER6",
    "FLASHINFER_NVFP4_4OVER6_ERR_MODE",
    "FLASHINFER_NVFP4_4OVER6_ERR_USE_FAST_MATH",
    "FLASHINFER_NVFP4_4OVER6_E4M3_USE_256",
)
SWITCH_VARIABLES = (
    "NVFP4_MOE_PER_TOKEN_ACTIVATION",
    "SGLANG_FLASHINFER_NVFP4_PER_TOKEN_ACTIVATION",
)
CACHE_VARIABLES = ("NVFP4_MOE_CACHE", "XDG_CACHE_HOME")
RECORDS_VARIABLE = "NVFP4_MOE_RECORDS"
TRACEBACK_VARIABLE = "NVFP4_MOE_TRACEBACK"
CANARY_VARIABLES = (
    "NVFP4_MOE_CANARY",
    "NVFP4_MOE_CANARY_FOLDER",
    "NVFP4_MOE_CANARY_FATAL",
)
VARIABLES = (
    *EXACT_VARIABLES["cuda"],
    *FOUR_OVER_SIX_VARIABLES,
    *SWITCH_VARIABLES,
    *CACHE_VARIABLES,
    RECORDS_VARIABLE,
    TRACEBACK_VARIABLE,
    *CANARY_VARIABLES,
    VALUES_VARIABLE,
)
"""Every variable that this library reads; `reference/checks.py` reads the last one."""

_BOOLEANS = {
    **dict.fromkeys(("true", "1", "yes", "y"), True),
    **dict.fromkeys(("false", "0", "no", "n"), False),
}
"""SGLang's, in any case (sglang 0.5.23, `environ.py:143`)."""


def _on(name: str) -> bool:
    return os.environ.get(name) == "1"


def math(build: "Build") -> "Math":
    """The math that FlashInfer's kernels of this build would use now."""
    return "exact" if any(_on(name) for name in EXACT_VARIABLES[build]) else "fast"


def how_to_get(wanted: "Math", build: "Build") -> str:
    """Say how to change the environment so that `math(build)` is `wanted`."""
    if wanted == "exact":
        return f"set {EXACT_VARIABLES[build][0]}=1"
    return "unset " + " and ".join(name for name in EXACT_VARIABLES[build] if _on(name))


def four_over_six() -> "NVFP44Over6Config | None":
    """The 4over6 recipe that an omitted `nvfp4_4over6` argument means now.

    Raises:
        ValueError: FLASHINFER_NVFP4_4OVER6_ERR_MODE is neither MAE nor MSE.
    """
    from ..reference.recipe import NVFP44Over6Config

    switch, mode, fast, use_256 = FOUR_OVER_SIX_VARIABLES
    if not _on(switch):
        return None
    err_mode = os.environ.get(mode, "MAE")
    try:
        return NVFP44Over6Config(256 if _on(use_256) else 448, err_mode, _on(fast))
    except ValueError:
        raise ValueError(f"{mode} is {err_mode!r}; it must be MAE or MSE") from None


def per_token_activation() -> bool:
    """The switch: whether a serving stack quantizes activations online, per token. Default off.

    An empty variable counts as unset. SGLang warns of a value that it cannot read and goes on with
    static scales; here that is an error.

    Raises:
        ValueError: a value that is no boolean, or two variables that say different things.
    """
    said = {name: _boolean(name) for name in SWITCH_VARIABLES if os.environ.get(name)}
    if len(set(said.values())) > 1:
        given = " and ".join(f"{name} is {os.environ[name]!r}" for name in said)
        raise ValueError(f"{given}; they must agree, or one of them be unset")
    return any(said.values())


def _boolean(name: str) -> bool:
    value = os.environ[name]
    try:
        return _BOOLEANS[value.lower()]
    except KeyError:
        raise ValueError(
            f"{name} is {value!r}; it must be one of {', '.join(_BOOLEANS)}, in any case"
        ) from None


_OF_CALLS = (*EXACT_VARIABLES["cuda"], VALUES_VARIABLE, FOUR_OVER_SIX_VARIABLES[0])
# `os.environ.get` enters four functions for a name, which four times over would be a tenth of a repeated
# call's host time. CPython keeps what it holds, encoded, in this dictionary.
_held = getattr(os.environ, "_data", os.environ)
_HELD_NAMES = tuple(
    name if _held is os.environ else os.environ.encodekey(name)  # type: ignore[attr-defined]
    for name in _OF_CALLS
)
_none_is_held = _held.keys().isdisjoint


def of_calls() -> tuple[object, ...]:
    """Return what tells whether the variables that a call reads are as they were, for a comparison."""
    if _none_is_held(_HELD_NAMES):
        return ()
    values: list[object] = list(map(_held.get, _HELD_NAMES))
    if values[-1] is not None:  # the others are read only then
        values += map(os.environ.get, FOUR_OVER_SIX_VARIABLES[1:])
    return tuple(values)


def sources(recipe: "Recipe", *, math: bool, config: bool) -> str:
    """The variables that made a recipe what it is, where the named parts of it come from them."""
    names = [name for name in EXACT_VARIABLES[recipe.build] if math and _on(name)]
    if config and recipe.four_over_six is not None:
        names.append(FOUR_OVER_SIX_VARIABLES[0])
    return " and ".join(names)


def cache_folder() -> Path | None:
    """Return the folder of tuned configurations; None for a user without a home directory.

    An empty variable counts as unset, and so does a relative XDG_CACHE_HOME (XDG Base Directory
    Specification: "should consider the path invalid and ignore it").
    """
    own, shared = (os.environ.get(name, "") for name in CACHE_VARIABLES)
    if own:
        return Path(own)
    if Path(shared).is_absolute():
        return Path(shared) / "nvfp4-moe"
    try:
        return Path.home() / ".cache" / "nvfp4-moe"
    except RuntimeError:
        return None


def records_wanted() -> bool:
    """False if no call is to be repeated from a record of its launches: the variable is exactly "0"."""
    return os.environ.get(RECORDS_VARIABLE) != "0"


def traceback_wanted() -> bool:
    """True if the command line prints the traceback of a crash; else it writes it to a file."""
    return _on(TRACEBACK_VARIABLE)


def canary_steps() -> int | None:
    """Return the steps between two samples of the canary; None: it is off (unset, empty or 0).

    Raises:
        ValueError: the variable is no whole number, or a negative one.
    """
    name = CANARY_VARIABLES[0]
    value = os.environ.get(name, "")
    if value and not (value.isascii() and value.isdecimal()):
        raise ValueError(f"{name} is {value!r}; it must be a number of steps, or 0 for none")
    return int(value or 0) or None


def canary_folder() -> Path | None:
    """Return the folder of the canary's replay files; None for a user without a home directory.

    Without the variable it is `canary` in the folder of tuned configurations.
    """
    given, cache = os.environ.get(CANARY_VARIABLES[1], ""), cache_folder()
    if given:
        return Path(given)
    return None if cache is None else cache / "canary"


def canary_fatal() -> bool:
    """True if an alarm of the canary ends the process.

    Raises:
        ValueError: a value that is no boolean.
    """
    name = CANARY_VARIABLES[2]
    return bool(os.environ.get(name)) and _boolean(name)


def snapshot() -> dict[str, str | None]:
    """The variables and their values, None where unset."""
    return {name: os.environ.get(name) for name in VARIABLES}
