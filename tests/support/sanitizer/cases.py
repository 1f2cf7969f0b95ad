"""The groups of cases: each launches some kernels of the library once in a small shape.

Inputs are made on the CPU, so that few kernels of PyTorch run beside ours. Results are not looked at:
the tests of each kernel compare them. Sizes are odd where a kernel has an edge: rows and columns that no
tile divides, experts without rows, slots of no local expert.
"""

# SPDX-License-Identifier: Apache-2.0
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, get_args

import dense_cases
import moe_cases
import moe_triton_cases
import producer_cases
import prologue_cases
import reload_cases
import routing_cases
import torch
from masked_cases import call_of, spread
from moe_cases import Shape
from moe_triton_cases import to

from nvfp4_moe import nvfp4_quantize_masked
from nvfp4_moe.cases import inputs
from nvfp4_moe.kernels import instruction_probe
from nvfp4_moe.kernels.decode import decode, decode_to_fragments
from nvfp4_moe.kernels.dense import launch as dense_launch
from nvfp4_moe.kernels.dense.call import KernelCall as DenseCall
from nvfp4_moe.kernels.dense.hopper import CONFIGS as DENSE_CONFIGS
from nvfp4_moe.kernels.dense.hopper import HALVES
from nvfp4_moe.kernels.fused_quantize import launch as fused_launch
from nvfp4_moe.kernels.fused_quantize.call import KernelCall as ProducerCall
from nvfp4_moe.kernels.moe import launch as moe_launch
from nvfp4_moe.kernels.moe import routing
from nvfp4_moe.kernels.moe.call import KernelCall
from nvfp4_moe.kernels.moe.finalize import finalize
from nvfp4_moe.kernels.moe.hopper.config import CONFIGS, RingConfig, refusal
from nvfp4_moe.kernels.moe.hopper.prologue import route_and_place, sort_and_place
from nvfp4_moe.kernels.moe.hopper.rows import in_fragments
from nvfp4_moe.kernels.moe.masked import launch as masked_launch
from nvfp4_moe.kernels.moe.permute import permute
from nvfp4_moe.kernels.moe.row_samples.buffer import RowBuffer, take_rows
from nvfp4_moe.kernels.moe.training.activation_gradient import activation_gradient
from nvfp4_moe.kernels.moe.training.empty_groups import zero_empty_groups
from nvfp4_moe.kernels.moe.training.row_dots import row_dots
from nvfp4_moe.kernels.quantize import launch as quantize_launch
from nvfp4_moe.kernels.tiles import GemmConfig
from nvfp4_moe.kernels.weights.values import weight_values
from nvfp4_moe.reference.activation import IMPLEMENTED, ActivationType
from nvfp4_moe.reference.moe.finalize import FinalizeOrder
from nvfp4_moe.reference.moe.hidden_states import Activations
from nvfp4_moe.reference.quantize import quantize_per_token
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe, SfLayout
from nvfp4_moe.reference.weights.experts import Experts
from nvfp4_moe.reference.weights.prepare import assemble_experts, prepare_experts

from .partly_written import PartlyWritten
from .planted import TOOLS

Run = Callable[[], Any]
PLAIN = (Recipe(), Recipe("exact"), Recipe("exact", None, "cute-dsl"))
FOUR_OVER_SIX = (
    Recipe("fast", NVFP44Over6Config()),
    Recipe("exact", NVFP44Over6Config(256, "MSE")),
    Recipe("exact", NVFP44Over6Config(), "cute-dsl"),
)
SWIGLU, RELU2 = ActivationType.Swiglu, ActivationType.Relu2


@dataclass(frozen=True)
class Group:
    """Cases that run in one process.

    Args:
        kernels: those that the cases launch, by `module.name` below `nvfp4_moe.kernels`.
        cases: makes the cases by name, on a device.
        sm_90: the kernels run on that architecture alone.
        tools: those that could find in it what they cannot find in another group.
    """

    kernels: tuple[str, ...]
    cases: Callable[[str], dict[str, Run]]
    sm_90: bool = False
    tools: tuple[str, ...] = TOOLS

    def refusal(self, arch: int) -> str | None:
        """Return why the group does not run on a GPU of this ARCH, or None."""
        return refusal(arch) if self.sm_90 else None


