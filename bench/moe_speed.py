"""Speed of the fused mixture of experts on this GPU: `python bench/moe_speed.py [--json FILE]`.

Whole calls, bf16 hidden states and router logits to bf16 output, inside CUDA graphs. Beside them, in
the same run: the layer in bf16, made of `torch._grouped_mm` and as Triton kernels whose tiles are tuned
for each cell (`bf16_layer.py`), a device copy and a cuBLAS product. "Once" is a tuned bf16 Triton layer
without routing that was measured once, elsewhere, on an H100. The floor is the time of reading the
codes and block scales of the experts that were touched, at the copy's rate. "Workspace" is the peak of
what a call allocates beyond its output, as a share of `workspace_bound`, without weights decoded ahead,
which have a column of their own. Every shape's output is first compared with the reference at a few
tokens, every bf16 Triton layer's with fp32. `--shape` and `--tokens` measure a part, `--tune` autotunes
ours before; what was tuned here earlier is used in any case.
"""

# SPDX-License-Identifier: Apache-2.0
import argparse
import statistics
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path

import benchmark_json
import bf16_layer
import torch
from bf16_layer import Weights
from measure import arguments, copy_rate, cublas_rate, peak_bytes, samples, save, start

import nvfp4_moe
from nvfp4_moe import ActivationType, Experts, Routing, RoutingMethodType
from nvfp4_moe.kernels.moe import launch
from nvfp4_moe.kernels.moe.tile_table import gemm_config, local_slots, ring_serves
from nvfp4_moe.kernels.triton_target import arch, native_mma

DEVICE = torch.device("cuda")
TOKENS = (1, 8, 32, 128, 1024, 4096, 16384)


@dataclass(frozen=True)
class Shape:
    name: str
    hidden: int
    intermediate: int
    experts: int  # local, the first of `routed`
    top_k: int
    activation: ActivationType = ActivationType.Swiglu
    tuned_once: tuple[int, ...] = ()  # us of a tuned bf16 Triton MoE on an H100, for TOKENS
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
    def parameters(self) -> dict[str, float]:
        return {"alpha": 1.702, "beta": 1.0, "clamp_limit": 7.0} if self.biased else {}

    @property
    def weights_key(self) -> tuple[object, ...]:
        """The fields on which random weights depend: shapes with equal keys share their weights."""
        return (self.hidden, self.intermediate, self.experts, self.activation, self.biased)


SHAPES = (
    Shape("Qwen3-30B-A3B", 2048, 768, 128, 8, tuned_once=(40, 170, 374, 426, 511, 857, 2734)),
    Shape("DeepSeek-V3 rank", 7168, 2048, 32, 8, tuned_once=(250, 0, 942, 1015, 1703, 5615)),
    Shape("DeepSeek-V3, EP 8 of 256", 7168, 2048, 32, 8, ranks=8),
    Shape("Nemotron-3-Super latent", 1024, 2688, 512, 22, ActivationType.Relu2),
    Shape("GPT-OSS", 2880, 2880, 128, 4, biased=True),
)
LAYERS = {
    "us": "triton",
    "invariant_us": "triton, batch-invariant",
    "w4a16_us": "triton, W4A16",
    "grouped_mm_us": "torch._grouped_mm, bf16",
    "bf16_triton_us": "triton, bf16",
}
"""The layers that are measured here, by the names of their times; `test_speed.py` has others, too."""
COLUMNS = (
    ("T", 6), ("local slots", 11), ("ours", 9), ("of floor", 9), ("TFLOP/s", 8), ("invariant", 10),
    ("W4A16", 9), ("workspace", 10), ("decoded MiB", 12), ("grouped_mm", 11), ("speedup", 8),
    ("bf16 Triton", 12), ("speedup", 8), ("once", 7), ("speedup", 8),
)  # fmt: skip


