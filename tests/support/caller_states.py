"""Results of the library's parts where the caller has set torch up in another way than it starts.

`python caller_states.py cpu|cuda PART...` prints a JSON object: by state, a digest of each part's
results. Each state has a process of its own, forked before the library is imported: a tensor that a
module makes when it is imported, or keeps from its first call, is then made in that state too.
"""

# SPDX-License-Identifier: Apache-2.0
import contextlib
import hashlib
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Fills new memory with NaN and large integers, too."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def flushed() -> Iterator[None]:
    """Flushes subnormals in this thread, and in those that it starts."""
    assert torch.set_flush_denormal(True), "this processor has no such mode"
    try:
        yield
        assert sys.float_info.min * float("0.5") == 0, "the caller's flag is put back"
    finally:
        torch.set_flush_denormal(False)


STATES: dict[str, Callable[[], Any]] = {
    "plain": contextlib.nullcontext,
    "default dtype": lambda: default_dtype(torch.bfloat16),
    "default device": default_device,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast(torch.device(sys.argv[1]).type, torch.bfloat16),
    "deterministic": deterministic,
    "flush subnormals": flushed,
}


def digest(*values: Any) -> str:
    """Digest every bit of tensors, also within containers, and the text of other values."""
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.update(f"{value.dtype} {tuple(value.shape)}".encode())
            data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            found.update(data.numpy().tobytes())
        elif is_dataclass(value):
            for field in fields(value):
                add(getattr(value, field.name))
        elif isinstance(value, dict):
            add(list(value.items()))
        elif isinstance(value, list | tuple):
            for part in value:
                add(part)
        else:
            found.update(f"{value!r}\n".encode())

    add(values)
    return found.hexdigest()[:16]


PARTS: dict[str, Callable[[str, str], Any]] = {}
"""By name: a function of (device, backend of kernels) to results."""


def part(f: Callable[[str, str], Any]) -> Callable[[str, str], Any]:
    PARTS[f.__name__] = f
    return f


