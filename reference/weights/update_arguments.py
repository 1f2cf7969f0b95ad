"""The arguments of `Experts.load_`, all checked before anything is written."""

# SPDX-License-Identifier: Apache-2.0

import torch

from .. import checks
from ..recipe import Recipe, check_recipe
from .arguments import Options, check_options, check_values
from .experts import Experts

_FIELDS = {
    "w13_bias": "gemm1_bias",
    "w2_bias": "gemm2_bias",
    "alpha": "gemm1_alpha",
    "beta": "gemm1_beta",
    "clamp_limit": "gemm1_clamp_limit",
    "input_amax": "input_scale",
    "intermediate_amax": "intermediate_scale",
}
"""By option of `prepare_experts`: the field of the experts that it becomes."""


def check(
    e: Experts,
    w13: torch.Tensor,
    w2: torch.Tensor,
    first: int,
    amax: tuple[torch.Tensor, torch.Tensor] | None,
    recipe: Recipe | None,
    options: Options,
) -> Options:
    """The options, numbers as Python's, once everything fits; values of tensors are read on a CPU.

    Raises:
        TypeError, ValueError: what does not fit, and every option that is missing.
    """
    here = "gemm1_weights", e.gemm1_weights
    rows = e.intermediate_size * (2 if e.activation.gated else 1)
    checks.tensor("w13", w13, checks.HALVES, ("n", rows, e.hidden_size), like=here)
    n = w13.shape[0]
    checks.tensor("w2", w2, (w13.dtype,), (n, e.hidden_size, e.intermediate_size), like=here)
    checks.integer("first", first)
    if not 0 <= first <= e.num_local - n:
        raise ValueError(f"first is {first}; {n} experts from there must be of {e.num_local}")
    check_recipe(recipe)
    if amax is not None:
        checks.pair("amax", amax, "two tensors, the largest magnitudes of w13 and of w2")
        for i, t in enumerate(amax):
            checks.tensor(f"amax[{i}]", t, (torch.float32,), (n,), like=here)
            if checks.reads_values(t):
                checks.values(f"amax[{i}]", t, (t >= 0) & t.isfinite(), "finite, 0 or above")
    _check_given(e, options)
    check_options(options, e.activation, n, rows, e.hidden_size, here)
    given = options.given()
    for name, value in given.items():
        if isinstance(value, torch.Tensor):
            checks.same_device(name, value, *here)
        else:
            given[name] = float(value)
    if checks.reads_values(w13, w2):
        check_values(w13, w2, e.activation, options)
    return Options(**given)


def _check_given(e: Experts, options: Options) -> None:
    given = set(options.given())
    present = {name for name, field in _FIELDS.items() if getattr(e, field) is not None}
    if missing := [name for name in _FIELDS if name in present - given]:
        raise ValueError(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: these experts were "
            "prepared with that, and a reload writes every byte of them; give it with the weights"
        )
    if extra := [name for name in _FIELDS if name in given - present]:
        raise ValueError(f"{extra[0]} is given; these experts were prepared without")
