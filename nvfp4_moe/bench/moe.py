"""The fused mixture of experts: from bf16 hidden states and router logits to bf16 output.

Beside ours, and FlashInfer's where they serve, run layers in bf16 (`torch._grouped_mm`'s and Triton's,
whose tiles are tuned for each case), FlashInfer's of BF16, FP8 and MXFP8, and layers with the GEMMs of
other libraries (`rival_layers.py`). A call moves the weights of the experts that its tokens touch, once,
the hidden states, the logits and the output.
"""

# SPDX-License-Identifier: Apache-2.0
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..kernels.moe.api import explain_fused_moe, fused_moe
from ..reference.activation import ActivationType
from ..reference.moe.routing import Routing, RoutingMethodType
from ..reference.weights.experts import Experts
from ..reference.weights.prepare import assemble_experts
from . import baseline_layers, rival_layers
from .baseline_layers import FORMATS
from .bf16_weights import Quantized, Weights, plain
from .case import Case, NotHere, Operation, Prepared, Selection, WrongResult

TOKENS = (1, 8, 32, 128, 1024, 4096, 16384)
NVFP4 = 9 / 16
"""Bytes of a weight with its share of a block scale."""
MOST_ERROR = 2e-3
"""The most that the norm of ours may differ from the reference's, as a share of it."""
MOST_RIVAL_ERROR = 1e-2
"""The most that the norm may differ where a layer rounds its intermediate and its rows to bf16."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a layer, and what its experts compute."""

    name: str
    hidden: int
    intermediate: int
    experts: int  # local, the first of `routed`
    top_k: int
    activation: ActivationType = ActivationType.Swiglu
    ranks: int = 1  # that the experts are spread over
    biased: bool = False  # biases, and the activation's parameters of GPT-OSS

    @property
    def routed(self) -> int:
        """The number of experts that the logits name."""
        return self.experts * self.ranks

    @property
    def rows(self) -> int:
        """The rows of an expert's first weights."""
        return self.intermediate * (2 if self.activation.gated else 1)

    @property
    def weights_of_an_expert(self) -> int:
        """The number of weights of one expert."""
        return (self.rows + self.intermediate) * self.hidden

    @property
    def routing(self) -> Routing:
        """The method by which logits choose experts."""
        return Routing(RoutingMethodType.Renormalize, self.top_k)

    @property
    def parameters(self) -> dict[str, float]:
        """The activation's parameters."""
        return {"alpha": 1.702, "beta": 1.0, "clamp_limit": 7.0} if self.biased else {}

    @property
    def weights_key(self) -> tuple[object, ...]:
        """The fields on which random weights depend: shapes with equal keys share their weights."""
        return (self.hidden, self.intermediate, self.experts, self.activation, self.biased)


SHAPES = (
    Shape("Qwen3-30B-A3B", 2048, 768, 128, 8),
    Shape("DeepSeek-V3 rank", 7168, 2048, 32, 8),
    Shape("DeepSeek-V3, EP 8 of 256", 7168, 2048, 32, 8, ranks=8),
    Shape("Nemotron-3-Super latent", 1024, 2688, 512, 22, ActivationType.Relu2),
    Shape("GPT-OSS", 2880, 2880, 128, 4, biased=True),
)
"""Layers of models."""
SMALL = Shape("small, 8 experts of 512 x 256", 512, 256, 8, 2)
"""A layer that the reference computes in less than a second on a CPU."""


def random_experts(s: Shape, device: torch.device) -> Experts:
    """Make random codes under scales of ordinary size: what they are does not change the speed."""
    g = torch.Generator(device).manual_seed(0)

    def bias(*size: int) -> torch.Tensor | None:
        if not s.biased:
            return None
        return torch.randn(size, dtype=torch.float32, device=device, generator=g)

    e, h = s.experts, s.hidden
    w13, w2 = random_codes(s, g)
    parameters: dict[str, Any] = dict(s.parameters)
    return assemble_experts(
        *w13,
        *w2,
        s.activation,
        w13_bias=bias(e, s.rows),
        w2_bias=bias(e, h),
        **parameters,
    )


