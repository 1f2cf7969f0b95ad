"""Checks of what `prepare_experts` and `assemble_experts` are given."""

# SPDX-License-Identifier: Apache-2.0
import math
import numbers
from dataclasses import dataclass, fields
from typing import Any

import torch

from .. import checks
from ..activation import PARAMETERS, ActivationType, ParameterName, check_activation
from ..recipe import BLOCK_SIZE, check_recipe
from .scalars import LARGEST

_BYTES = (torch.uint8, torch.float8_e4m3fn)
_AMAX = ("input_amax", "intermediate_amax")
_ROUNDS_TO_0 = 2.0**-150  # half of the least positive number of fp32


@dataclass(frozen=True)
class Options:
    """The options of n experts beside their weights, with names and units of `prepare_experts`.

    None means that the experts have none. `check_options` checks the fields, which may hold anything.
    """

    w13_bias: Any = None  # [n, rows], any float dtype
    w2_bias: Any = None  # [n, H]
    alpha: Any = None  # a number, or a tensor of one or of n floats, as the next two
    beta: Any = None
    clamp_limit: Any = None
    input_amax: Any = None  # a number, as the next one
    intermediate_amax: Any = None

    def given(self) -> dict[str, Any]:
        """The fields that are not None, in order."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def check_preparation(w13: Any, w2: Any, activation: Any, recipe: Any, options: Options) -> None:
    """Everything that `prepare_experts` is given, but the values of tensors."""
    check_activation(activation)
    check_recipe(recipe)
    check_weights(w13, w2, activation)
    experts, rows, hidden = w13.shape
    check_options(options, activation, experts, rows, hidden, ("w13", w13))


def check_weights(w13: Any, w2: Any, activation: ActivationType) -> None:
    """[E, 2 I, H] or [E, I, H], and [E, H, I], of one dtype and device."""
    checks.tensor("w13", w13, checks.HALVES, ("E", "2 I" if activation.gated else "I", "H"))
    experts, _, hidden = w13.shape
    checks.tensor("w2", w2, (w13.dtype,), (experts, hidden, "I"), like=("w13", w13))
    _check_rows("w13", w13, "w2", w2, w2.shape[2], activation)
    for name, size in (("H", hidden), ("I", w2.shape[2])):
        if size % BLOCK_SIZE or size == 0:
            raise ValueError(
                f"w13 is {checks.given(w13)}, {name} = {size}; {name} must be a positive multiple of "
                f"{BLOCK_SIZE}"
            )


def _check_rows(
    name: str,
    w13: torch.Tensor,
    other_name: str,
    other: torch.Tensor,
    intermediate: int,
    activation: ActivationType,
) -> None:
    wanted = intermediate * (2 if activation.gated else 1)
    if w13.shape[1] != wanted:
        gate = "a gate: rows [up; gate]" if activation.gated else "no gate: rows of I"
        raise ValueError(
            f"{name} is {checks.given(w13)}; with {other_name} {list(other.shape)} and activation "
            f"{activation.name}, which has {gate}, it must have {wanted} rows"
        )


def check_assembly(
    w13: tuple[Any, Any, Any], w2: tuple[Any, Any, Any], activation: Any, options: Options
) -> None:
    """Everything that `assemble_experts` is given; (codes, block scales, decode scales) each."""
    check_activation(activation)
    w13_codes, w13_scales, w13_decode = w13
    w2_codes, w2_scales, w2_decode = w2
    u8 = (torch.uint8,)
    checks.tensor("w13_codes", w13_codes, u8, ("E", "2 I" if activation.gated else "I", "H/2"))
    like = ("w13_codes", w13_codes)
    experts, rows, half = w13_codes.shape
    checks.tensor("w2_codes", w2_codes, u8, (experts, 2 * half, "I/2"), like=like)
    intermediate = 2 * w2_codes.shape[2]
    _check_rows("w13_codes", w13_codes, "w2_codes", w2_codes, intermediate, activation)
    blocks13, blocks2 = 2 * half // BLOCK_SIZE, intermediate // BLOCK_SIZE
    checks.tensor("w13_scales", w13_scales, _BYTES, (experts, rows, blocks13), like=like)
    checks.tensor("w2_scales", w2_scales, _BYTES, (experts, 2 * half, blocks2), like=like)
    apart = activation.gated and isinstance(w13_decode, torch.Tensor) and w13_decode.dim() == 2
    shape = (experts, 2) if apart else (experts,)
    checks.tensor("w13_decode", w13_decode, checks.FLOATS, shape, like=like)
    checks.tensor("w2_decode", w2_decode, checks.FLOATS, (experts,), like=like)
    check_options(options, activation, experts, rows, 2 * half, like)


def check_options(
    options: Options,
    activation: ActivationType,
    experts: int,
    rows: int,
    hidden: int,
    like: tuple[str, torch.Tensor],
) -> None:
    """Check the options of experts, each of which has `rows` rows in the first GEMM."""
    given = options.given()
    for name, size in (("w13_bias", rows), ("w2_bias", hidden)):
        if name in given:
            checks.tensor(name, given[name], checks.FLOATS, (experts, size), like=like)
    for parameter in PARAMETERS:
        if parameter in given:
            value = given[parameter]
            check_parameter(parameter, value, activation, experts)
            if isinstance(value, torch.Tensor) and value.is_meta:
                checks.same_device(parameter, value, *like)
    for name in _AMAX:
        if name in given:
            checks.number(name, given[name], positive=True)
    missing = [name for name in _AMAX if name not in given]
    if len(missing) == 1:
        raise ValueError(
            f"{missing[0]} is None; static activation scales have both, so it must be a positive "
            "number, or both must be None"
        )


def check_parameter(
    name: ParameterName, value: Any, activation: ActivationType, experts: int
) -> None:
    """alpha, beta or clamp_limit: a number by its value, a tensor by all but its values."""
    if name not in activation.parameters:
        checks.wrong_value(name, value, f"None with activation {activation.name}, which has none")
    allowed = f"a number, or a tensor of one or of {experts} floats"
    if isinstance(value, torch.Tensor):
        checks.tensor(name, value)
        if value.dtype not in checks.FLOATS or tuple(value.shape) not in ((), (1,), (experts,)):
            checks.wrong_value(name, value, allowed)
    elif isinstance(value, bool) or not isinstance(value, numbers.Real):
        checks.wrong_type(name, value, allowed)
    else:
        _check_number(name, value, activation)


def _check_number(name: ParameterName, value: Any, activation: ActivationType) -> None:
    """A parameter's number in fp32's range; it is compared as it is, since a conversion may overflow."""
    if name == "clamp_limit":
        good = 0 <= value <= LARGEST or value == math.inf
        allowed = "at least 0 and of fp32, or infinity for no limit"
    elif activation.parameters[name].positive:
        good, allowed = _ROUNDS_TO_0 < value <= LARGEST, "positive and finite in fp32"
    else:
        good, allowed = -LARGEST <= value <= LARGEST, "finite in fp32"
    if not good:
        checks.wrong_value(name, value, allowed)


def check_values(
    w13: torch.Tensor, w2: torch.Tensor, activation: ActivationType, options: Options
) -> None:
    """Raise for a NaN or an infinity in weights or biases, and for a parameter of no meaning.

    It waits for the device: `checks.reads_values` says where it may be called.
    """
    for name, w in (("w13", w13), ("w2", w2)):
        _check_finite_experts(name, w)
    check_option_values(activation, options)


def check_option_values(activation: ActivationType, options: Options) -> None:
    """`check_values` of all but the weights."""
    for name, value in options.given().items():
        if name.endswith("bias"):
            checks.finite(name, value)
        elif name in PARAMETERS and isinstance(value, torch.Tensor):
            given = value.detach().to(dtype=torch.float32, device="cpu")
            if name == "clamp_limit":
                checks.values(name, given, given >= 0, "at least 0, or None for no limit")
            elif activation.parameters[name].positive:
                checks.values(name, given, (given > 0) & given.isfinite(), "positive and finite")
            else:
                checks.finite(name, given)


def _check_finite_experts(name: str, w: torch.Tensor) -> None:
    """An expert at a time, whose maximum shows a NaN, so that no mask of all weights is made."""
    if not w.numel():
        return
    largest = torch.stack([expert.abs().amax() for expert in w])
    for e in (~largest.isfinite()).nonzero().flatten().tolist():
        checks.finite(f"{name}[{e}]", w[e])
