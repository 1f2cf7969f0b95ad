"""Probes of the Triton kernels, by module, for the interpreter and for a GPU."""

# SPDX-License-Identifier: Apache-2.0
import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace

import torch

from nvfp4_moe.cases import moe_edges
from nvfp4_moe.cases.moe_case import MoECase
from nvfp4_moe.differential.conforming import Setting
from nvfp4_moe.kernels.quantize.launch import LaunchConfig
from nvfp4_moe.kernels.tiles import GemmConfig
from nvfp4_moe.reference.activation import ActivationType
from nvfp4_moe.reference.moe.hidden_states import Activations
from nvfp4_moe.reference.moe.routing import Routing, RoutingMethodType
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe, SfLayout

from ..calls import Call, FusedCall
from ..edge_calls import ActivationCall
from ..kernel_calls import CALLS, case_of
from . import (
    far_calls,
    gpu_paths,
    jit_calls,
    prologue_probes,
    quantizer_probes,
    ring_probes,
    routers,
    row_probes,
    training_calls,
)
from .operation_calls import AmaxCall, NativeCall, ProducerCall, ProductCall, ReloadCall
from .part_calls import (
    CopyRowsCall,
    DecodeCall,
    DecodeWeightsCall,
    FinalizeCall,
    FragmentsCall,
    MaskedRowsCall,
    PermuteCall,
    SumsNearTiesCall,
)
from .quantizer_calls import CutCall
from .strict import strict
from .trial import Probe

Named = Iterator[tuple[str, Callable[[], Call]]]


def _layers() -> Named:
    for case in moe_edges.activations(Recipe()):
        yield case.name, functools.partial(ActivationCall, case)
    for case in moe_edges.static(Recipe()):
        yield case.name, functools.partial(FusedCall, case)
    two = Routing(RoutingMethodType.Renormalize, 2)
    five = Setting("five experts", 40, 128, 128, 7, two, ActivationType.Relu2, offset=1, local=5)
    decoded = GemmConfig(128, 16, 64, 1, 4, decoded=True)
    at_once = {"launch._DECODED_BYTES": 2 * 2 * 128 * 128}  # two experts
    yield "decoded, two at a time", lambda: FusedCall(case_of(five), decoded, at_once)
    yield "one token", lambda: FusedCall(case_of(replace(five, tokens=1)))
    yield "K of 1 1/4 tiles, NaN", lambda: FusedCall(_with_nan(), GemmConfig(128, 16, 256, 1, 4))


def _with_nan() -> MoECase:
    """Tokens in bf16, some of whose columns are NaN or infinite; the others' outputs are numbers."""
    two = Routing(RoutingMethodType.Renormalize, 2)
    case = case_of(Setting("wide", 8, 320, 128, 4, two), bf16=True)
    x = case.activations.hidden_states.clone()
    x[2, 0], x[5, 64], x[7, -1] = torch.nan, torch.inf, torch.nan
    return replace(case, activations=Activations(x))


def _products() -> Named:
    small, wide = GemmConfig(128, 16, 128, 1, 4), GemmConfig(128, 32, 64, 2, 4)
    half = torch.float16
    yield "dense", lambda: ProductCall(small)
    yield "dense, long tiles", lambda: ProductCall(GemmConfig(128, 16, 256, 1, 4), k=336)
    yield "dense, 8x4 by row", lambda: ProductCall(wide, use_8x4=True, by_row=True, m=41)
    yield "dense, exact, fp16", lambda: ProductCall(small, exact=True, out_dtype=half, k=256)
    tile = GemmConfig(128, 16, 64, 1, 4)
    for m, n in ((1, 1), (18, 128), (2, 129)):
        yield (
            f"dense, {m} by {n}",
            functools.partial(ProductCall, tile, exact=True, m=m, n=n, k=64),
        )
    decoded = GemmConfig(128, 32, 64, 1, 4, decoded=True)
    yield "dense, decoded", lambda: ProductCall(decoded, m=40)
    yield "dense, decoded, exact", lambda: ProductCall(decoded, exact=True, k=4160)


