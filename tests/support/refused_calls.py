"""A call for each rule by which a backend of FlashInfer refuses, small enough for the interpreter.

A rule without a call fails `tests/backends/test_refusals.py`. A call is refused by the first rule of its
table that applies; so each differs from one that the backend would serve in one thing.
"""

# SPDX-License-Identifier: Apache-2.0
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import dense_cases
import moe_cases
import pytest
import torch
from installations import pretend
from moe_cases import Shape
from moe_triton_cases import coarse

import nvfp4_moe
from nvfp4_moe.cases.moe_case import MoECase
from nvfp4_moe.kernels import environment
from nvfp4_moe.kernels.baseline_moe.backends import BASELINE_MOE
from nvfp4_moe.kernels.baseline_moe.call import BaselineCall
from nvfp4_moe.kernels.dense.api import MM_FP4
from nvfp4_moe.kernels.dense.call import make_dense_call
from nvfp4_moe.kernels.flashinfer import baseline_moe, dense, quantize, rules, trtllm, version
from nvfp4_moe.kernels.flashinfer.functions import LAYERS
from nvfp4_moe.kernels.flashinfer.rules import Rule
from nvfp4_moe.kernels.moe.backends import FUSED_MOE
from nvfp4_moe.kernels.quantize.api import QUANTIZE
from nvfp4_moe.kernels.quantize.call import UNSET, make_quantize_call
from nvfp4_moe.reference.activation import ELSEWHERE, IMPLEMENTED, ActivationType, Elsewhere
from nvfp4_moe.reference.moe.baseline_moe import prepare_baseline, quantize_for
from nvfp4_moe.reference.moe.routing import Routing, RoutingMethodType
from nvfp4_moe.reference.moe.variants import VARIANTS
from nvfp4_moe.reference.recipe import NVFP44Over6Config, SfLayout

TABLES: dict[str, tuple[Rule, ...]] = {
    **{f"nvfp4_quantize {name}": table for name, table in quantize.RULES.items()},
    **{f"mm_fp4 {name}": table for name, table in dense.RULES.items()},
    **{f"fused_moe {layer.name}": layer.rules for layer in LAYERS.values()},
    "baseline_moe flashinfer:mxfp8": baseline_moe.RULES,
}
"""Every table of rules, by operation and backend."""
OPERATIONS = {o.name: o for o in (QUANTIZE, MM_FP4, FUSED_MOE, BASELINE_MOE)}
EXACT = {environment.EXACT_VARIABLES["cuda"][0]: "1"}
FOUR_OVER_SIX = NVFP44Over6Config()
_M = RoutingMethodType


@dataclass(frozen=True)
class Refused:
    """One call that FlashInfer does not serve.

    Args:
        make: the call, on CPU tensors, for a GPU that it names.
        case: the layer's call whose intervals judge the output; None: the bits alone are right.
        installed: changes to a complete installation of FlashInfer.
        environment: variables to set.
        patch: what else to change, of a call.
        runs: False for a call that is chosen and not run: its tensors are too large, or another call
            of the table runs the same kernels.
        served: False if no backend of ours has what the call asks for.
        logged: False if a choice is not logged: beside Blackwell, and while torch compiles.
    """

    make: Callable[[], Any]
    case: Callable[[], MoECase] | None = None
    installed: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    patch: Callable[[pytest.MonkeyPatch, Any], None] | None = None
    runs: bool = True
    served: bool = True
    logged: bool = True

    def call(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        """Set the call's circumstances until the test ends, and make it."""
        for name in environment.VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in self.environment.items():
            monkeypatch.setenv(name, value)
        pretend(monkeypatch, **self.installed)
        call = self.make()
        if self.patch is not None:
            self.patch(monkeypatch, call)
        return call


def _compiling(monkeypatch: pytest.MonkeyPatch, _: Any) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


def _with_other_functions(monkeypatch: pytest.MonkeyPatch, _: Any) -> None:
    """Spare the comparison of FlashInfer's functions, which imports all of it."""
    monkeypatch.setattr(rules, "_what_differs", lambda _: "Its functions differ")


def _everywhere(make: Callable[..., Any], served_compiled: bool = True) -> Iterator[Refused]:
    """Calls for the rules that every table has; `make` takes the capability."""
    yield Refused(make, installed={"version": None})
    unknown = {"version": (0, 7, 3)}
    yield Refused(make, installed=unknown, patch=_with_other_functions, runs=False)
    yield Refused(make, patch=_compiling, runs=False, served=served_compiled, logged=False)
    yield Refused(functools.partial(make, capability=None), runs=False, logged=False)


# The quantizers

ROWS = torch.linspace(1, 2, 16)
INDEX = torch.arange(16, dtype=torch.int32)


def matrix(m: int = 16, k: int = 64, dtype: torch.dtype = torch.bfloat16, device: str = "cpu"):
    if device == "meta":
        return torch.empty(m, k, dtype=dtype, device=device)
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)


