"""The activations between the two GEMMs of an expert, in fp32.

A gated activation takes (up, gate), the first and the second half of the first GEMM's rows; the others
take one value, here `gate`. Formulas: flashinfer-python 0.7.2, `fused_moe/core.py:6470-6490`,
`trace/templates/moe.py:1615-1665` (clamps before scalars), `data/include/flashinfer/trtllm/
batched_gemm/KernelRunner.h:36-48` (beta before the scalar), `tllm_enums.py` (names and values).
"""

# SPDX-License-Identifier: Apache-2.0
import enum
import math

import torch
import torch.nn.functional as F

from .numerics.subnormals import kept


class ActivationType(enum.IntEnum):
    """FlashInfer's names and values. SwigluBias, Invalid and ClampedRelu2 are not implemented."""

    Gelu = 0
    Relu = 1
    Silu = 2
    Swiglu = 3
    Geglu = 4
    SwigluBias = 5
    Relu2 = 6
    SwigluStep = 7
    GegluTanh = 8
    Identity = 9
    Situ = 10
    Invalid = 11
    ClampedRelu2 = 12

    @property
    def gated(self) -> bool:
        return self in _GATED

    @property
    def implemented(self) -> bool:
        return self in _GATED or self in _PLAIN

    @property
    def linear_up(self) -> bool:
        """Whether the up half is times `output1_scale_scalar`, and the result linear in it.

        SiTU and the activations without a gate apply `output1_scale_gate_scalar` to their argument.
        """
        return self.gated and self != ActivationType.Situ

    @property
    def parameters(self) -> frozenset[str]:
        """Which of alpha, beta and clamp_limit it reads."""
        return _PARAMETERS.get(self, frozenset())


_GATED = {
    ActivationType.Swiglu,
    ActivationType.Geglu,
    ActivationType.SwigluStep,
    ActivationType.GegluTanh,
    ActivationType.Situ,
}
_PLAIN = {
    ActivationType.Gelu,
    ActivationType.Relu,
    ActivationType.Silu,
    ActivationType.Relu2,
    ActivationType.Identity,
}
_PARAMETERS = {
    ActivationType.Swiglu: frozenset({"alpha", "beta", "clamp_limit"}),
    ActivationType.SwigluStep: frozenset({"clamp_limit"}),
    ActivationType.Situ: frozenset({"alpha", "beta", "clamp_limit"}),
}
STEP_LIMIT = 7.0
"""SwigluStep's physical limit where none is given."""


@kept
def activate(
    raw: torch.Tensor,
    kind: ActivationType,
    scale: torch.Tensor | float = 1.0,
    gate_scale: torch.Tensor | float = 1.0,
    *,
    alpha: torch.Tensor | float | None = None,
    beta: torch.Tensor | float | None = None,
    clamp_limit: torch.Tensor | float | None = None,
    nan_is_clamped: bool = False,
) -> torch.Tensor:
    """The activation of rows of the first GEMM, before the expert's scalars: [N, M1] to [N, I] fp32.

    Swiglu       up = (clamp(x0, +-limit) + beta) * scale, gate = min(x1, limit) * gate_scale;
                 gate * sigmoid(alpha * gate) * up; alpha 1, beta 0
    SwigluStep   min(silu(x1 * gate_scale), limit * gate_scale) * clamp(x0, +-limit) * scale; limit
                 7 / gate_scale
    Geglu(Tanh)  gelu(x1 * gate_scale) * x0 * scale
    Situ         up = clamp(x0, +-limit) * gate_scale, gate = min(x1, limit) * gate_scale;
                 beta * tanh(up / beta) * alpha * tanh(gate / alpha) * sigmoid(gate) * scale; both 1
    the others   f(x * gate_scale) * scale

    Contract: NaN in gives NaN out, a clamp and ReLU included, and ReLU of -0 is +0. SiLU and GELU of
    -inf are NaN, -inf times 0. FlashInfer's closed epilogues may differ in NaN. Of its open ones, ReLU
    is `max.NaN` (`cutlass/functional.h:446`), SwigluStep's clamps are fminf and fmaxf.

    Args:
        raw: [N, M1] fp32: accumulators times the per-token scale, bias added.
        scale: `output1_scale_scalar` of the expert.
        gate_scale: `output1_scale_gate_scalar`.
        clamp_limit: in units of `raw`, and Swiglu's beta too; `docs/units.md` has the unit of each.
        nan_is_clamped: SwigluStep's clamps give the limit for NaN, as FlashInfer's cutlass layer does
            (`cutlass_fused_moe_kernels.cuh:2268-2283`).

    Raises:
        ValueError: an activation that is not implemented.
    """
    if not kind.gated:
        return _plain(raw * gate_scale, kind) * scale
    x0, x1 = raw.chunk(2, -1)
    if kind == ActivationType.SwigluStep:
        limit = _limit(STEP_LIMIT / gate_scale if clamp_limit is None else clamp_limit, raw)
        gate, most = silu(x1 * gate_scale), limit * gate_scale
        if nan_is_clamped:
            return torch.fmin(gate, most) * (torch.fmax(torch.fmin(x0, limit), -limit) * scale)
        return gate.clamp(max=most) * (x0.clamp(-limit, limit) * scale)
    if clamp_limit is not None:
        limit = _limit(clamp_limit, raw)
        x0, x1 = x0.clamp(-limit, limit), x1.clamp(max=limit)
    gate = x1 * gate_scale
    if kind == ActivationType.Situ:
        alpha, beta = 1.0 if alpha is None else alpha, 1.0 if beta is None else beta
        up = beta * torch.tanh(x0 * gate_scale / beta)
        return up * (alpha * torch.tanh(gate / alpha) * sigmoid(gate)) * scale
    if kind == ActivationType.Swiglu:
        part = sigmoid(gate if alpha is None else alpha * gate)
        return gate * part * ((x0 if beta is None else x0 + beta) * scale)
    return (gelu_tanh(gate) if kind == ActivationType.GegluTanh else gelu(gate)) * (x0 * scale)


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """Where 1 + e^-x overflows it is e^x."""
    return torch.where(x < -88, x.clamp(max=-88).exp(), torch.sigmoid(x))


def silu(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x < -88, x * x.clamp(max=-88).exp(), F.silu(x))


def relu(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x <= 0, 0.0, x)


def gelu(x: torch.Tensor) -> torch.Tensor:
    """Without the cancellation in 1 + erf(x)."""
    return 0.5 * x * torch.special.erfc(-x / math.sqrt(2))


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """0.5 x (1 + tanh(u / 2)); below -1, where that cancels, x sigmoid(u)."""
    y = x.clamp(-100, -1)  # lower, the sigmoid is 0 already
    u = 2 * math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)
    return torch.where(x < -1, x * sigmoid(u), F.gelu(x.clamp(min=-1), approximate="tanh"))


def _limit(value: torch.Tensor | float, raw: torch.Tensor) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    return torch.full((), value, dtype=torch.float32, device=raw.device)


def _plain(x: torch.Tensor, kind: ActivationType) -> torch.Tensor:
    if kind == ActivationType.Identity:
        return x
    if kind == ActivationType.Relu:
        return relu(x)
    if kind == ActivationType.Relu2:
        return relu(x).square()
    if kind == ActivationType.Silu:
        return silu(x)
    if kind == ActivationType.Gelu:
        return gelu(x)
    raise ValueError(f"activation_type is {kind!r}, which is not implemented")
