"""The activations between the two GEMMs of an expert: one table, and their formulas in fp32.

A new activation is a number of `ActivationType`, a row of `_TABLE` and its formula here, a branch of the
Triton kernel and its derivative (`kernels/moe/activation.py`), and a rule of its bounds
(`bounds/activation.py`). The rest of the library reads the table.
`tests/moe/test_activation_table.py` names whatever is missing.

Formulas: flashinfer-python 0.7.2, `fused_moe/core.py:6470-6490`, `trace/templates/moe.py:1615-1665`
(clamps before scalars), `data/include/flashinfer/trtllm/batched_gemm/KernelRunner.h:36-48` (beta before
the scalar), `tllm_enums.py` (names and values).
"""

# SPDX-License-Identifier: Apache-2.0
import enum
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F

from . import checks
from .numerics.subnormals import kept

ParameterName = Literal["alpha", "beta", "clamp_limit"]
FlashInferLayer = Literal["trtllm", "cute-dsl", "cutlass", "baselines"]
Namespace = Literal["hugging_face", "sglang", "vllm"]
Value = torch.Tensor | float

PARAMETERS: tuple[ParameterName, ...] = get_args(ParameterName)

STEP_LIMIT = 7.0
"""SwigluStep's physical limit where none is given."""


class ActivationType(enum.IntEnum):
    """FlashInfer's names and values. SwigluBias, Invalid and ClampedRelu2 are not implemented.

    An activation that FlashInfer lacks has a value from `OWN` on.
    """

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
    def implemented(self) -> bool:
        return self in _TABLE

    @property
    def row(self) -> "Activation":
        """The row of the table.

        Raises:
            ValueError: it is not implemented.
        """
        check_activation(self)
        return _TABLE[self]

    @property
    def gated(self) -> bool:
        return self.implemented and self.row.gated

    @property
    def linear_up(self) -> bool:
        """True if `output1_scale_scalar` multiplies the up half, and the result is linear in it.

        SiTU and the activations without a gate apply `output1_scale_gate_scalar` to their argument.
        """
        return self.gated and self.row.linear_up

    @property
    def parameters(self) -> Mapping[ParameterName, "Parameter"]:
        """Those of alpha, beta and clamp_limit that it reads."""
        return self.row.parameters if self.implemented else {}

    @property
    def limited(self) -> bool:
        """True if it clamps where no clamp_limit is given."""
        limit = self.parameters.get("clamp_limit")
        return limit is not None and limit.default is not None

    def is_raw(self, name: ParameterName) -> bool:
        """True if `Experts` holds this parameter in units of the accumulator."""
        return name in self.parameters and self.parameters[name].unit != "physical"


OWN = 1000
"""The first value of `ActivationType` that is not FlashInfer's."""


class Scalars(NamedTuple):
    """The factors, parameters and limits of an expert's rows: the arguments of `activate`."""

    scale: Value
    gate_scale: Value
    alpha: Value | None
    beta: Value | None
    clamp_limit: Value | None
    of_cutlass: bool


@dataclass(frozen=True)
class Parameter:
    """A parameter of an activation. Callers give it in physical units; sources: `docs/units.md`."""

    unit: Literal["physical", "raw of up", "raw of gate"]  # of the tensor in `Experts`
    neutral: float | None  # the activation is the same without it; None: no value is
    default: float | None = None  # used where none is given; None: nothing is
    positive: bool = False  # must be above zero


@dataclass(frozen=True)
class Activation:
    """A row of the table: what decides the bits of an activation. The fingerprint hashes it."""

    formula: Callable[..., torch.Tensor]  # (x0, x1, Scalars) of a gated one, else of the argument
    gated: bool = False
    linear_up: bool = True  # of a gated one: `ActivationType.linear_up`
    exact: bool = False  # one rounding at most; an implementation approximates nothing
    clamps_result: bool = False  # clamp_limit bounds the curve's result, not its argument
    parameters: Mapping[ParameterName, Parameter] = field(default_factory=dict)


@dataclass(frozen=True)
class Elsewhere:
    """An activation in other libraries. No step of the contract reads this, nor does the fingerprint.

    `hugging_face`, `sglang` and `vllm` are names: a configuration's `hidden_act`, the activation of
    SGLang's `MoeRunnerConfig`, and the value of vLLM's `MoEActivation`.
    """

    flashinfer: frozenset[FlashInferLayer] = frozenset()  # layers that have kernels for it
    hugging_face: tuple[str, ...] = ()
    sglang: tuple[str, ...] = ()
    vllm: tuple[str, ...] = ()