def shifted(elements: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return matrix(1, 16 * 64 + elements, dtype)[0, elements:].view(16, 64)


def quantized(a=None, scale=1 / 2688, *, capability=(10, 0), masked_m=None, **named):
    arguments = {"per_token_activation": True, "nvfp4_4over6": UNSET} | named
    call = make_quantize_call(matrix() if a is None else a, scale, **arguments)
    return replace(call, capability=capability, masked_m=masked_m)


def by_global_scale(a=None, scale=1.0, **named):
    return quantized(a, scale, per_token_activation=False, **named)


def _quantizer(build: str) -> Iterator[Refused]:
    make = functools.partial(quantized, build=build)
    in_all = functools.partial(by_global_scale, build=build)
    yield from _everywhere(make)
    yield Refused(lambda: make(capability=(9, 0)), logged=False)
    yield Refused(lambda: make(masked_m=torch.ones(1, dtype=torch.int32)), runs=False)
    yield Refused(lambda: quantized(matrix(dtype=torch.float32)))
    yield Refused(lambda: make(fast_math=False))
    yield Refused(lambda: make(build="cute-dsl" if build == "cuda" else "cuda"))
    yield Refused(lambda: make(matrix(0)))
    if build == "cuda":
        yield Refused(lambda: make(capability=(10, 1)))
        yield Refused(lambda: make(flashinfer="0.7.4"))
        yield Refused(lambda: make(out_scale=torch.ones(1)))
        yield Refused(lambda: make(matrix(64, 16).t()))
        yield Refused(lambda: in_all(matrix(64, 1).t()))
        yield Refused(lambda: make(shifted(8)))
        yield Refused(lambda: in_all(matrix(1024, 512, torch.float8_e4m3fn)))
        yield Refused(lambda: make(matrix(2**20 + 1, 65536, device="meta")), runs=False)
        large = matrix(2**25, 1088, device="meta")
        yield Refused(lambda: make(large, do_shuffle=True), runs=False)
        on_gpu = matrix(device="meta"), torch.ones(1, device="meta")
        yield Refused(lambda: make(*on_gpu), runs=False)
        return
    yield Refused(lambda: make(expanded_idx_to_permuted_idx=INDEX))
    yield Refused(lambda: make(shifted(4)))
    yield Refused(lambda: make(matrix(2**25 - 127, 1040, device="meta")), runs=False)


def _cute_dsl_quantizer() -> Iterator[Refused]:
    make = functools.partial(by_global_scale, build="cute-dsl")
    yield from _quantizer("cute-dsl")
    yield Refused(lambda: make(scale=ROWS))
    yield Refused(lambda: make(matrix(851456, 2688, device="meta")), runs=False)


def _cake_quantizer() -> Iterator[Refused]:
    make = functools.partial(quantized, build="cute-dsl")
    yield from _quantizer("cute-dsl")
    yield Refused(lambda: make(capability=(12, 0)))
    yield Refused(lambda: by_global_scale(build="cute-dsl"))
    yield Refused(lambda: make(nvfp4_4over6=FOUR_OVER_SIX))
    yield Refused(lambda: make(sfLayout=SfLayout.layout_linear))
    yield Refused(lambda: make(enable_pdl=False))
    yield Refused(lambda: make(matrix(1, 65552)))
    yield Refused(lambda: make(), installed={"has_cake_programs": False})


# The dense products


def product(
    m=8, n=64, k=256, *, alpha="scalar", capability=(10, 0), shift=0, device="cpu", **named
):
    case = dense_cases.coarse(
        m, n, k, alpha=alpha, use_8x4=named.pop("use_8x4", False),
        dtype=named.pop("out_dtype", torch.bfloat16),
    )  # fmt: skip
    if shift:
        case = replace(case, a=_from(case.a, shift))
    if pitch := named.pop("pitch", 0):
        case = replace(case, a=torch.cat([case.a, case.a[:, :pitch]], 1)[:, : k // 2])
    pdl = named.pop("enable_pdl", True)
    invariant, plain = named.pop("batch_invariant", False), named.pop("plain", False)
    assert not named
    arguments = case.arguments
    layout = arguments.pop("use_8x4_sf_layout")
    call = make_dense_call(**arguments, use_8x4_sf_layout=layout, enable_pdl=pdl)
    if plain:  # bf16 rows, whose sums are exact too
        g = torch.Generator().manual_seed(2)
        rows = torch.randint(-4, 5, (m, k), generator=g).bfloat16()
        call = replace(call, a=rows, a_scales=None)
    return replace(call, capability=capability, batch_invariant=invariant)


def _from(t: torch.Tensor, shift: int) -> torch.Tensor:
    """The same matrix, `shift` bytes behind the start of its memory."""
    return torch.cat([t.new_zeros(shift), t.flatten()])[shift:].view(t.shape)


def _huge(capability: tuple[int, int]) -> Any:
    """A product of 2^31 elements, of which nothing is read."""
    small = product(capability=capability)
    a = torch.empty(1 << 17, small.a.shape[1], dtype=torch.uint8, device="meta")
    b = torch.empty(1 << 14, small.a.shape[1], dtype=torch.uint8, device="meta")
    return replace(small, a=a, b_rows=b)


_OLD = {"version": (0, 7, 1)}


def _products(backend: str) -> Iterator[Refused]:
    make = functools.partial(product, alpha="rows") if backend == "flashinfer:cake" else product
    home = (12, 0) if backend == "flashinfer:b12x" else (10, 0)
    make = functools.partial(make, capability=home)
    yield from _everywhere(make)
    yield Refused(lambda: make(plain=True))
    yield Refused(lambda: make(batch_invariant=True))
    if backend == "flashinfer:trtllm":
        yield Refused(make)
        return
    yield Refused(lambda: make(capability=(10, 1)))
    yield Refused(lambda: make(use_8x4=True))
    yield Refused(lambda: make(pitch=64))
    yield Refused(lambda: make(k=48))
    if backend != "flashinfer:cute-dsl":
        yield Refused(lambda: make(alpha="rows" if backend != "flashinfer:cake" else "scalar"))
    if backend != "flashinfer:cudnn":
        yield Refused(lambda: make(shift=8))
    if backend in ("flashinfer:cutlass", "flashinfer:cute-dsl", "flashinfer:cake"):
        yield Refused(lambda: make(n=36))
    if backend == "flashinfer:cudnn":
        yield Refused(make, installed={"has_cudnn": False})
    if backend == "flashinfer:cake":
        yield Refused(make, installed=_OLD)
        yield Refused(lambda: make(enable_pdl=False))
        yield Refused(make, installed={"has_cake_programs": False})
    if backend == "flashinfer:cute-dsl":
        yield Refused(lambda: make(alpha="rows"), installed=_OLD)
        yield Refused(lambda: make(alpha="rows", capability=(12, 0)))
        yield Refused(lambda: make(out_dtype=torch.float16, capability=(12, 0)))
        yield Refused(lambda: make(n=96, capability=(12, 0)))
        yield Refused(lambda: make(shift=16, capability=(12, 0)))
        yield Refused(lambda: _huge((12, 0)), runs=False)


# The fused layers

SHAPE = Shape(2, 256, 128, 2, 1)


def layer_case(
    build: str = "cuda",
    kind: ActivationType = ActivationType.Relu2,
    mode: str = "per-token",
    shape: Shape = SHAPE,
    prepared: bool = True,
    options: dict[str, Any] | None = None,
    **changes: Any,
) -> MoECase:
    """A layer whose sums are exact if its activation is Relu2, per token, without options."""
    exact = kind == ActivationType.Relu2 and mode == "per-token" and not options
    some = replace(shape, tokens=max(shape.tokens, 1))  # static scales are those of some tokens
    case = coarse(some, kind) if exact else moe_cases.make(some, kind, mode, **options or {})
    if shape.tokens == 0:
        case = _without_tokens(case)
    variant = VARIANTS[build]
    given: dict[str, Any] = {
        "name": "refused",
        "activations": case.activations,
        "experts": variant.prepared(case.experts) if prepared else case.experts,
        "routing": Routing(_M.Renormalize, shape.top_k),
        "num_experts": shape.experts,
        "ids": case.ids,
        "weights": case.weights,
        "build": build,
        "recipe": nvfp4_moe.Recipe(build=variant.quantizers),
        "finalize_order": variant.order(version.HERE.contract),
        "exact": exact,
    }
    if "logits" in changes:
        given |= {"ids": None, "weights": None}
    return MoECase(**given | changes)


def _without_tokens(case: moe_cases.Case) -> moe_cases.Case:
    a = case.activations
    tensors = {f.name: getattr(a, f.name) for f in fields(a)}
    none = replace(a, **{name: t if t is None else t[:0] for name, t in tensors.items()})
    return replace(case, activations=none, ids=case.ids[:0], weights=case.weights[:0])


def _refused_layer(
    of: str,
    capability: tuple[int, int] | None = (10, 0),
    call: dict[str, Any] | None = None,
    circumstances: dict[str, Any] | None = None,
    **changes: Any,
) -> Refused:
    """A call of the layer of a build; `call` has fields that a case has not."""
    case = functools.cache(lambda: layer_case(**{"build": of} | changes))
    fields = {"capability": capability, **(call or {})}
    return Refused(lambda: replace(case().request(), **fields), case, **circumstances or {})


def _without(column: str) -> tuple[ActivationType, Any]:
    """An activation that a layer of FlashInfer has not, and how that is so: cutlass has all of them."""
    kinds = [kind for kind in IMPLEMENTED if column not in ELSEWHERE[kind].flashinfer]
    return (kinds[0], None) if kinds else (ActivationType.Relu2, _in_no_layer)


def _in_no_layer(monkeypatch: pytest.MonkeyPatch, call: Any) -> None:
    monkeypatch.setitem(ELSEWHERE, call.experts.activation, Elsewhere())


def _layers(build: str, column: str, home: tuple[int, int], mode: str) -> Iterator[Refused]:
    make = functools.partial(_refused_layer, build, mode=mode)
    compiled = {"patch": _compiling, "runs": False, "logged": False, "served": build != "cutlass"}
    nobody = {"served": False, "runs": False}
    none = Shape(0, 256, 128, 2, 1)
    yield make(home, circumstances={"installed": {"version": None}})
    unknown = {"installed": {"version": (0, 7, 3)}, "patch": _with_other_functions}
    yield make(home, circumstances=unknown | {"runs": False})
    yield make(home, circumstances=compiled)
    yield make(None, circumstances={"runs": False, "logged": False})
    yield make(home, shape=none)
    yield make((10, 1))
    kind, how = _without(column)
    yield make(home, kind=kind, circumstances={"patch": how})
    yield make(home, build="cuda" if build != "cuda" else "cute-dsl", prepared=False)
    yield make(home, recipe=nvfp4_moe.Recipe("exact", build=VARIANTS[build].quantizers))
    config = nvfp4_moe.Recipe("fast", FOUR_OVER_SIX, VARIANTS[build].quantizers)
    yield make(home, recipe=config)
    yield make(home, output_dtype=torch.float16)
    yield make(home, call={"batch_invariant": True}, finalize_order="slot")
    yield make(home, finalize_order="slot" if build == "cuda" else "slot-multiply")
    if build == "cuda":
        yield make(home, mode="bf16")
        yield make(home, shape=replace(SHAPE, hidden=128))
        yield make(home, kind=ActivationType.Swiglu, shape=replace(SHAPE, intermediate=192))
        yield make((10, 7), kind=ActivationType.Situ)
        four = {"environment": {"FLASHINFER_NVFP4_4OVER6": "1"}}
        yield make(home, mode="static", recipe=config, circumstances=four)
        wide = Shape(2, 256, 128, 300, 1, 0, 2)
        logits = torch.randn(2, 300, generator=torch.Generator().manual_seed(1))
        yield make(home, shape=wide, logits=logits, routing=Routing(_M.Default, 1))
        hopper = Routing(_M.Default, 1, functions="hopper")
        yield make(home, logits=logits[:, :2].contiguous(), routing=hopper)
        rank = Shape(2, 256, 128, 4, 1, 0, 2)
        llama = Routing(_M.Llama4, 1)
        yield make(home, shape=rank, logits=logits[:, :4].contiguous(), routing=llama)
        yield make(home, num_experts=3000)
        yield make(home, circumstances={"patch": _no_kernel})
        return
    yield make(home, call={"lora_delta": torch.zeros(2, 1, 256)}, circumstances=nobody)
    yield make(home, call={"shared_experts": 1}, circumstances={"runs": False})
    if build == "cutlass":
        yield make(home, num_experts=5)
        split = Shape(2, 256, 128, 8, 8)
        yield make(home, shape=split, finalize_order="flashinfer")
        return
    split = Shape(2, 256, 128, 8, 8)
    yield make(home, shape=split, finalize_order="flashinfer")
    yield make(home, mode="bf16")
    yield make(home, mode="static", prepared=False)
    swiglu = ActivationType.Swiglu
    yield make(home, kind=swiglu, options={"clamp_limit": 7.0})
    yield make(home, options={"w2_bias": torch.ones(2, 256)}, prepared=False)
    yield make(home, call={"do_finalize": False})
    yield make(home, num_experts=3000)
    yield make(home, prepared=False)


def _no_kernel(monkeypatch: pytest.MonkeyPatch, call: Any) -> None:
    monkeypatch.setitem(trtllm._without_kernel, trtllm._shape(call), "No kernel found")


# The baselines


def baseline(capability=(10, 0), kind=ActivationType.Swiglu, tokens=2, hidden=256, experts=4, **_):
    shape = Shape(tokens, hidden, 128, experts, 1)
    w13, w2 = moe_cases.weights_of(shape, kind)
    prepared = prepare_baseline("mxfp8", w13, w2, kind)
    activations = quantize_for(moe_cases.hidden_states(shape), prepared)
    asked = type("BaselineCall", (BaselineCall,), {"capability": capability})
    return asked(
        activations,
        prepared,
        baseline_moe.flashinfer_weights(prepared),
        Routing(_M.Renormalize, 1),
        experts,
        topk=moe_cases.routing_of(shape),
    )


def _baselines() -> Iterator[Refused]:
    yield from _everywhere(baseline)
    yield Refused(lambda: baseline(tokens=0))
    yield Refused(lambda: baseline((12, 0)))
    yield Refused(lambda: baseline(experts=6))
    yield Refused(lambda: baseline(kind=_without("baselines")[0]))
    yield Refused(lambda: baseline(hidden=128))


def calls(table: str) -> list[Refused]:
    """The calls of a table of `TABLES`, in no order of meaning."""
    operation, backend = table.split(" ", 1)
    if operation == "baseline_moe":
        return list(_baselines())
    if operation == "mm_fp4":
        return list(_products(backend))
    if operation == "nvfp4_quantize":
        return list(
            {
                "flashinfer:cuda": lambda: _quantizer("cuda"),
                "flashinfer:cute-dsl": _cute_dsl_quantizer,
                "flashinfer:cake": _cake_quantizer,
            }[backend]()
        )
    home = (12, 0) if backend == "flashinfer:cutlass" else (10, 0)
    mode = "static" if backend == "flashinfer:cutlass" else "per-token"
    column = backend.removeprefix("flashinfer:")
    return list(_layers(LAYERS[backend].build, column, home, mode))