def random_codes(s: Shape, g: torch.Generator) -> tuple[Quantized, Quantized]:
    """Make the codes and scales of both weights on the generator's device."""
    e, h, i = s.experts, s.hidden, s.intermediate

    def quantized(rows: int, columns: int) -> Quantized:
        def bytes_of(low: int, high: int, width: int) -> torch.Tensor:
            size = (e, rows, width)
            return torch.randint(low, high, size, dtype=torch.uint8, device=g.device, generator=g)

        scale = torch.full((e,), 0.25 * columns**-0.5, dtype=torch.float32, device=g.device)
        return bytes_of(0, 256, columns // 2), bytes_of(0x28, 0x40, columns // 16), scale

    return quantized(s.rows, h), quantized(h, i)


def random_bf16_weights(s: Shape, device: torch.device) -> Weights:
    """Make random weights of the bf16 layers."""
    g = torch.Generator(device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> torch.Tensor:
        t = torch.empty(size, dtype=torch.bfloat16, device=device)
        return t.normal_(0, scale, generator=g)

    e, h, i = s.experts, s.hidden, s.intermediate
    w13, w2 = normal(e, s.rows, h, scale=1 / 64), normal(e, h, i, scale=1 / 64)
    if not s.biased:
        return Weights(w13, w2, s.activation)
    p = s.parameters
    biases = normal(e, s.rows), normal(e, h)
    return Weights(w13, w2, s.activation, *biases, p["alpha"], p["beta"], p["clamp_limit"])


def inputs(s: Shape, tokens: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Make x [T, H] bf16 and logits [T, routed experts] fp32; the first token has a local slot."""
    g = torch.Generator(device).manual_seed(tokens)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, dtype=torch.float32, device=device, generator=g)

    x, logits = normal(tokens, s.hidden).bfloat16(), normal(tokens, s.routed)
    if s.ranks > 1:
        logits[0, 0] = 10.0
    return x, logits


def experts_of_local_slots(s: Shape, logits: torch.Tensor) -> torch.Tensor:
    """Return the expert of each local slot, int64."""
    ids = logits.topk(s.top_k, dim=1).indices
    return ids[ids < s.experts]


def flop(s: Shape, slots: torch.Tensor) -> float:
    """Return the FLOPs of both products.

    Args:
        s: the layer.
        slots: `experts_of_local_slots`.
    """
    return 2 * s.weights_of_an_expert * slots.numel()


def weight_bytes(s: Shape, slots: torch.Tensor, of_one: float = NVFP4) -> float:
    """Return the bytes of the touched experts' weights, of which one has `of_one`."""
    return s.weights_of_an_expert * slots.unique().numel() * of_one


def grouped_mm_layer(
    x: torch.Tensor, logits: torch.Tensor, w: Weights, top_k: int, slots_here: int
) -> torch.Tensor:
    """Compute the bf16 layer by torch's own grouped product, routing included.

    `slots_here` is the number of local slots, which a real layer would not know without waiting.
    """
    experts = w.w13.shape[0]
    best, ids = logits.topk(top_k, dim=1)
    weights = best.softmax(1)
    order = ids.flatten().argsort()[:slots_here]
    counts = torch.zeros(logits.shape[1], dtype=torch.int32, device=x.device)
    counts.scatter_add_(0, ids.flatten(), ids.flatten().new_ones(ids.numel(), dtype=torch.int32))
    ends = counts[:experts].cumsum(0).int()
    y = torch._grouped_mm(x[order // top_k], w.w13.transpose(1, 2), offs=ends)
    if w.w13_bias is not None:
        y = y + w.w13_bias[ids.flatten()[order]]
    if w.activation.gated:
        up, gate = y.chunk(2, 1)
        if w.plain:
            y = torch.nn.functional.silu(gate) * up
        else:
            gate = gate.clamp(max=w.limit)
            y = gate * (w.alpha * gate).sigmoid() * (up.clamp(-w.limit, w.limit) + w.beta)
    else:
        y = y.relu().square()
    y = torch._grouped_mm(y, w.w2.transpose(1, 2), offs=ends)
    if w.w2_bias is not None:
        y = y + w.w2_bias[ids.flatten()[order]]
    if slots_here < ids.numel():
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        return out.index_add_(0, order // top_k, y * weights.flatten()[order, None]).bfloat16()
    back = torch.empty_like(y)
    back[order] = y
    return (back.unflatten(0, (-1, top_k)) * weights[..., None]).sum(1).bfloat16()


def check(s: Shape, experts: Experts, **options: Any) -> None:
    """Compare ours with the reference at five tokens of each rank.

    Args:
        s: the layer.
        experts: its weights.
        options: of `fused_moe`, `backend` among them.

    Raises:
        WrongResult: the norm of the difference is too large.
    """
    device = experts.gemm1_weights.device
    x, logits = inputs(s, 5 * s.ranks, device)
    got, want = (
        fused_moe(x, experts, (logits, s.routing), **(options | changed)).double()
        for changed in ({}, {"backend": "reference"})
    )
    error = ((got - want).norm() / want.norm()).item()
    if not error < MOST_ERROR:
        raise WrongResult(f"{s.name}: relative error {error} against the reference, {options}")


def check_bf16(
    s: Shape, got: torch.Tensor, x: torch.Tensor, logits: torch.Tensor, w: Weights
) -> None:
    """Compare the first rows of a bf16 layer's output with fp32.

    Raises:
        WrongResult: the norm of the difference is too large.
    """
    some = slice(0, 3 * s.ranks)
    want = plain(x[some], logits[some], w, s.top_k).double()
    difference = (got[some].double() - want).norm()
    if not difference < MOST_RIVAL_ERROR * want.norm():
        raise WrongResult(
            f"{s.name}: bf16 rows of norm {want.norm()} are wrong by {difference}; T = {len(x)}"
        )


def check_w4a16(
    s: Shape, got: torch.Tensor, x: torch.Tensor, logits: torch.Tensor, experts: Experts
) -> None:
    """Compare the first rows of another library's NVFP4 layer with the reference's of bf16 activations.

    Raises:
        WrongResult: the norm of the difference is too large.
    """
    some = slice(0, 5)
    want = fused_moe(
        x[some], experts, (logits[some], s.routing), backend="reference", activation="bf16"
    ).double()
    difference = (got[some].double() - want).norm()
    if not difference < MOST_RIVAL_ERROR * want.norm():
        raise WrongResult(
            f"{s.name}: W4A16 rows of norm {want.norm()} are wrong by {difference}; T = {len(x)}"
        )


OURS: dict[str, dict[str, Any]] = {
    "triton": {"backend": "triton"},
    "triton, batch-invariant": {"backend": "triton", "batch_invariant": True},
    "triton, W4A16": {"backend": "triton", "activation": "bf16"},
    "flashinfer:trtllm": {"backend": "flashinfer:trtllm"},
    "reference": {"backend": "reference"},
}
"""NVFP4 layers by name: the options of `fused_moe`."""
GROUPED_MM, BF16_TRITON = "torch._grouped_mm, bf16", "triton, bf16"
_BYTES_OF_ONE = {"bf16": 2.0, "mxfp8": 33 / 32}
"""Bytes of a weight of the formats in which it is not 1."""


def prepare(case: Case, device: torch.device) -> Prepared:
    """Make a call of one layer for random hidden states and logits."""
    s = _BY_NAME[case.shape]
    x, logits = inputs(s, case.tokens, device)
    slots = experts_of_local_slots(s, logits)
    if case.backend in OURS:
        call, of_one = _ours(s, case.backend, x, logits), NVFP4
    elif case.backend in FORMATS:
        w = bf16_weights_of(s, device)
        call = baseline_layers.prepare_call(case.backend, w, x, logits, s.routing)
        of_one = _BYTES_OF_ONE.get(FORMATS[case.backend], 1.0)
    elif case.backend in rival_layers.LIBRARIES:
        call = _rival(s, case.backend, x, logits)
        of_one = NVFP4 if case.backend == rival_layers.HUMMING else 2.0
    else:
        call, of_one = _bf16(s, case.backend, x, logits), 2.0
    moved = weight_bytes(s, slots, of_one) + 2 * x.nbytes + logits.nbytes
    return Prepared(call, flop(s, slots), moved, capturable=case.backend != "reference")


@functools.lru_cache(maxsize=2)  # with biases, and for the rivals without
def experts_of(s: Shape, device: torch.device) -> Experts:
    """Return the experts of the latest shapes, which their cases share."""
    return random_experts(s, device)


@functools.lru_cache(maxsize=2)
def bf16_weights_of(s: Shape, device: torch.device) -> Weights:
    """Return the bf16 weights of the latest shapes, which their cases share."""
    return random_bf16_weights(s, device)


@functools.lru_cache
def _checked(s: Shape, name: str, device: torch.device) -> None:
    check(s, experts_of(s, device), fast_math=True, **OURS[name])


def _ours(s: Shape, name: str, x: torch.Tensor, logits: torch.Tensor) -> Callable[[], torch.Tensor]:
    options = OURS[name] | {"fast_math": True}
    experts, routing = experts_of(s, x.device), (logits, s.routing)
    explanation = explain_fused_moe(x, experts, routing, **options)
    if (reason := explanation.reason(options["backend"])) is not None:
        raise NotHere(reason)
    if name != "reference":
        _checked(s, name, x.device)
    return lambda: fused_moe(x, experts, routing, **options)


def _bf16(s: Shape, name: str, x: torch.Tensor, logits: torch.Tensor) -> Callable[[], torch.Tensor]:
    w = bf16_weights_of(s, x.device)
    if name == GROUPED_MM:
        slots_here = experts_of_local_slots(s, logits).numel()

        def call() -> torch.Tensor:
            return grouped_mm_layer(x, logits, w, s.top_k, slots_here)

    elif x.device.type != "cuda":
        raise NotHere("its tiles are tuned on a GPU")
    else:
        from . import bf16_layer

        tiles = bf16_layer.tune(x, logits, w, s.top_k, calls=4)

        def call() -> torch.Tensor:
            return bf16_layer.layer(x, logits, w, s.top_k, tiles)

    check_bf16(s, call(), x, logits, w)
    return call


def _rival(
    s: Shape, name: str, x: torch.Tensor, logits: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """Prepare a rival's call; it leaves out biases, and computes plain SwiGLU."""
    swiglu = s.activation is ActivationType.Swiglu
    reason = rival_layers.refusal(
        name, tokens=len(x), swiglu=swiglu, local=s.ranks == 1, device=x.device
    )
    if reason is not None:
        raise NotHere(reason)
    s = replace(s, biased=False)
    with rival_layers.running(name):
        call = _rival_weights(s, name, x.device)(x, logits)
        got = call()
    if name == rival_layers.HUMMING:
        check_w4a16(s, got, x, logits, experts_of(s, x.device))
    else:
        check_bf16(s, got, x, logits, bf16_weights_of(s, x.device))
    return call


@functools.lru_cache(maxsize=2)  # of one shape
def _rival_weights(s: Shape, name: str, device: torch.device) -> rival_layers.Call:
    if name == rival_layers.HUMMING:
        g = torch.Generator(device).manual_seed(0)
        return rival_layers.humming(*random_codes(s, g), s.top_k)
    return rival_layers.quack(bf16_weights_of(s, device), s.top_k)


_BY_NAME = {s.name: s for s in (*SHAPES, SMALL)}
MOE = Operation(
    "moe",
    "tokens",
    Selection(
        tuple(_BY_NAME),
        TOKENS,
        (*OURS, *rival_layers.LIBRARIES, GROUPED_MM, BF16_TRITON, *FORMATS),
    ),
    {
        "cpu": Selection((SMALL.name,), (1, 8), ("reference", GROUPED_MM)),
        "cuda": Selection(
            ("Qwen3-30B-A3B", "DeepSeek-V3, EP 8 of 256", "GPT-OSS"),
            (1, 32, 1024),
            ("triton", "triton, W4A16", "flashinfer:trtllm", GROUPED_MM),
        ),
    },
    GROUPED_MM,
    prepare,
    calls=1,
)