@kept
def activate(
    raw: torch.Tensor,
    kind: ActivationType,
    scale: Value = 1.0,
    gate_scale: Value = 1.0,
    *,
    alpha: Value | None = None,
    beta: Value | None = None,
    clamp_limit: Value | None = None,
    of_cutlass: bool = False,
) -> torch.Tensor:
    """The activation of rows of the first GEMM, before the expert's scalars: [N, M1] to [N, I] fp32.

    A gated activation takes (x0, x1) = (up, gate), the first and the second half of the rows:

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
        alpha, beta, clamp_limit: not read by an activation that has no such parameter.
        clamp_limit: in units of `raw`, and Swiglu's beta too; `docs/units.md` has the unit of each.
        of_cutlass: what FlashInfer's cutlass layer does otherwise. SwigluStep's clamps give the limit
            for NaN (`cutlass_fused_moe_kernels.cuh:2268-2283`). GELU with tanh is +0 where that is -1,
            by fma(z, tanh, z) (`cutlass/epilogue/thread/activation.h:643`); that of an H200 is -1 from
            -8 on. SiTU's tanh, 2 sigmoid(2 z) - 1 (`cutlass_fused_moe_kernels.cuh:2294`), is +0 where
            that sigmoid is 1/2.

    Raises:
        ValueError: an activation that is not implemented.
    """
    row = kind.row
    if not row.gated:
        return row.formula(raw * gate_scale) * scale
    s = Scalars(scale, gate_scale, alpha, beta, clamp_limit, of_cutlass)
    return row.formula(*raw.chunk(2, -1), s)


def _swiglu(x0: torch.Tensor, x1: torch.Tensor, s: Scalars) -> torch.Tensor:
    x0, x1 = _clamped(x0, x1, s)
    gate = x1 * s.gate_scale
    part = sigmoid(gate if s.alpha is None else s.alpha * gate)
    return gate * part * ((x0 if s.beta is None else x0 + s.beta) * s.scale)


def _swiglu_step(x0: torch.Tensor, x1: torch.Tensor, s: Scalars) -> torch.Tensor:
    given = STEP_LIMIT / s.gate_scale if s.clamp_limit is None else s.clamp_limit
    limit = _tensor(given, x1)
    gate, most = silu(x1 * s.gate_scale), limit * s.gate_scale
    if s.of_cutlass:
        return torch.fmin(gate, most) * (torch.fmax(torch.fmin(x0, limit), -limit) * s.scale)
    return gate.clamp(max=most) * (x0.clamp(-limit, limit) * s.scale)


def _geglu(x0: torch.Tensor, x1: torch.Tensor, s: Scalars) -> torch.Tensor:
    return gelu(x1 * s.gate_scale) * (x0 * s.scale)


def _geglu_tanh(x0: torch.Tensor, x1: torch.Tensor, s: Scalars) -> torch.Tensor:
    gate = x1 * s.gate_scale
    part = gelu_tanh(gate)
    if s.of_cutlass:
        part = torch.where((_inner(gate) <= -8) & ~gate.isinf(), 0.0, part)
    return part * (x0 * s.scale)


def _situ(x0: torch.Tensor, x1: torch.Tensor, s: Scalars) -> torch.Tensor:
    x0, x1 = _clamped(x0, x1, s)
    gate = x1 * s.gate_scale
    alpha, beta = 1.0 if s.alpha is None else s.alpha, 1.0 if s.beta is None else s.beta
    tanh = _tanh_by_sigmoid if s.of_cutlass else torch.tanh
    up = beta * tanh(x0 * s.gate_scale / beta)
    return up * (alpha * tanh(gate / alpha) * sigmoid(gate)) * s.scale


def _tanh_by_sigmoid(x: torch.Tensor) -> torch.Tensor:
    return torch.where(sigmoid(2 * x) == 0.5, 0.0, torch.tanh(x))


def _clamped(x0: torch.Tensor, x1: torch.Tensor, s: Scalars) -> tuple[torch.Tensor, torch.Tensor]:
    if s.clamp_limit is None:
        return x0, x1
    limit = _tensor(s.clamp_limit, x1)
    return x0.clamp(-limit, limit), x1.clamp(max=limit)


def _tensor(value: Value, like: torch.Tensor) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    return torch.full((), value, dtype=torch.float32, device=like.device)


def identity(x: torch.Tensor) -> torch.Tensor:
    return x


def sigmoid(x: torch.Tensor) -> torch.Tensor:
    """Return 1 / (1 + e^-x), and e^x where 1 + e^-x overflows."""
    return torch.where(x < -88, x.clamp(max=-88).exp(), torch.sigmoid(x))


def silu(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x < -88, x * x.clamp(max=-88).exp(), F.silu(x))


def relu(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x <= 0, 0.0, x)


def relu2(x: torch.Tensor) -> torch.Tensor:
    return relu(x).square()


def gelu(x: torch.Tensor) -> torch.Tensor:
    """Without the cancellation in 1 + erf(x)."""
    return 0.5 * x * torch.special.erfc(-x / math.sqrt(2))


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """0.5 x (1 + tanh(u / 2)); below -1, where that cancels, x sigmoid(u)."""
    y = x.clamp(-100, -1)  # lower, the sigmoid is 0 already
    return torch.where(
        x < -1, x * sigmoid(2 * _inner(y)), F.gelu(x.clamp(min=-1), approximate="tanh")
    )


def _inner(x: torch.Tensor) -> torch.Tensor:
    """The argument of GELU's tanh."""
    return math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)