def _rest() -> Named:
    for kind in (ActivationType.Swiglu, ActivationType.Relu2):
        for recipe in (Recipe("exact"), Recipe()):
            yield f"reload, {kind.name}, {recipe}", functools.partial(ReloadCall, kind, recipe)
    situ = ActivationType.Situ
    yield "reload, maxima", AmaxCall
    for static in (False, True):
        yield (
            f"reload, small, static {static}",
            functools.partial(
                ReloadCall, ActivationType.Swiglu, Recipe(), static=static, small=True
            ),
        )
    swiglu = ActivationType.Swiglu
    yield "reload, static", lambda: ReloadCall(swiglu, Recipe("exact"), static=True)
    yield "reload, static, fp16", lambda: ReloadCall(situ, Recipe("exact"), torch.float16, True)
    for i, name in enumerate(("silu", "rmsnorm", "add_rmsnorm")):
        layout, tiles = SfLayout((i + 1) % 3), SfLayout.layout_128x4
        yield name, functools.partial(ProducerCall, i, Recipe(), layout)
        yield (
            f"{name}, by a tensor",
            functools.partial(ProducerCall, i, Recipe(), layout, scale="tensor"),
        )
        for rows in (33, 64):  # programs of 32
            yield (
                f"{name}, {rows} rows",
                functools.partial(ProducerCall, i, Recipe(), tiles, rows=rows),
            )
        exact = Recipe("exact")
        yield f"{name}, fp16", functools.partial(ProducerCall, i, exact, tiles, torch.float16)
        yield (
            f"{name}, 4over6",
            functools.partial(ProducerCall, i, Recipe("fast", NVFP44Over6Config()), layout),
        )
        yield (
            f"{name}, in two launches",
            functools.partial(ProducerCall, i, exact, layout, fused=False),
        )


def _parts() -> Named:
    yield "permute", lambda: PermuteCall(37, 3)
    yield "permute, 15 experts", lambda: PermuteCall(200, 15, tile=32)
    yield "permute, one expert", lambda: PermuteCall(37, 1)
    yield "permute, none local", lambda: PermuteCall(64, 64, elsewhere=True)
    yield "permute, more experts than slots", lambda: PermuteCall(2, 16)
    yield "permute, three launches", lambda: PermuteCall(700, 5, one_launch=False)
    yield (
        "permute, three launches, 15 experts",
        lambda: PermuteCall(300, 15, offset=1, tile=32, one_launch=False),
    )
    yield "permute, 1025 chunks", lambda: PermuteCall(131200, 2, one_launch=False)
    yield "masked rows", MaskedRowsCall
    yield "masked rows, one expert", lambda: MaskedRowsCall(7, 2, (5,))
    yield "masked rows, counts of 64 bits", lambda: MaskedRowsCall(dtype=torch.int64)
    yield "masked rows, 16 experts", lambda: MaskedRowsCall(7, 4, (7, 2) * 8)
    yield "copied rows", lambda: CopyRowsCall(False)
    yield "copied rows, fourths", lambda: CopyRowsCall(True)
    yield "decode", DecodeCall
    yield "decode, indexed", lambda: DecodeCall(indexed=True)
    yield "decode weights", DecodeWeightsCall
    for kind in ("codes", "bf16", "quantized"):
        yield f"fragments, {kind}", functools.partial(FragmentsCall, kind)
        yield f"fragments, {kind}, indexed", functools.partial(FragmentsCall, kind, indexed=True)
        yield f"fragments, {kind}, whole", functools.partial(FragmentsCall, kind, 1280)
        yield f"fragments, {kind}, narrow", functools.partial(FragmentsCall, kind, 128)
    parts = LaunchConfig(1, 16, 0, 1, 1, 5)
    yield "fragments, quantized, parts", lambda: CutCall(FragmentsCall("quantized"), parts)
    tiny = functools.partial(FragmentsCall, recipe=Recipe(build="cute-dsl"), tiny=True)
    yield "fragments, quantized, tiny", lambda: tiny("quantized")
    yield "finalize", lambda: FinalizeCall(torch.bfloat16)
    yield "finalize, groups", lambda: FinalizeCall(torch.float32, "flashinfer", top_k=9)
    single = torch.float32
    for order, top_k in (("slot", 6), ("slot-multiply", 6), ("flashinfer", 9)):
        yield (
            f"finalize, tiny, {order}",
            functools.partial(FinalizeCall, single, order, single, top_k, tiny=True),
        )
    yield (
        "finalize, rows far apart",
        lambda: FinalizeCall(single, "slot-multiply", single, tokens=9, apart=True),
    )
    yield "finalize, near ties", SumsNearTiesCall
    yield "finalize, first multiplied", lambda: FinalizeCall(torch.bfloat16, "slot-multiply")
    yield "finalize, fp16", lambda: FinalizeCall(torch.float16, weights=torch.float32, top_k=1)