def normal(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def quantizer(layout: SfLayout, recipes: tuple[Recipe, ...]) -> Callable[[str], dict[str, Run]]:
    """Each recipe, per token and with a global scale, on few and on many rows."""

    def cases(device: str) -> dict[str, Run]:
        found: dict[str, Run] = {}
        for recipe, (m, k) in product(recipes, ((5, 80), (129, 2064), (40, 4096))):
            x, what = inputs.synthetic("heavy", m, k).to(device), f"{recipe} {m} x {k}"
            token, whole = quantize_launch.quantize_per_token, quantize_launch.quantize_global_scale
            base = recipe.base_scale_inv
            found[f"per token {what}"] = functools.partial(token, x, base, recipe, layout)
            if m == 5:
                found[f"global {what}"] = functools.partial(whole, x, 100.0, recipe, layout)
        return found

    return cases


def quantizer_forms(device: str) -> dict[str, Run]:
    """Run the quantizer in the other ways that a layer asks for, and on rows that are read twice."""
    x, linear, swizzled = (
        inputs.synthetic("heavy", 9, 80),
        SfLayout.layout_linear,
        SfLayout.layout_128x4,
    )
    long = inputs.synthetic("heavy", 2, 16384 + 4096 + 16).to(device)
    wide = inputs.synthetic("heavy", 8, 160).to(device)
    index = torch.tensor([0, -1, 2, -1, 4, 5, -1, 7, 8], dtype=torch.int32).to(device)
    place = torch.arange(18, dtype=torch.int32).flip(0).to(device)
    masked, experts = torch.tensor([3, 0, 5, 1]), spread(x, torch.tensor([3, 0, 5, 1]), 128)
    x, fp32 = x.to(device), x.float().to(device)
    e4m3 = x.to(torch.float8_e4m3fn)
    by_row = torch.linspace(1, 900, 9).to(device)
    scale = torch.full((1,), 0.37).to(device)
    per_token, whole = quantize_launch.quantize_per_token, quantize_launch.quantize_global_scale
    plain, four = Recipe(), FOUR_OVER_SIX[0]
    base = plain.base_scale_inv
    one = functools.partial
    found: dict[str, Run] = {
        "row index": one(per_token, x, base, plain, swizzled, row_index=index),
        "out scale": one(per_token, x, base, plain, linear, out_scale=scale),
        "fp32": one(per_token, fp32, base, plain, swizzled),
        "e4m3": one(whole, e4m3, by_row, plain, swizzled, inverse=True),
        "long rows": one(per_token, long, base, plain, swizzled),
        "long rows, 4over6": one(per_token, long, base, four, swizzled),
        "long rows, global": one(whole, long, 3.0, plain, swizzled),
        "strided": one(per_token, wide[:, 1:81], base, plain, linear),
    }
    for recipe in (plain, four):
        for form in (quantize_launch.quantize_to_values, quantize_launch.quantize_to_fragments):
            found[f"{form.__name__} {recipe}"] = one(form, x, recipe, per_token=True)
        to_places = quantize_launch.quantize_to_fragments
        found[f"places {recipe}"] = one(to_places, x, recipe, per_token=True, place=place)
        static = one(to_places, fp32, recipe, per_token=False, row_index=index)
        found[f"static {recipe}"] = static
        found[f"masked {recipe}"] = one(
            nvfp4_quantize_masked, to(device, experts), masked.to(device), base, swizzled,
            per_token_activation=True, nvfp4_4over6=recipe.four_over_six,
            fast_math=True, backend="triton",
        )  # fmt: skip
    return found


def quantizer_ways(device: str) -> dict[str, Run]:
    """By one program, by several, read twice, and in parts, whatever the shape would be given."""
    x = inputs.synthetic("heavy", 5, 7 * 16).to(device)
    configs = (
        quantize_launch.LaunchConfig(2, 8, 0, 1, 1),
        quantize_launch.LaunchConfig(1, 2, 8, 4, 1),
        quantize_launch.LaunchConfig(4, 4, 4, 1, 1),
        quantize_launch.LaunchConfig(1, 4, 0, 1, 1, 2),
    )
    found: dict[str, Run] = {}
    for config, recipe, layout in product(
        configs, (PLAIN[0], FOUR_OVER_SIX[0]), (SfLayout.layout_linear, SfLayout.layout_128x4)
    ):
        out = quantize_launch.Outputs(*quantize_launch.allocate(x, int(layout)))
        found[f"{config} {recipe} {layout.name}"] = functools.partial(
            quantize_launch._launch, x, out, 0, None, recipe.base_scale_inv, recipe.code,
            int(layout), config=config,
        )  # fmt: skip
    return found


def fused_quantizers(device: str) -> dict[str, Run]:
    found: dict[str, Run] = {}
    layouts = (SfLayout.layout_linear, SfLayout.layout_128x4)
    for (m, k), layout, recipe, kind in product(
        ((9, 80), (3, 2688)), layouts, producer_cases.RECIPES[::2], ("silu", "norm", "add norm")
    ):
        x = producer_cases.matrix(m, k * 2 if kind == "silu" else k).to(device)
        weight = None if kind == "silu" else producer_cases.matrix(1, k)[0].to(device)
        residual = producer_cases.matrix(m, k, seed=9).to(device) if kind == "add norm" else None
        call = ProducerCall(x, weight, 1e-5, recipe.base_scale_inv, recipe, layout)
        for fused in (True, False) if layout == layouts[0] else (True,):
            what = f"{kind} {m} x {k} {layout.name} {recipe} in {1 if fused else 2}"
            found[what] = functools.partial(fused_launch.fused_quantize, call, residual, fused)
    return found


def routings(device: str) -> dict[str, Run]:
    """Every method, few and many experts, groups, and the GPU's own functions."""
    found: dict[str, Run] = {}
    for rule, experts in [(r, 40) for r in routing_cases.VARIANTS if r.top_k > 1] + [
        (replace(routing_cases.GROUPED, top_k=8), 256),
        (routing_cases.Routing(routing_cases.M.Renormalize, 8), 512),
        (routing_cases.Routing(routing_cases.M.Default, 8, functions="hopper"), 128),
        (routing_cases.Routing(routing_cases.M.DeepSeekV3, 8, functions="hopper"), 128),
    ]:
        logits = routing_cases.logits_of(5, experts).to(device)
        bias = routing_cases.bias_of(experts).to(device) if rule.method.biased else None
        name = f"{routing_cases.name(rule)} of {experts}, {rule.functions}"
        found[name] = functools.partial(routing.route, logits, rule, bias)
    return found


def permutations(device: str) -> dict[str, Run]:
    """In one launch and in three; ids of which some are of no local expert."""
    return {
        f"{tokens} tokens, tile {tile}": functools.partial(
            permute, prologue_cases.ids_of(tokens, 4, 9, 3).to(device), 9, 3, tile
        )
        for tokens, tile in ((1, 8), (33, 16), (1030, 64))
    }


def prologues(device: str) -> dict[str, Run]:
    found: dict[str, Run] = {}
    recipes: tuple[Recipe | None, ...] = (*prologue_cases.RECIPES, None)
    for columns, tokens, recipe in product((64, 2880, 4224), (3, 16), recipes):
        x = normal(tokens, columns).bfloat16()
        ids = prologue_cases.ids_of(tokens, 4, 5, 2).to(device)
        given = {"bf16": Activations(x)}
        if recipe is None:
            q = quantize_per_token(x, 1 / 2688, Recipe())
            given["codes"] = Activations(q.codes, q.block_scales, q.per_token_scale)
            given["static codes"] = Activations(q.codes, q.block_scales)
        for name, activations in given.items():
            found[f"{name} {tokens} x {columns} {recipe}"] = functools.partial(
                sort_and_place, to(device, activations), ids, 5, 2, 8, recipe
            )
    for how in prologue_cases.ROUTINGS:
        for tokens, dtype in ((1, torch.float32), (3, torch.bfloat16), (16, torch.float32)):
            logits = prologue_cases.logits_of(tokens, 32, dtype).to(device)
            states = to(device, Activations(normal(tokens, 2880).bfloat16()))
            name = f"{routing_cases.name(how)} {tokens} {dtype} {how.functions}"
            found[name] = functools.partial(
                route_and_place, states, routing.router_of(logits, how), 7, 3, 8, Recipe()
            )
    return found


def decoders(device: str) -> dict[str, Run]:
    """Decode each layout, some rows, and rows to the places of slots; copy rows of bf16 likewise."""
    q = {
        layout: to(device, quantize_per_token(normal(37, 208).bfloat16(), 1.0, Recipe(), layout))
        for layout in SfLayout
    }
    found: dict[str, Run] = {}
    for layout, one in q.items():
        for operand in (False, True):
            found[f"{layout.name} operand {operand}"] = functools.partial(
                decode, one.codes, one.block_scales, layout, columns=256, operand=operand
            )
    row = torch.arange(37, dtype=torch.int32)
    index = torch.where(row % 3 == 0, row, -1).to(device)
    place = torch.arange(74, dtype=torch.int32).flip(0).to(device)
    linear, x = q[SfLayout.layout_linear], normal(37, 208).bfloat16().to(device)
    fragments = functools.partial(
        decode_to_fragments, linear.codes, linear.block_scales, linear.per_token_scale
    )
    return found | {
        "fragments": fragments,
        "fragments, row index": functools.partial(fragments, row_index=index),
        "fragments, places": functools.partial(fragments, place=place),
        "bf16": functools.partial(in_fragments, x),
        "bf16, row index": functools.partial(in_fragments, x, None, index),
        "bf16, places": functools.partial(in_fragments, x, place),
    }


def some_bytes(*size: int, low: int = 0, high: int = 256) -> torch.Tensor:
    g = torch.Generator().manual_seed(sum(size))
    return torch.randint(low, high, size, dtype=torch.uint8, generator=g)


def matrix(*size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random codes [..., K/2] and block scales [..., K/16] of matrices of this size."""
    *outer, k = size
    return some_bytes(*outer, k // 2), some_bytes(*outer, k // 16, low=0x28, high=0x40)


@functools.cache
def layer_case(
    shape: Shape, kind: ActivationType, mode: str, biased: bool = False
) -> moe_cases.Case:
    """Return a layer and its input of random codes; mode: "per-token", "static" or "bf16"."""
    e, h, i, n = shape.num_local, shape.hidden, shape.intermediate, shape.tokens
    rows, one = i * (2 if kind.gated else 1), torch.full((e,), 0.1, device="cpu")
    options: dict[str, Any] = {}
    if biased:
        options = {"w13_bias": normal(e, rows), "w2_bias": normal(e, h), "clamp_limit": 0.7}
    experts = assemble_experts(*matrix(e, rows, h), one, *matrix(e, h, i), one, kind, **options)
    x = normal(n, experts.padded_hidden_size).bfloat16()
    activations = Activations(x)
    if mode != "bf16":
        token = normal(n).abs() if mode == "per-token" else None
        activations = Activations(*matrix(*x.shape), token)
    ids, weights = moe_cases.routing_of(shape)
    return moe_cases.Case(activations, experts, ids, weights, x[:, :h], x, x)


def layer(
    shape: Shape, kind: ActivationType, mode: str, device: str, config: Any, *, biased: bool = False
) -> Run:
    """Return the launch of a layer whose tensors are on the device already."""
    case = layer_case(shape, kind, mode, biased)
    call = KernelCall(
        case.activations, case.experts, shape.experts, local_expert_offset=shape.offset
    )
    on_device = [to(device, t) for t in (call, case.ids, case.weights)]
    return functools.partial(moe_launch.fused_moe, *on_device, config=config)


def grouped(config: RingConfig | GemmConfig) -> Callable[[str], dict[str, Run]]:
    """A layer in one configuration: K has more steps than stages, and the last tiles are narrow.

    A quantizer between the GEMMs also reads the rows of slots of no local expert, which nobody writes.
    Two cases have such slots, and run in memory of NaN.
    """
    tokens = config.bn * 3 + 3  # 1.2 tiles an expert
    long, odd = Shape(tokens, 2000, 272, 5, 2), Shape(tokens, 464, 464, 5, 2)
    some = replace(odd, offset=1, local=3)

    def cases(device: str) -> dict[str, Run]:
        return {
            "W4A4": layer(long, SWIGLU, "per-token", device, config),
            "W4A4, biased": layer(odd, SWIGLU, "per-token", device, config, biased=True),
            "W4A16": layer(long, RELU2, "bf16", device, config),
            "static": layer(odd, SWIGLU, "static", device, config),
            **{
                f"{mode}, 3 of 5 experts": PartlyWritten(layer(some, SWIGLU, mode, device, config))
                for mode in ("per-token", "static")
            },
        }

    return cases


def activations(config: RingConfig | GemmConfig) -> Callable[[str], dict[str, Run]]:
    """Every activation in the first GEMM."""

    def cases(device: str) -> dict[str, Run]:
        shape = Shape(5, 128, 128, 3, 2)
        return {kind.name: layer(shape, kind, "per-token", device, config) for kind in IMPLEMENTED}

    return cases


def masked(config: RingConfig | GemmConfig) -> Callable[[str], dict[str, Run]]:
    def cases(device: str) -> dict[str, Run]:
        rows = torch.tensor([3, 0, 5, 1])
        found: dict[str, Run] = {}
        for mode, kind, options in (
            ("per-token", SWIGLU, {}),
            ("per-token", SWIGLU, {"quantize": "per-token"}),
            ("static", RELU2, {}),
            ("bf16", SWIGLU, {}),
        ):
            case = layer_case(Shape(9, 272, 48, 4, 1), kind, mode)
            call = to(device, call_of(case, rows, 5, **options))
            found[f"{mode} {kind.name} {options}"] = functools.partial(
                masked_launch.fused_moe_masked, call, config=config
            )
        return found

    return cases


def finalizers(device: str) -> dict[str, Run]:
    found: dict[str, Run] = {}
    orders = get_args(FinalizeOrder)
    for tokens, order, dtype in product((3, 40), orders, (torch.bfloat16, torch.float32)):
        rows = normal(tokens * 4, 320).bfloat16().to(device)
        permuted = torch.randperm(tokens * 4, generator=torch.Generator().manual_seed(1)).int()
        permuted[::5] = -1
        weights = normal(tokens, 4).bfloat16().to(device)
        output = torch.empty(tokens, 300, dtype=dtype, device=device)
        found[f"{tokens} tokens {order} {dtype}"] = functools.partial(
            finalize, rows, permuted.to(device), weights, output, order
        )
    return found


@functools.cache
def prepared(kind: ActivationType) -> Experts:
    """Return experts of a size that is padded."""
    return prepare_experts(*reload_cases.weights(kind, 0), kind)


def reloads(device: str) -> dict[str, Run]:
    """New weights into a layer: maxima given and not, padded sizes, each recipe; and their values."""
    found: dict[str, Run] = {}
    for kind, recipe, known in product((SWIGLU, RELU2), reload_cases.RECIPES, (False, True)):
        w13, w2 = reload_cases.weights(kind, 0)
        experts = reload_cases.moved(prepared(kind), device)
        maxima = [w.abs().amax((1, 2)).float().to(device) for w in (w13, w2)]
        amax = (maxima[0], maxima[1]) if known else None
        load = functools.partial(experts.load_, recipe=recipe, amax=amax, backend="triton")
        name = f"{kind.name} {recipe} maxima {'given' if known else 'found'}"
        found[name] = functools.partial(load, w13.to(device), w2.to(device))
    w13, w2 = reload_cases.weights(SWIGLU, 0, dtype=torch.float16)
    strided = torch.stack((w13, w13), 2).to(device)[:, :, 0]
    experts = reload_cases.moved(prepared(SWIGLU), device)
    load = functools.partial(experts.load_, strided, w2.to(device), backend="triton")
    places = torch.arange(reload_cases.HIDDEN, dtype=torch.int32).flip(0).to(device)
    codes, scales = experts.gemm2_weights, experts.gemm2_weights_scale.view(torch.uint8)
    values = functools.partial(weight_values, codes, scales, places, reload_cases.INTERMEDIATE)
    return found | {"fp16, strided": load, "values": values}


def training(device: str) -> dict[str, Run]:
    """The gradient of each activation, the dots of rows, and the experts without rows."""
    n, i, e = 7, 272, 3

    def on(*tensors: torch.Tensor) -> list[torch.Tensor]:
        return [t.to(device) for t in tensors]

    expert, token = on(torch.arange(n) % e, torch.arange(n) // 2)
    factor, of_token, of_experts = on(normal(n), normal(n), normal(e).abs() + 0.5)
    found: dict[str, Run] = {}
    for kind in IMPLEMENTED:
        m = 2 * i if kind.gated else i
        sums, d, bias = on(normal(n, m).bfloat16(), normal(n, i).bfloat16(), normal(e, m))
        scale = torch.ones(e, m // i, dtype=torch.float32, device=device)
        parameters = (None, None, of_experts if kind is SWIGLU else None)
        gradient = functools.partial(activation_gradient, sums)
        found[f"{kind.name} without"] = functools.partial(
            gradient, None, None, scale, expert, kind, (None, None, None), d, factor, None, None
        )
        found[f"{kind.name} with"] = functools.partial(
            gradient, of_token, bias, scale, expert, kind, parameters, d, factor, scale, of_token
        )
    grad, sums, bias = on(normal(4, i).bfloat16(), normal(n, i).bfloat16(), normal(e, i))
    dots = functools.partial(row_dots, grad, token, sums)
    ends = torch.tensor([3, 3, 7], dtype=torch.int32, device=device)
    groups = torch.empty(e, 272, 80, dtype=torch.bfloat16, device=device)
    return found | {
        "dots": functools.partial(dots, of_token, bias, of_experts, expert),
        "dots, plain": functools.partial(dots, None, None, of_experts, expert),
        "empty groups": functools.partial(zero_empty_groups, groups, ends),
    }


DENSE = (
    GemmConfig(64, 16, 128, 4, 4),
    GemmConfig(128, 16, 256, 3, 4),
    GemmConfig(64, 32, 128, 4, 4),
    GemmConfig(64, 64, 128, 4, 4),
    GemmConfig(128, 64, 128, 3, 8, registers=128),
    GemmConfig(256, 128, 64, 4, 8, decoded=True),
)
"""Every configuration that `dense_config` chooses on sm_90."""


def dense(
    configs: Sequence[RingConfig | GemmConfig],
    steps: int,
    *more: tuple[int, int, int],
) -> Callable[[str], dict[str, Run]]:
    """Products in these configurations; K is a multiple of `steps`. `more` are other sizes."""

    def cases(device: str) -> dict[str, Run]:
        found: dict[str, Run] = {}
        for config, use_8x4, (m, n, k) in product(
            configs, (False, True), ((3, 40, 3 * steps), (0, 130, 2048 + steps), *more)
        ):
            m = m or config.bn + 3  # a tile, and rows of another
            case = dense_cases.coarse(m, n, k, use_8x4=use_8x4).to(device)
            call = DenseCall(
                case.a, case.b_rows, case.a_scales, case.b_scales, case.alpha, case.use_8x4
            )
            out = torch.empty(m, n, dtype=torch.bfloat16, device=device)
            found[f"{config} {m} x {n} x {k} 8x4 {use_8x4}"] = functools.partial(
                dense_launch.mm_fp4, call, out, config
            )
        return found

    return cases


def rows_of_the_canary(device: str) -> dict[str, Run]:
    x, weights = normal(5, 272).bfloat16().to(device), normal(5, 3).to(device)
    ids = torch.arange(15, dtype=torch.int32).view(5, 3).to(device)
    buffer = RowBuffer.like(4, x, ids, weights, x)
    take = functools.partial(take_rows, buffer, (x, ids, weights, x), 3, 1)
    return {f"call {i}": take for i in range(3)}


def probes(device: str) -> dict[str, Run]:
    """The instructions that `doctor` and the routing measure."""
    x = normal(2048).to(device)
    return {
        "rcp": functools.partial(instruction_probe.measure_rcp_delta, device),
        "ex2": functools.partial(instruction_probe.apply_instruction, "ex2.approx.ftz.f32", x),
        "tanh": functools.partial(instruction_probe.apply_instruction, "tanh.approx.f32", x),
    }


def tools_of(
    config: RingConfig | GemmConfig, configs: Sequence[RingConfig | GemmConfig]
) -> tuple[str, ...]:
    """Return the tools of a layer in one of these configurations: initcheck in the first and the last.

    They have the narrowest and the widest tiles. The others read the same rows and columns.
    """
    return TOOLS if config in (configs[0], configs[-1]) else _SYNC


_QUANTIZER = ("quantize.kernel.quantize_kernel",)
_PERMUTE = ("moe.permute.permute_kernel",)
_FINALIZE = ("moe.finalize.finalize_kernel",)
_DECODE = ("jit.decode.decode_kernel",)
_RING = ("moe.hopper.grouped_gemm.expert_gemm_kernel", *_FINALIZE)
_DENSE_RING = ("moe.hopper.dense_gemm.dense_gemm_kernel", *_DECODE)
_CLEAR = "moe.hopper.dense_gemm.clear_kernel"
_DOT = ("moe.grouped_gemm.expert_gemm_kernel", *_PERMUTE, *_FINALIZE, *_QUANTIZER)
_MASKED = ("moe.masked.rows.masked_rows_kernel", "moe.masked.rows.copy_rows_kernel")
_ADDRESSES = ("memcheck",)
"""The kernels have the barriers and the reads of another group, and other addresses or formulas."""
_SYNC = tuple(tool for tool in TOOLS if tool != "initcheck")
_SORTS = "count_kernel", "before_kernel", "place_kernel"

GROUPS: dict[str, Group] = {
    "canary": Group(("moe.row_samples.kernel.take_kernel",), rows_of_the_canary),
    "probes": Group(
        ("instruction_probe._rcp_delta_kernel", "instruction_probe.instruction_kernel"), probes
    ),
    **{
        f"quantizer {layout.name.removeprefix('layout_')}": Group(
            _QUANTIZER, quantizer(layout, PLAIN),
            tools=TOOLS if layout == SfLayout.layout_128x4 else _ADDRESSES,
        )
        for layout in SfLayout
    },
    "quantizer 4over6": Group(_QUANTIZER, quantizer(SfLayout.layout_128x4, FOUR_OVER_SIX)),
    "quantizer forms": Group(_QUANTIZER, quantizer_forms),
    "quantizer ways": Group(_QUANTIZER, quantizer_ways),
    "fused quantizers": Group(
        ("fused_quantize.kernel.producer_kernel", *_QUANTIZER), fused_quantizers
    ),
    "routing": Group(("moe.routing.route_kernel",), routings),
    "permute": Group((*_PERMUTE, *(f"moe.permute.{name}" for name in _SORTS)), permutations),
    "prologue": Group(("moe.hopper.prologue.prologue_kernel",), prologues, sm_90=True),
    "decode": Group((*_DECODE, "moe.hopper.rows.rows_kernel"), decoders),
    **{
        f"ring {c.bn}": Group(_RING, grouped(c), sm_90=True, tools=tools_of(c, CONFIGS))
        for c in CONFIGS
    },
    "ring activations": Group(_RING, activations(CONFIGS[1]), sm_90=True, tools=_ADDRESSES),
    "ring masked": Group((*_RING[:1], *_MASKED), masked(CONFIGS[1]), sm_90=True),
    **{
        f"tl.dot {c.bm} x {c.bn} x {c.bk}": Group(
            (*_DOT, *_DECODE), grouped(c), tools=tools_of(c, moe_triton_cases.CONFIGS)
        )
        for c in moe_triton_cases.CONFIGS
    },
    "tl.dot activations": Group(_DOT, activations(moe_triton_cases.SMALL), tools=_ADDRESSES),
    "tl.dot masked": Group(
        (*_DOT[:1], *_MASKED, *_QUANTIZER), masked(moe_triton_cases.SMALL)
    ),
    "finalize": Group(_FINALIZE, finalizers),
    "reload": Group(
        (
            "weights.kernel.amax_kernel",
            "weights.kernel.load_weights_kernel",
            "weights.values.weight_values_kernel",
        ),
        reloads,
    ),
    "training": Group(
        (
            "moe.training.activation_gradient.activation_gradient_kernel",
            "moe.training.row_dots.row_dots_kernel",
            "moe.training.empty_groups.zero_empty_groups_kernel",
        ),
        training,
    ),
    "dense": Group(("dense.kernel.dense_gemm_kernel", *_DECODE), dense(DENSE, 16)),
    "dense ring few rows": Group(
        (*_DENSE_RING, _CLEAR), dense(DENSE_CONFIGS[:3], 64, (3, 36867, 64)), sm_90=True
    ),
    "dense ring half tiles": Group(_DENSE_RING, dense(HALVES, 64), sm_90=True),
    "dense ring many rows": Group(_DENSE_RING, dense(DENSE_CONFIGS[3:], 64), sm_90=True),
}  # fmt: skip
"""Every group by its name, in the order of the table and of the run."""