def random_experts(s: Shape) -> Experts:
    """Random codes under scales of ordinary size: what they are does not change the speed."""
    g = torch.Generator(DEVICE).manual_seed(0)

    def codes(*size: int) -> torch.Tensor:
        return torch.randint(0, 256, size, dtype=torch.uint8, device=DEVICE, generator=g)

    def scales(*size: int) -> torch.Tensor:
        return torch.randint(0x28, 0x40, size, dtype=torch.uint8, device=DEVICE, generator=g)

    def bias(*size: int) -> torch.Tensor | None:
        return torch.randn(size, device=DEVICE, generator=g) if s.biased else None

    e, h, i = s.experts, s.hidden, s.intermediate
    return nvfp4_moe.assemble_experts(
        codes(e, s.rows, h // 2),
        scales(e, s.rows, h // 16),
        torch.full((e,), 0.25 * h**-0.5, device=DEVICE),
        codes(e, h, i // 2),
        scales(e, h, i // 16),
        torch.full((e,), 0.25 * i**-0.5, device=DEVICE),
        s.activation,
        w13_bias=bias(e, s.rows),
        w2_bias=bias(e, h),
        **s.parameters,  # type: ignore[arg-type]
    )


def bf16_weights(s: Shape) -> Weights:
    """Random weights of the bf16 layers."""
    g = torch.Generator(DEVICE).manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> torch.Tensor:
        t = torch.empty(size, dtype=torch.bfloat16, device=DEVICE)
        return t.normal_(0, scale, generator=g)

    e, h, i = s.experts, s.hidden, s.intermediate
    w13, w2 = normal(e, s.rows, h, scale=1 / 64), normal(e, h, i, scale=1 / 64)
    if not s.biased:
        return Weights(w13, w2, s.activation)
    p = s.parameters
    return Weights(
        w13,
        w2,
        s.activation,
        normal(e, s.rows),
        normal(e, h),
        p["alpha"],
        p["beta"],
        p["clamp_limit"],
    )


def inputs(s: Shape, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(x [T, H] bf16, logits [T, routed experts] fp32); the first token has a local slot."""
    g = torch.Generator(DEVICE).manual_seed(tokens)
    x = torch.randn(tokens, s.hidden, device=DEVICE, generator=g).bfloat16()
    logits = torch.randn(tokens, s.routed, device=DEVICE, generator=g)
    if s.ranks > 1:
        logits[0, 0] = 10.0
    return x, logits


def work(s: Shape, slots: torch.Tensor) -> dict[str, float]:
    """Return the FLOPs of a call, and the bytes of the codes and block scales that it reads once.

    Args:
        slots: `experts_of_local_slots`.
    """
    matrices = 3 if s.activation.gated else 2
    weights = matrices * s.hidden * s.intermediate
    return {
        "flop": 2 * weights * slots.numel(),
        "bytes": weights * slots.unique().numel() * 9 / 16,
    }


def experts_of_local_slots(s: Shape, logits: torch.Tensor) -> torch.Tensor:
    """The expert of each local slot, int64."""
    ids = logits.topk(s.top_k, dim=1).indices
    return ids[ids < s.experts]


def grouped_mm_layer(
    x: torch.Tensor, logits: torch.Tensor, w: Weights, top_k: int, slots_here: int
) -> torch.Tensor:
    """The bf16 layer of torch's own grouped product, routing included.

    `slots_here` is the number of local slots, which a real layer would not know without waiting.
    """
    experts = w.w13.shape[0]
    best, ids = logits.topk(top_k, dim=1)
    weights = best.softmax(1)
    order = ids.flatten().argsort()[:slots_here]
    counts = torch.zeros(logits.shape[1], dtype=torch.int32, device=x.device)
    counts.scatter_add_(0, ids.flatten(), torch.ones_like(ids.flatten(), dtype=torch.int32))
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
        out = torch.zeros(x.shape, device=x.device)
        return out.index_add_(0, order // top_k, y * weights.flatten()[order, None]).bfloat16()
    back = torch.empty_like(y)
    back[order] = y
    return (back.unflatten(0, (-1, top_k)) * weights[..., None]).sum(1).bfloat16()


def check(s: Shape, experts: Experts, routing: Routing) -> None:
    """Ours against the reference, at five tokens (of each rank's)."""
    x = torch.randn(5 * s.ranks, s.hidden, device=DEVICE).bfloat16()
    logits = torch.randn(5 * s.ranks, s.routed, device=DEVICE)
    got, want = (
        nvfp4_moe.fused_moe(x, experts, (logits, routing), backend=b).double()
        for b in ("triton", "reference")
    )
    error = ((got - want).norm() / want.norm()).item()
    if not error < 2e-3:
        raise SystemExit(f"{s.name}: relative error {error} against the reference")


def check_bf16(s: Shape, got: torch.Tensor, x: torch.Tensor, logits: torch.Tensor, w: Weights):
    """The first rows of a bf16 layer's output against fp32."""
    some = slice(0, 3 * s.ranks)
    want = bf16_layer.plain(x[some], logits[some], w, s.top_k).double()
    difference = (got[some].double() - want).norm()
    if not difference < 1e-2 * want.norm():
        raise SystemExit(
            f"{s.name}: bf16 rows of norm {want.norm()} are wrong by {difference}; T = {len(x)}"
        )


def workspace_bound(s: Shape, tokens: int, tile: int) -> int:
    """Bytes: a tile's padding for each expert, and of each slot what the two GEMMs read and write.

    bf16 [rows] and [I], the second's codes, block scales and token scale, and bf16 [H].
    """
    slots = tokens * s.top_k + s.experts * (tile - 1)
    i = s.intermediate
    return slots * (2 * s.rows + 2 * i + i // 2 + i // 16 + 4 + 2 * s.hidden)


def workspace(s: Shape, tokens: int, experts: Experts, call: Callable[[], torch.Tensor]) -> dict:
    """Peak bytes of a call, beyond its output, against the bound; weights decoded ahead apart."""
    matrices = (experts.gemm1_weights, experts.gemm2_weights)
    configs = [
        gemm_config(
            local_slots(tokens * s.top_k, experts, s.routed),
            s.experts,
            w.shape[2] * 2,
            native=native_mma(arch(w.device)),
        )
        for w in matrices
    ]
    decoded = []
    for w, config in zip(matrices, configs, strict=True):
        expert = w[0].numel() * 4  # bf16 of two codes a byte
        at_once = max(1, min(s.experts, launch._DECODED_BYTES // expert))
        decoded.append(at_once * expert if config.decoded and not ring_serves(experts) else 0)
    # Everything that the call keeps is allocated during the second GEMM, which has the peak.
    used = peak_bytes(call) - decoded[1]
    bound = workspace_bound(s, tokens, configs[0].bn)
    return {
        "workspace_bytes": used,
        "workspace_bound_bytes": bound,
        "workspace": used / bound,
        "decoded_bytes": max(decoded),
    }


def measure(s: Shape, tokens: int, experts: Experts, w: Weights, copy: float) -> dict:
    routing = Routing(RoutingMethodType.Renormalize, s.top_k)
    x, logits = inputs(s, tokens)
    calls = 10 if tokens < 1024 else 2
    slots = experts_of_local_slots(s, logits)
    slots_here = slots.numel()

    def ours(**options) -> torch.Tensor:
        return nvfp4_moe.fused_moe(
            x, experts, (logits, routing), backend="triton", fast_math=True, **options
        )

    replays: dict[str, list[float]] = {}

    def us(name: str, call: Callable[[], object]) -> None:
        replays[name] = samples(call, calls, 5)
        cell[name] = statistics.median(replays[name])

    done = work(s, slots)
    cell = {"shape": s.name, "tokens": tokens, "local_slots": slots_here, "samples_us": replays}
    us("us", ours)
    cell["floor_us"] = done["bytes"] / copy / 1e3
    us("invariant_us", lambda: ours(batch_invariant=True))
    us("w4a16_us", lambda: ours(activation="bf16"))
    us("grouped_mm_us", lambda: grouped_mm_layer(x, logits, w, s.top_k, slots_here))
    tiles = bf16_layer.tune(x, logits, w, s.top_k, calls)
    check_bf16(s, bf16_layer.layer(x, logits, w, s.top_k, tiles), x, logits, w)
    us("bf16_triton_us", lambda: bf16_layer.layer(x, logits, w, s.top_k, tiles))
    cell["bf16_triton_tiles"] = [astuple(t) for t in tiles]
    cell["tuned_once_us"] = dict(zip(TOKENS, s.tuned_once, strict=False)).get(tokens) or None
    cell["tflops"] = done["flop"] / cell["us"] / 1e6
    return cell | done | workspace(s, tokens, experts, ours)


def heading() -> str:
    return "".join(f"{name:>{width}}" for name, width in COLUMNS)


def line(c: dict) -> str:
    """A cell under `heading`."""
    once = c["tuned_once_us"]
    values = (
        c["tokens"], c["local_slots"], f"{c['us']:.0f}", f"{c['floor_us'] / c['us']:.2f}",
        f"{c['tflops']:.0f}", f"{c['invariant_us']:.0f}", f"{c['w4a16_us']:.0f}",
        f"{c['workspace']:.2f}", f"{c['decoded_bytes'] / 2**20:.0f}",
        f"{c['grouped_mm_us']:.0f}", f"{c['grouped_mm_us'] / c['us']:.2f}",
        f"{c['bf16_triton_us']:.0f}", f"{c['bf16_triton_us'] / c['us']:.2f}",
        once or "-", f"{once / c['us']:.2f}" if once else "-",
    )  # fmt: skip
    return "".join(f"{v:>{width}}" for v, (_, width) in zip(values, COLUMNS, strict=True))


def benchmarks(cells: list[dict], rates: dict[str, float]) -> list[dict]:
    """Return the times of all layers as pytest-benchmark keeps them.

    Args:
        rates: `copy_gb_s` and `cublas_tflops` of the run.
    """
    return [
        benchmark_json.benchmark(
            c["shape"],
            c["tokens"],
            layer,
            [us / 1e6 for us in c["samples_us"][name]],
            case_info(c["shape"], c["tokens"], layer)
            | {n: c[n] for n in ("flop", "bytes")}
            | rates,
        )
        for c in cells
        for name, layer in LAYERS.items()
    ]


def case_info(shape: str, tokens: int, layer: str) -> dict[str, object]:
    """Return the facts by which `plots.py` finds a benchmark."""
    return {"shape": shape, "tokens": tokens, "layer": layer}


def count(text: str) -> int:
    """An argument that is an integer from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"it is {text!r}; it must be an integer from 1")
    return int(text)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shape", choices=[s.name for s in SHAPES], help="this one only")
    parser.add_argument("--tokens", type=count, help="this number only")
    parser.add_argument(
        "--benchmark-json",
        type=Path,
        help="write every time as pytest-benchmark does, for plots.py",
    )
    parser.add_argument("--tune", action="store_true", help="autotune ours before")
    options, where = start(parser)
    if options.benchmark_json:
        benchmark_json.check_installed()
    copy, cublas = copy_rate(), cublas_rate()
    print(f"device copy {copy:.0f} GB/s, cuBLAS bf16 {cublas:.0f} TFLOP/s")
    cells: list[dict] = []
    key, experts, w = None, None, None
    for s in SHAPES:
        if options.shape not in (None, s.name):
            continue
        if s.weights_key != key:
            del experts, w
            key, experts, w = s.weights_key, random_experts(s), bf16_weights(s)
        check(s, experts, Routing(RoutingMethodType.Renormalize, s.top_k))
        counts = [options.tokens] if options.tokens else TOKENS
        if options.tune:
            for tuning in nvfp4_moe.autotune_fused_moe(
                experts, counts, s.top_k, num_experts=s.routed
            ):
                print(f"\n{s.name}, {tuning}", flush=True)
        ranks = f" of {s.routed}" if s.ranks > 1 else ""
        print(
            f"\n{s.name}: H {s.hidden}, I {s.intermediate}, E {s.experts}{ranks}, K {s.top_k}; us"
        )
        print(heading())
        for tokens in counts:
            cells.append(measure(s, tokens, experts, w, copy))
            print(line(cells[-1]), flush=True)
    save(options.json, {**where, "copy": copy, "cells": cells})
    if options.benchmark_json:
        rates = {"copy_gb_s": copy, "cublas_tflops": cublas}
        benchmark_json.write(options.benchmark_json, where, benchmarks(cells, rates))


if __name__ == "__main__":
    main()