def _native() -> Named:
    """By the block-scaled MMA."""
    products, layers = dict(_products()), CALLS | dict(_layers())
    few = GemmConfig(128, 16, 128, 1, 4)
    others = {
        "dense, three tiles": lambda: ProductCall(few, exact=True, k=384),
        "dense, three tiles and a half": lambda: ProductCall(few, k=448),
    }
    for name, call in products.items():
        if "decoded" not in name:
            yield f"native, {name}", lambda call=call: NativeCall(call())
    for name, call in others.items():
        yield f"native, {name}", lambda call=call: NativeCall(call())
    for name in ("qwen", "tiles of 32", "K of 1 1/2 tiles", "grid", "one token"):
        yield f"native, {name}", lambda name=name: NativeCall(layers[name]())


def _of_gpus() -> Named:
    """Paths that only a GPU takes, in the interpreter; it multiplies no bf16, as codes are decoded."""
    quantizers = dict(quantizer_probes.named())
    parts = ("fragments, quantized", "silu, 4over6")
    some = (named for named in (*_parts(), *_rest()) if named[0].startswith(parts))
    prologue = (named for named in prologue_probes.named() if "codes" not in named[0])
    functions = [named for named in jit_calls.named() if named[0].startswith("function")]
    biased = (named for named in routers.named() if named[0].endswith(("bias", "groups")))
    yield from gpu_paths.of((*quantizers.items(), *some, *prologue, *biased))
    yield from gpu_paths.of(named for named in functions if "decode" not in named[0])
    near = [named for named in quantizers.items() if "near ties" in named[0]]
    for arch in (86, 89, 100):
        yield from gpu_paths.of(near, arch)
    yield from gpu_paths.of((named for named in functions if "e2m1" in named[0]), 100)
    yield from gpu_paths.of((named for named in quantizer_probes.named() if "NaN" in named[0]), 80)


_MORE: dict[str, Callable[[], Call]] = {
    name: call
    for some in (
        _parts(),
        quantizer_probes.named(),
        _of_gpus(),
        routers.named(),
        _layers(),
        _products(),
        _rest(),
        _native(),
        far_calls.calls(),
        prologue_probes.named(),
        ring_probes.named(),
        row_probes.named(),
        jit_calls.named(),
        training_calls.named(),
    )
    for name, call in some
}


def _named(*starts: str) -> tuple[str, ...]:
    return tuple(n for n in _MORE if n.startswith(starts))


