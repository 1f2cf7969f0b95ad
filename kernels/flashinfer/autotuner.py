"""FlashInfer's tuner, which all its layers ask for a runner and a tactic.

An untuned layer gets the first runner and tactic -1. `answered_by` puts a function of ours in the place
of the question; `valid_tactics` lists what the tuner itself would measure, by its own methods.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from .description import REST, Argument, Function

UNTUNED = -1
"""The tactic that FlashInfer runs where nothing was tuned."""


def _method(name: str, line: int, *arguments: Argument) -> Function:
    source = f"autotuner/autotuner.py:{line}"
    return Function("flashinfer.autotuner", f"AutoTuner.{name}", source, arguments)


_SELF, _CONFIG, _INPUTS = Argument("self"), Argument("tuning_config"), Argument("inputs")
CHOOSE_ONE = _method(
    "choose_one",
    2165,
    _SELF,
    Argument("custom_op"),
    Argument("runners"),
    _CONFIG,
    _INPUTS,
    Argument("kwargs", kind=REST),
)
INPUT_SIZES = _method("_get_input_sizes", 2765, _SELF, _INPUTS)
PROFILES = _method("_generate_optimization_profiles", 3233, _SELF, _CONFIG, _INPUTS)
NEAREST_PROFILE = _method("_find_nearest_profile", 3331, Argument("shapes"), _CONFIG)
PREPARE_INPUTS = _method("_prepare_input_tensors", 3449, _SELF, Argument("profile"), _INPUTS)
METHODS = (CHOOSE_ONE, INPUT_SIZES, PROFILES, NEAREST_PROFILE, PREPARE_INPUTS)


def answered_by(choose_one: Callable[..., tuple[Any, Any]]) -> AbstractContextManager[Any]:
    """Let the function replace `AutoTuner.choose_one` within the block; it gets the same arguments."""
    from flashinfer.autotuner import AutoTuner

    return mock.patch.object(AutoTuner, CHOOSE_ONE.name.split(".")[1], choose_one)


def valid_tactics(tuner: Any, op: str, runner: Any, config: Any, inputs: list) -> list[Any]:
    """Return the tactics that tuning would measure for a later call of these inputs.

    The tuner measures once for each profile, a bucket of token counts, on tensors of its size; a call
    looks in the profile that its shapes map to. Tactics that the tuner has blocked are left out.
    """
    location = NEAREST_PROFILE.get()(tuple(INPUT_SIZES.get()(tuner, inputs)), config)
    for profile in PROFILES.get()(tuner, config, inputs):
        if NEAREST_PROFILE.get()(profile.get_opt_shapes(), config) != location:
            continue
        tensors = PREPARE_INPUTS.get()(tuner, profile, inputs)
        if config.inputs_pre_hook is not None:
            tensors = list(config.inputs_pre_hook(tensors))
        values = runner.get_valid_tactics(tensors, profile)
        return [_plain(value) for value in tuner._blocklist.filter(op, runner, values)]
    return []


def _plain(tactic: Any) -> Any:
    """Convert to numbers, tuples and lists; values from C++ are arrays of a type of their own."""
    if isinstance(tactic, int | float | str | None):
        return tactic
    parts = [_plain(part) for part in tactic]
    return tuple(parts) if isinstance(tactic, tuple) else parts
