"""A mixture of experts to train through: forwards the server's bits, backwards straight through.

A trainer keeps weights in bf16 or fp32; a server quantizes them and every activation to NVFP4. Here the
trainer computes what the server will: the same function, on experts made of the same weights.
`gradient.py` has the gradients.
"""

# SPDX-License-Identifier: Apache-2.0
from dataclasses import replace
from typing import Any, get_args

import torch

from ..kernels.moe.backends import MoEBackend
from ..kernels.moe.call import Mode
from ..kernels.quantize.call import check_optional_flags, four_over_six_of, math_of
from ..reference import checks
from ..reference.activation import ActivationType, check_activation
from ..reference.recipe import Build, Recipe
from ..reference.weights.arguments import Options, check_preparation, check_values
from ..reference.weights.experts import Experts
from ..reference.weights.prepare import quantize_experts
from .gradient import Arithmetic, Backward, StraightThrough


def fake_quantized_moe(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    routing: tuple[torch.Tensor, torch.Tensor],
    activation: ActivationType = ActivationType.Swiglu,
    *,
    activation_mode: Mode = "per-token",
    backward: Backward = "dequantized",
    experts: Experts | None = None,
    recipe: Recipe | None = None,
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    alpha: torch.Tensor | float | None = None,
    beta: torch.Tensor | float | None = None,
    clamp_limit: torch.Tensor | float | None = None,
    backend: MoEBackend | str = "auto",
    fast_math: bool | None = None,
    build: Build = "cuda",
    nvfp4_4over6: Any = None,
    batch_invariant: bool = True,
    output_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """`fused_moe` on the experts of these weights, differentiable.

    Contract: bitwise `fused_moe(x, experts, routing, activation=activation_mode, batch_invariant=True)`
    with the same options and experts that hold these weights, with or without gradients and under
    autocast. Gradients reach x, w13, w2, the routing weights and the biases, straight through the
    quantizations (`gradient.py` has the formulas); alpha, beta and clamp_limit are constants.

    Args:
        x: [T, H] bf16.
        w13: [E, 2 I, H], [up; gate], or [E, I, H] without a gate; w2: [E, H, I]. fp32 ones are
            rounded to bf16, which is what a server has to be given: `load_(w13.bfloat16(), ...)`.
        routing: (ids int32 [T, K], weights bf16 or fp32 [T, K]); those of `reference.moe.routing.route`
            are differentiable in its logits. A slot of id -1 adds nothing.
        activation_mode: how hidden states and intermediate are quantized, as `fused_moe` names it in its
            `activation`: "per-token", or "bf16", not at all (W4A16). "static" is not supported.
        backward: the operands of the gradients' products, as Transformer Engine names them:
            "dequantized", those that the forward multiplied, or "high_precision", those before their
            quantization: x, w13 and w2 in bf16. The forward has the same bits.
        experts: hold the weights and all options of `prepare_experts` already, by it or by `load_`:
            once a step instead of once a call. Nothing may be loaded into them between a forward and
            its backward. That they hold these weights is the caller's promise.
        recipe, alpha, beta, clamp_limit: as for `prepare_experts`; None with `experts`.
        w13_bias, w2_bias: likewise, [E, 2 I] or [E, I], and [E, H]; with `experts` too, which hold
            them as well.
        backend, fast_math, build, nvfp4_4over6, output_dtype: as for `fused_moe`.
        batch_invariant: False gives the bits of `fused_moe` without it, in FlashInfer's order of slots.

    Returns:
        [T, H] of output_dtype.

    Raises:
        RuntimeError: in the backward, where the experts were written since the forward.
        ValueError, TypeError: an argument that does not fit, as `prepare_experts` and `fused_moe` say.
        UnsupportedError: the named backend cannot serve the call.
    """
    _check_routing(routing)
    _check_modes(activation, activation_mode, backward)
    checks.flag("batch_invariant", batch_invariant)
    check_optional_flags(fast_math=fast_math)
    checks.one_of("build", build, get_args(Build))
    _check_weights(w13, w2, w13_bias, w2_bias)
    checks.tensor("x", x, (torch.bfloat16,), ("T", w13.shape[2]), like=("w13", w13))
    if experts is None:
        first, second = (None if b is None else b.detach() for b in (w13_bias, w2_bias))
        options = Options(first, second, alpha, beta, clamp_limit)
        shipped = _shipped(w13), _shipped(w2)
        check_preparation(*shipped, activation, recipe, options)
        if checks.reads_values(*shipped):
            check_values(*shipped, activation, options)
        experts = quantize_experts(*shipped, activation, recipe, options)
    else:
        fixed = {"alpha": alpha, "beta": beta, "clamp_limit": clamp_limit, "recipe": recipe}
        _check_prepared(experts, activation, w13, w2, w13_bias, w2_bias, fixed)
    online = _recipe_of_activations(fast_math, build, nvfp4_4over6)
    arithmetic = Arithmetic(None if activation_mode == "bf16" else online, backward)
    call = {
        "activation": activation_mode,
        "backend": backend,
        "batch_invariant": batch_invariant,
        "output_dtype": output_dtype,
        "fast_math": online.math == "fast",
        "build": build,
        "nvfp4_4over6": online.four_over_six,
    }
    ids, weights = routing
    return StraightThrough.apply(
        x, w13, w2, weights, w13_bias, w2_bias, ids, experts, arithmetic, call
    )


def _recipe_of_activations(fast_math: bool | None, build: Build, nvfp4_4over6: Any) -> Recipe:
    """Return the recipe that `fused_moe` takes from the same arguments."""
    recipe = Recipe("fast", four_over_six_of(nvfp4_4over6), build)  # checks the build
    return replace(recipe, math=math_of(fast_math, build))


def _shipped(w: torch.Tensor) -> torch.Tensor:
    w = w.detach()
    return w.bfloat16() if w.dtype == torch.float32 else w


def _check_routing(routing: Any) -> None:
    allowed = (
        "two tensors, (ids, weights), so that trainer and server sum the same: "
        "`reference.moe.routing.route` makes them of logits"
    )
    checks.pair("routing", routing, allowed)
    if not all(isinstance(part, torch.Tensor) for part in routing):
        checks.wrong_type("routing", routing, allowed)


def _check_modes(activation: Any, activation_mode: Any, backward: Any) -> None:
    if isinstance(activation, str) and activation in get_args(Mode):
        checks.wrong_type(
            "activation",
            activation,
            "an ActivationType, the function between the GEMMs; what is quantized is activation_mode",
        )
    check_activation(activation)
    checks.one_of("activation_mode", activation_mode, get_args(Mode))
    if activation_mode == "static":
        checks.wrong_value("activation_mode", activation_mode, '"per-token" or "bf16"')
    checks.one_of("backward", backward, get_args(Backward))


def _check_weights(
    w13: torch.Tensor,
    w2: torch.Tensor,
    w13_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
) -> None:
    """Refuse arguments that `prepare_experts` does not check, or names otherwise."""
    checks.tensor("w13", w13, checks.FLOATS, ("E", "rows", "H"))
    checks.tensor("w2", w2, checks.FLOATS, ("E", "H", "I"))
    for name, bias, w in (("w13_bias", w13_bias, w13), ("w2_bias", w2_bias, w2)):
        if bias is not None:
            checks.tensor(name, bias, checks.FLOATS, w.shape[:2], like=("w13", w13))


def _check_prepared(
    experts: Experts,
    activation: ActivationType,
    w13: torch.Tensor,
    w2: torch.Tensor,
    w13_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    fixed: dict[str, Any],
) -> None:
    """Check that the caller prepared the experts per token, with the same options and sizes."""
    checks.instance("experts", experts, Experts, "Experts, as prepare_experts makes them")
    for name, value in fixed.items():
        if value is not None:
            checks.wrong_value(name, value, "None with experts, which were prepared with theirs")
    if experts.activation != activation:
        checks.wrong_value("activation", activation, f"{experts.activation!r}, as of the experts")
    if experts.input_scale is not None or experts.intermediate_scale is not None:
        raise ValueError(
            "experts have static activation scales; training is per token, so they must have none"
        )
    if experts.router_weight_on_input:
        raise ValueError(
            "experts have the router's weights on the input, through which there is no gradient here"
        )
    n, h, i = experts.num_local, experts.hidden_size, experts.intermediate_size
    rows = i * (2 if activation.gated else 1)
    checks.tensor("w13", w13, checks.FLOATS, (n, rows, h))
    checks.tensor("w2", w2, checks.FLOATS, (n, h, i))
    biases = {"w13_bias": experts.gemm1_bias, "w2_bias": experts.gemm2_bias}
    for name, bias in (("w13_bias", w13_bias), ("w2_bias", w2_bias)):
        if (bias is None) != (biases[name] is None):
            words = "None" if biases[name] is None else "a bias"
            checks.wrong_value(name, bias, f"{words}, as the experts were prepared with")