_QUANTIZERS = (
    "quantizer, fast, 128x4",
    "quantizer, exact, 8x4",
    "quantizer, 4over6",
    "quantizer, saturating",
    "quantizer, fp32",
    *_named("quantizer"),
)
_ACTIVATIONS = tuple(n for n in _MORE if n.endswith(("alone", "alone, parameters")))
_STATIC = tuple(n for n in _MORE if n.endswith("static, small"))
_TILES = ("qwen", "top 1", "deepseek", "tiles of 16", "tiles of 32", "K of 1 1/2 tiles", "decoded")
_PRODUCTS = _named("dense", "native, dense")
_RELOAD = _named("reload", "far, reload")
_PRODUCERS = _named("silu", "rmsnorm", "add_rmsnorm", "far, silu", "far, add_rmsnorm")
_BLOCKS = (
    *_QUANTIZERS,
    *_PRODUCERS,
    *_RELOAD,
    "qwen",
    "4over6",
    *_named("far, quantize", "far, padding", "interpreted, quantizer", "interpreted, silu"),
)
_LIBRARY = (
    *_QUANTIZERS, "decode", "decode weights", "dense", *_PRODUCERS, "far below", "qwen", "decoded",
    "bf16", "grid", "saturated routers", "every routing method", "routers, subnormal bias",
    *_named("finalize, tiny", "finalize, rows", "finalize, near", "row dots"),
)  # fmt: skip
_FUNCTIONS = tuple(n for n in _named("function") if not n.startswith("function, decode"))
_ALONE = tuple(
    f"kernels/jit/{name}.py" for name in ("arithmetic", "decode", "e2m1", "e4m3", "instructions")
)
_DIRECT = ("function", "compiled", "decode", "fragments", "prologue", "dense, 1 by 1", "row dots")
"""On a GPU, where each probe compiles its kernels anew, their functions are called directly alone."""
_EXPERTS = (
    *_ACTIVATIONS,
    "gpt-oss",
    *_STATIC,
    *_TILES,
    *_named("one token", "decoded", "native"),
    "bf16",
    "far, experts",
)
OF_FILE: dict[str, tuple[str, ...]] = {
    "kernels/jit/mma.py": (
        *_PRODUCTS, "far below", *_TILES, *_named("decoded", "native", "K of"), "cancelling sums",
        "grid", *_named("far, dense", "far, experts"),
    ),
    "kernels/moe/activation.py": (*_EXPERTS, *_named("gradient", "far, gradient")),
    "kernels/moe/grouped_gemm.py": _EXPERTS,
    "kernels/moe/masked/rows.py": _named("masked rows", "copied rows", "far, copied"),
    "kernels/moe/row_samples/kernel.py": _named("rows taken"),
    "kernels/moe/permute.py": (*_named("permute", "masked rows"), *_TILES, "three launches"),
    "kernels/moe/finalize.py": (
        *_named("finalize"), *_TILES, "cancelling", "any size, to fp32", "far rows",
        *_named("far, finalize"),
    ),
    "kernels/moe/routing.py": (
        "saturated routers", "undecided routers", "every routing method",
        *_named("routers"), "function, sigmoid", "far, route", *_named("prologue, routed"),
        *_named("interpreted, routers", "interpreted, prologue, routed"),
    ),
    "kernels/quantize/kernel.py": (
        *_BLOCKS,
        *_named("fragments, quantized", "prologue"),
        *_named("interpreted, fragments", "interpreted, prologue"),
    ),
    "kernels/quantize/block.py": _BLOCKS,
    "kernels/jit/formats.py": _BLOCKS,
    "kernels/jit/load.py": _BLOCKS,
    "kernels/jit/store.py": _BLOCKS,
    "kernels/jit/arithmetic.py": (*_FUNCTIONS, *_LIBRARY, *_named("interpreted, function")),
    "kernels/jit/decode.py": (
        *_named("function, decode", "decode", "far, decode", "fragments, codes", "prologue, codes"),
        "dense, 1 by 1", "dense", "qwen", "bf16", "grid",
    ),
    "kernels/jit/fragments.py": _named("fragments", "far, fragments"),
    "kernels/moe/hopper/prologue.py": _named("prologue"),
    "kernels/moe/hopper/rows.py": _named("fragments, bf16", "far, fragments"),
    "kernels/moe/hopper/grouped_gemm.py": _named("ring", "compiled, barriers"),
    "kernels/moe/hopper/dense_gemm.py": _named("ring, dense", "compiled, barriers of ring, dense"),
    "kernels/moe/hopper/fragments.py": _named("ring"),
    "kernels/moe/hopper/gather.py": _named("ring, gathered"),
    "kernels/jit/e2m1.py": (
        *_named("function, e2m1", "compiled, e2m1", "interpreted, function, e2m1"), *_BLOCKS
    ),
    "kernels/jit/e4m3.py": (
        *_named("function, e4m3", "function, decode", "interpreted, function, e4m3"), *_LIBRARY
    ),
    "kernels/jit/layouts.py": (*_QUANTIZERS, *_PRODUCTS),
    "kernels/jit/pdl.py": ("decode", "compiled, wait"),
    "kernels/jit/recipe.py": _BLOCKS,
    "kernels/jit/approximations.py": _ACTIVATIONS,
    "kernels/jit/instructions.py": _named("function, ex2", "function, tanh", "routers, of a GPU"),
    "kernels/dense/kernel.py": (*_PRODUCTS, *_named("far, dense")),
    "kernels/fused_quantize/kernel.py": (*_PRODUCERS, "function, exp"),
    "kernels/weights/kernel.py": _RELOAD,
    "kernels/moe/training/activation_gradient.py": _named("gradient", "far, gradient"),
    "kernels/moe/training/row_dots.py": _named("row dots", "far, row dots"),
    "kernels/moe/training/empty_groups.py": _named("empty groups", "far, empty groups"),
    "kernels/weights/values.py": _named("weight values", "far, weight values"),
}  # fmt: skip
"""Calls of each module, in order."""


def asked(file: str, device: str) -> list[str]:
    """Names of the calls of a module on a device: some are in the interpreter alone, or on a GPU."""
    names = list(dict.fromkeys(OF_FILE[file]))
    if device == "cuda" and file in _ALONE:
        return [n for n in names if n.startswith(_DIRECT)]
    other = ("ring", "compiled") if device == "cpu" else ("far", "native", "interpreted")
    return [n for n in names if not n.startswith(other)]


def call(name: str) -> Call:
    return (_MORE | CALLS)[name]()


@functools.cache
def probe(name: str, device: str) -> Probe:
    made = call(name)
    answered = made.judge()

    def run() -> Iterator[str]:
        # Memory that nobody writes is full of NaN: what lay there before may be the right answer.
        torch.set_deterministic_debug_mode("warn")
        with strict() if device == "cpu" else nullcontext():
            accepted = answered.accepts(made.answer(device))
        if not accepted:
            yield name

    return run