_TABLE: dict[ActivationType, Activation] = {
    ActivationType.Gelu: Activation(gelu),
    ActivationType.Relu: Activation(relu, exact=True),
    ActivationType.Silu: Activation(silu),
    ActivationType.Swiglu: Activation(
        _swiglu,
        gated=True,
        parameters={
            "alpha": Parameter("physical", neutral=1.0),
            "beta": Parameter("raw of up", neutral=0.0),
            "clamp_limit": Parameter("raw of gate", neutral=math.inf),
        },
    ),
    ActivationType.Geglu: Activation(_geglu, gated=True),
    ActivationType.Relu2: Activation(relu2, exact=True),
    ActivationType.SwigluStep: Activation(
        _swiglu_step,
        gated=True,
        clamps_result=True,
        parameters={"clamp_limit": Parameter("raw of gate", neutral=None, default=STEP_LIMIT)},
    ),
    ActivationType.GegluTanh: Activation(_geglu_tanh, gated=True),
    ActivationType.Identity: Activation(identity, exact=True),
    ActivationType.Situ: Activation(
        _situ,
        gated=True,
        linear_up=False,
        parameters={
            "alpha": Parameter("physical", neutral=None, default=1.0, positive=True),
            "beta": Parameter("physical", neutral=None, default=1.0, positive=True),
            "clamp_limit": Parameter("raw of gate", neutral=math.inf),
        },
    ),
}


def _layers(*names: FlashInferLayer) -> frozenset[FlashInferLayer]:
    return frozenset(names)


# FlashInfer's layers: trtllm `trtllm_fused_moe_runner.cu:114-146`, cute-dsl `moe_utils.py:52`
# (SiTU's constants are numbers there, tensors here), cutlass `cutlass_fused_moe_kernels.cuh`.
ELSEWHERE: dict[ActivationType, Elsewhere] = {
    ActivationType.Gelu: Elsewhere(
        flashinfer=_layers("cutlass"),
        hugging_face=("gelu",),
        sglang=("gelu",),
        vllm=("gelu_no_mul",),
    ),
    ActivationType.Relu: Elsewhere(
        flashinfer=_layers("cutlass"),
        hugging_face=("relu",),
    ),
    ActivationType.Silu: Elsewhere(
        flashinfer=_layers("cutlass"),
        hugging_face=("silu", "swish"),
        sglang=("silu",),
        vllm=("silu_no_mul",),
    ),
    ActivationType.Swiglu: Elsewhere(
        flashinfer=_layers("trtllm", "cute-dsl", "cutlass", "baselines"),
        hugging_face=("silu", "swish", "swigluoai", "swigluoai_uninterleave"),
        sglang=("silu",),
        vllm=("silu", "swigluoai_uninterleave"),
    ),
    ActivationType.Geglu: Elsewhere(
        flashinfer=_layers("trtllm", "cutlass", "baselines"),
        hugging_face=("gelu",),
        sglang=("gelu",),
        vllm=("gelu",),
    ),
    ActivationType.Relu2: Elsewhere(
        flashinfer=_layers("trtllm", "cute-dsl", "cutlass", "baselines"),
        hugging_face=("relu2",),
        sglang=("relu2",),
        vllm=("relu2_no_mul",),
    ),
    ActivationType.SwigluStep: Elsewhere(
        flashinfer=_layers("trtllm", "cutlass", "baselines"),
    ),
    ActivationType.GegluTanh: Elsewhere(
        flashinfer=_layers("cute-dsl", "cutlass"),
        hugging_face=("gelu_pytorch_tanh", "gelu_tanh", "gelu_new"),
        sglang=("gelu_tanh",),
        vllm=("gelu_tanh",),
    ),
    ActivationType.Identity: Elsewhere(
        flashinfer=_layers("trtllm", "cutlass", "baselines"),
    ),
    ActivationType.Situ: Elsewhere(
        flashinfer=_layers("trtllm", "cutlass"),
        hugging_face=("situ",),
        sglang=("situ",),
        vllm=("situ",),
    ),
}

IMPLEMENTED = tuple(_TABLE)
_ALLOWED = f"an ActivationType that is implemented: {', '.join(kind.name for kind in _TABLE)}"


def check_activation(value: Any, name: str = "activation") -> None:
    """Raise unless an argument is an activation that is implemented."""
    checks.instance(name, value, ActivationType, _ALLOWED)
    if value not in _TABLE:
        checks.wrong_value(name, value, _ALLOWED)


def activation_of(number: Any, name: str) -> ActivationType:
    """The activation of an argument that is a number, or FlashInfer's own member.

    Raises:
        ValueError: no activation that is implemented has this number.
    """
    try:
        kind = ActivationType(int(number))
    except (TypeError, ValueError):
        checks.wrong_value(name, number, _ALLOWED)
    check_activation(kind, name)
    return kind


def by_name(namespace: Namespace) -> dict[tuple[str, bool], ActivationType]:
    """Activations by their name in another library, and whether there are gate projections."""
    return {
        (name, kind.gated): kind
        for kind, row in ELSEWHERE.items()
        for name in getattr(row, namespace)
    }