def weights(gated: bool = True, seed: int = 0, **sizes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(w13, w2) of 3 experts, bf16 on the CPU; H = 144 and I = 80, or others."""
    from nvfp4_moe import host

    g = torch.Generator().manual_seed(seed)
    h, i = sizes.get("hidden", 144), sizes.get("intermediate", 80)
    w13, w2 = host.normal(g, 3, i * (2 if gated else 1), h), host.normal(g, 3, h, i)
    return (w13 / 12).bfloat16(), (w2 / 9).bfloat16()


def hidden(tokens: int = 5, seed: int = 1) -> torch.Tensor:
    from nvfp4_moe import host

    return host.normal(torch.Generator().manual_seed(seed), tokens, 144).bfloat16()


def chosen(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, weights) of 5 tokens, 2 slots."""
    from nvfp4_moe import host

    ids = host.arange(10).remainder(3).view(5, 2).int()
    return ids.to(device), (host.arange(10).view(5, 2).float() / 7).bfloat16().to(device)


@part
def subnormal_numbers(device: str, backend: str) -> Any:
    """Numbers around fp32's smallest, and enough of them for several threads."""
    from nvfp4_moe.reference.bounds.moe import fused_moe_bounds
    from nvfp4_moe.reference.moe import layer as moe
    from nvfp4_moe.reference.moe.activations import quantize_activations
    from nvfp4_moe.reference.quantize import dequantize, quantize_block_scales, quantize_per_token
    from nvfp4_moe.reference.recipe import Recipe
    from nvfp4_moe.reference.weights.prepare import prepare_experts

    w13, w2 = weights()
    g = torch.Generator().manual_seed(4)
    bits = torch.randint(0, 8 << 7, (600, 144), generator=g, dtype=torch.int16, device="cpu")
    x = bits.view(torch.bfloat16)  # 0 to 2^-119: no arithmetic, which would flush them
    found = []
    for recipe in (Recipe("fast", build="cute-dsl"), Recipe("exact", build="cute-dsl")):
        q = quantize_per_token(x.to(device), recipe.base_scale_inv, recipe)
        values = dequantize(q.codes, q.block_scales, q.per_token_scale)
        found += [q, values, quantize_block_scales(values, recipe)]
    experts = prepare_experts(w13.to(device), (w2 / 2**10).to(device))
    ids, w = (t.repeat(120, 1) for t in chosen(device))
    wide = torch.nn.functional.pad(x, (0, experts.padded_hidden_size - 144)).to(device)
    a = quantize_activations(wide, Recipe("exact", build="cute-dsl"))
    bounds = fused_moe_bounds(a, experts, ids, w).output
    return found, moe.fused_moe(a, experts, ids, w, output_dtype=torch.float32).output, bounds


@part
def quantizers(device: str, backend: str) -> Any:
    import nvfp4_moe as n
    from nvfp4_moe.cases import inputs

    found: list[Any] = []
    for kind in ("normal", "edge", "bits"):
        x = inputs.synthetic(kind, 20, 64)
        found.append(x)
        for base, options in (
            (448, {"fast_math": True}),
            (448, {"fast_math": False}),
            (256, {"nvfp4_4over6": n.NVFP44Over6Config(256, "MSE")}),
        ):
            for way in (
                {"per_token_activation": True, "sfLayout": n.SfLayout.layout_128x4},
                {"sfLayout": n.SfLayout.layout_linear},
            ):
                q = n.nvfp4_quantize(
                    x.to(device), 1 / (6 * base), backend=backend, **options, **way
                )
                found.append([t for t in q if t is not None])
    return found


@part
def experts(device: str, backend: str) -> Any:
    import nvfp4_moe as n
    from nvfp4_moe.reference.moe.shards import select_experts, shard_experts

    w13, w2 = (w.to(device) for w in weights())
    static = n.prepare_experts(w13, w2, input_amax=3.3, intermediate_amax=7.7)
    given = {"alpha": 1.7, "clamp_limit": 7.1, "w13_bias": w13[:, :, 0], "w2_bias": w2[:, :, 0]}
    made = n.prepare_experts(w13, w2, **given)
    plain = n.prepare_experts(w13, w2)
    before = [n.with_cutlass(static), n.with_cute_dsl(plain), shard_experts(made, 1, 2)]
    sums = [e.checksum() for e in (static, made, plain)]
    found = digest(*before, select_experts(made, 1, 2))
    new = [w.to(device) for w in weights(seed=7)]
    static.load_(*new, input_amax=3.3, intermediate_amax=7.7, backend=backend)
    biases = {"w13_bias": new[0][:, :, 0], "w2_bias": new[1][:, :, 0]}
    made.load_(*new, alpha=1.7, clamp_limit=7.1, **biases, backend=backend)
    return found, sums, static, made


@part
def layers(device: str, backend: str) -> Any:
    import nvfp4_moe as n
    from nvfp4_moe import host

    x, found = hidden().to(device), []
    for kind in n.ActivationType:
        if kind.implemented:
            e = n.prepare_experts(*(w.to(device) for w in weights(kind.gated)), kind)
            found.append(n.fused_moe(x, e, chosen(device), backend=backend))
    w13, w2 = (w.to(device) for w in weights())
    e = n.prepare_experts(w13, w2, alpha=1.702, clamp_limit=1.3)
    logits = host.normal(torch.Generator().manual_seed(3), 5, 3).bfloat16().to(device)
    bias = host.fp32([0.1, -0.2, 0.3]).to(device)
    for name in ("DeepSeekV3", "Llama4", "RenormalizeNaive"):
        routing = n.Routing(n.RoutingMethodType[name], 1 if name == "Llama4" else 2)
        given = {"routing_bias": bias if name == "DeepSeekV3" else None, "backend": backend}
        found.append(n.fused_moe(x, e, (logits, routing), output_dtype=torch.float32, **given))
    e = n.prepare_experts(w13, w2, input_amax=3.3, intermediate_amax=7.7)
    found.append(n.fused_moe(x, e, chosen(device), backend=backend, stats=True))
    return found


@part
def dense(device: str, backend: str) -> Any:
    import nvfp4_moe as n

    x = hidden().to(device)
    quantized = [
        n.nvfp4_quantize(t, 1 / 2688, n.SfLayout.layout_128x4, per_token_activation=True)
        for t in (x, weights()[0][0].to(device))
    ]
    (a, a_scales, alpha), (b, b_scales, _) = quantized
    product = n.mm_fp4(a, b.T, a_scales, b_scales.T, alpha, backend=backend)
    halves, ones = torch.cat([x, x.flip(0)], 1), torch.ones_like(x[0])
    swiglu = n.silu_and_mul_nvfp4_quantize(halves, backend=backend)
    return product, swiglu, n.rmsnorm_nvfp4_quantize(x, ones, backend=backend)


@part
def judge(device: str, backend: str) -> Any:
    from nvfp4_moe import host
    from nvfp4_moe.cases import moe as moe_cases
    from nvfp4_moe.reference.bounds.moe import fused_moe_bounds
    from nvfp4_moe.reference.moe.activations import quantize_activations
    from nvfp4_moe.reference.moe.baseline_moe import (
        FORMATS,
        baseline_moe,
        prepare_baseline,
        quantize_for,
    )
    from nvfp4_moe.reference.recipe import Recipe
    from nvfp4_moe.reference.statistics.measure import weight_statistics
    from nvfp4_moe.reference.weights.prepare import prepare_experts
    from nvfp4_moe.serving.scales import serving_scales

    w13, w2 = (w.to(device) for w in weights(hidden=128, intermediate=128))
    x, (ids, slots) = hidden()[:, :128].to(device), chosen(device)
    e = prepare_experts(w13, w2, alpha=1.3, clamp_limit=1.5)
    bounds = fused_moe_bounds(quantize_activations(x, Recipe()), e, ids, slots)
    baselines = []
    for form in FORMATS:
        s = prepare_baseline(form, w13, w2, input_amax=3.3, intermediate_amax=7.7)
        baselines.append(baseline_moe(quantize_for(x, s), s, ids, slots).output)
    shared = [host.fp32([v] * 3) for v in (0.3, 1.5, 2.5)]
    scales = serving_scales(
        host.fp32([[0.1, 0.2]] * 3), *shared, activation="static", clamp_limit=7.0
    )
    exact = next(iter(moe_cases.exact_cases()))
    statistics = weight_statistics(w13)  # whose energies a GPU adds in any order
    return bounds, baselines, scales, statistics.counts, statistics.histogram, exact


@part
def training(device: str, backend: str) -> Any:
    import nvfp4_moe as n

    given = [hidden().to(device), *(w.to(device) for w in weights())]
    with torch.inference_mode(False):
        given = [t.clone().requires_grad_() for t in given]
        y = n.fake_quantized_moe(*given, chosen(device), backend=backend)
        y.backward(torch.ones_like(y))
    return y, [t.grad for t in given]


@part
def checkpoints(device: str, backend: str) -> Any:
    from safetensors.torch import save_file

    from nvfp4_moe.checkpoints import convert, load_experts

    w13, w2 = weights()
    tensors = {}
    for e in range(3):
        names = {"up": w13[e, :80], "gate": w13[e, 80:], "down": w2[e]}
        for name, w in names.items():
            tensors[f"model.layers.0.mlp.experts.{e}.{name}_proj.weight"] = w.contiguous()
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "bf16", Path(folder) / "nvfp4"
        source.mkdir()
        save_file(tensors, source / "model.safetensors")
        (source / "config.json").write_text('{"hidden_act": "silu", "num_experts": 3}', "utf-8")
        convert(source, target)
        sums = [load_experts(target, 0, static=s, device=device).checksum() for s in (False, True)]
        return sums, (target / "model.safetensors").read_bytes()


def results(device: str, backend: str, parts: list[str]) -> dict[str, str]:
    """Return a digest for each part, or what it raised, with the line that did."""
    found = {}
    for name in parts:
        try:
            found[name] = digest(PARTS[name](device, backend))
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            found[name] = f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"
    return found


def in_state(name: str, *arguments: Any) -> dict[str, dict[str, str]]:
    """Return `results` in the state and, where tensors that are kept could differ, those after it."""
    with STATES[name]():
        found = {"inside": results(*arguments)}
    if name in ("default device", "inference mode"):
        found["after"] = results(*arguments)
    return found


def main() -> None:
    device, *parts = sys.argv[1:]
    found = {}
    kernels = device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    backend = "triton" if kernels else "reference"
    torch.set_num_threads(1)
    for name in STATES:
        reader, writer = os.pipe()
        if os.fork() == 0:
            os.close(reader)
            with os.fdopen(writer, "w") as out:
                json.dump(in_state(name, device, backend, parts), out)
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as told:
            text = told.read()
        os.wait()
        found[name] = json.loads(text) if text else {}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
