"""A user's own backends: how they are registered, chosen, explained and checked."""

# SPDX-License-Identifier: Apache-2.0
import inspect
from dataclasses import dataclass, replace
from typing import Literal

import dense_cases
import moe_cases
import pytest
import torch
from assertions import assert_bitwise

import nvfp4_moe
from nvfp4_moe import UnsupportedError, register_backend
from nvfp4_moe.kernels import backends
from nvfp4_moe.kernels.backends import Backend, Operation
from nvfp4_moe.kernels.baseline_moe.backends import BASELINE_MOE
from nvfp4_moe.kernels.dense.api import MM_FP4
from nvfp4_moe.kernels.fused_quantize.api import FUSED_QUANTIZE
from nvfp4_moe.kernels.moe.backends import FUSED_MOE
from nvfp4_moe.kernels.op_schema import OPS, Flat, register
from nvfp4_moe.kernels.quantize.api import QUANTIZE
from nvfp4_moe.reference.moe.routing import RoutingMethodType
from nvfp4_moe.reference.recipe import Recipe

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
TOKEN = {"a_global_sf": 1 / 2688, "per_token_activation": True}


def by_the_reference(call):
    """A backend that is right."""
    return QUANTIZE.run("reference", call)


def registered(run=by_the_reference, **options):
    return register_backend("nvfp4_quantize", "mine", run, **options)


def test_a_named_backend_runs_and_is_explained():
    ran = []

    def run(call):
        ran.append(call)
        return by_the_reference(call)

    expected = nvfp4_moe.nvfp4_quantize(X, **TOKEN)
    with registered(run):
        results = nvfp4_moe.nvfp4_quantize(X, **TOKEN, backend="mine")
        assert len(ran) == 1 and ran[0].a is X
        for got, want in zip(results, expected, strict=True):
            assert_bitwise(got, want, "mine")
        explanation = nvfp4_moe.explain(X, **TOKEN, backend="mine")
        assert explanation.backend == "mine" and explanation.reason("mine") is None
    with pytest.raises(ValueError, match="backend is 'mine'; it must be one of auto"):
        nvfp4_moe.nvfp4_quantize(X, **TOKEN, backend="mine")


def test_auto_never_takes_it_unless_its_place_is_given():
    with registered(lambda call: pytest.fail("it ran")):
        nvfp4_moe.nvfp4_quantize(X, **TOKEN)
    with registered(before="reference"):
        assert nvfp4_moe.explain(X, **TOKEN).backend == "mine"
    with registered(before="reference", refusal=lambda call: "it is too slow"):
        explanation = nvfp4_moe.explain(X, **TOKEN)
        assert explanation.backend == "reference"
        assert explanation.reason("mine") == "it is too slow"
        with pytest.raises(UnsupportedError, match="mine cannot serve this call: it is too slow"):
            nvfp4_moe.nvfp4_quantize(X, **TOKEN, backend="mine")


def test_a_handle_removes_it():
    handle = registered()
    assert (handle.operation, handle.name) == ("nvfp4_quantize", "mine")
    handle.remove()
    handle.remove()
    registered().remove()


@pytest.mark.parametrize("operation", sorted({*backends.OPERATIONS, BASELINE_MOE.name}))
def test_a_name_is_taken_once(operation):
    names = backends.OPERATIONS[operation].names
    assert "reference" in names
    with register_backend(operation, "mine", by_the_reference):
        for name in ("mine", "auto", *names, "flashinfer:mine"):
            with pytest.raises(ValueError, match=f"name is '{name}'; it must not be taken: auto"):
                register_backend(operation, name, by_the_reference)
    assert "mine" not in backends.OPERATIONS[operation].names


@pytest.mark.parametrize(
    "change,message",
    [
        ({"operation": "softmax"}, "operation is 'softmax'; it must be one of .*nvfp4_quantize"),
        ({"name": ""}, "name is ''; it must be the name of a backend"),
        ({"name": 3}, "name is 3; it must be the name of a backend"),
        ({"run": None}, "run is None; it must be a function of the call"),
        ({"refusal": "no"}, "refusal is 'no'; it must be a function of the call"),
        ({"before": "mine"}, "before is 'mine'; it must be one of"),
    ],
)
def test_bad_arguments_are_named(change, message):
    given = {"operation": "nvfp4_quantize", "name": "mine", "run": by_the_reference} | change
    with pytest.raises((TypeError, ValueError), match=message):
        register_backend(**given)
    registered().remove()  # nothing was left behind


def test_not_implemented_is_unsupported():
    def run(call):
        raise NotImplementedError("K = 64 has no kernel")

    with registered(run), pytest.raises(UnsupportedError, match=r"mine cannot .*K = 64 has no"):
        nvfp4_moe.nvfp4_quantize(X, **TOKEN, backend="mine")


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda r: r[0], "the result of backend mine is uint8 .*; it must be 3 tensors"),
        (lambda r: r[:2], "the result of backend mine is a tuple of 2; it must be 3 tensors"),
        (lambda r: (r[0][:4], *r[1:]), r"mine, \[0\], is uint8 \[4, 32\]; it must be .*\[5, 32\]"),
        (lambda r: (r[0].int(), *r[1:]), r"\[0\], is int32 .*of uint8"),
        (
            lambda r: (*r[:2], r[2].to("meta")),
            r"\[2\], is on meta; it must be on its call's device",
        ),
    ],
)
def test_results_are_checked(change, message):
    with (
        registered(lambda call: change(by_the_reference(call))),
        pytest.raises((TypeError, ValueError), match=message),
    ):
        nvfp4_moe.nvfp4_quantize(X, **TOKEN, backend="mine")


def test_a_product_is_put_where_the_caller_wants_it():
    case = dense_cases.coarse(9, 32, 64)
    expected = nvfp4_moe.mm_fp4(**case.arguments)
    out = torch.full_like(expected, torch.nan)
    with register_backend("mm_fp4", "mine", lambda call: MM_FP4.run("reference", unplaced(call))):
        assert nvfp4_moe.mm_fp4(**case.arguments, out=out, backend="mine") is out
        assert_bitwise(out, expected, "mine")
        assert_bitwise(nvfp4_moe.mm_fp4(**case.arguments, backend="mine"), expected, "new")
    with (
        register_backend("mm_fp4", "mine", lambda call: expected.float()),
        pytest.raises(
            ValueError, match=r"the result of backend mine is float32 \[9, 32\]; it must"
        ),
    ):
        nvfp4_moe.mm_fp4(**case.arguments, backend="mine")


def unplaced(call):
    return replace(call, out=None)


def test_a_fused_quantizer_of_ones_own():
    weight, residual = X[0], X.flip(0).clone()
    expected = nvfp4_moe.add_rmsnorm_nvfp4_quantize(X, residual.clone(), weight)
    calls = []

    def run(call):
        calls.append(call)
        return FUSED_QUANTIZE.run("reference", call)

    with register_backend("fused_quantize", "mine", run):
        got = nvfp4_moe.add_rmsnorm_nvfp4_quantize(X, residual, weight, backend="mine")
        nvfp4_moe.silu_and_mul_nvfp4_quantize(X, backend="mine")
    for one, want in zip(got, expected, strict=True):
        assert_bitwise(one, want, "mine")
    assert calls[0].residual is residual and calls[1].weight is None


LAYER = moe_cases.Shape(5, 128, 64, 8, 2)


def test_a_layer_gets_codes_and_its_output_is_placed():
    case, calls = moe_cases.make(LAYER), []
    expected = nvfp4_moe.fused_moe(case.x, case.experts, (case.ids, case.weights))

    def run(call):
        calls.append(call)
        return FUSED_MOE.run("reference", call)[0]

    given = (case.x, case.experts, (case.ids, case.weights))
    with register_backend("fused_moe", "mine", run):
        got = nvfp4_moe.fused_moe(*given, backend="mine")
        assert_bitwise(got, expected, "mine")
        (call,) = calls
        assert call.activations.hidden_states.dtype == torch.uint8 and call.quantize is None
        assert call.routed()[0] is case.ids
        explanation = nvfp4_moe.explain_fused_moe(*given, stats=True, backend="mine")
        assert explanation.backend is None
        assert "which a registered backend does not return" in explanation.reason("mine")
        call = replace(call, do_finalize=False)
        assert "do_finalize is False" in FUSED_MOE.refusal("mine", call)
        into = torch.full_like(expected, torch.nan)
        (placed,) = FUSED_MOE.serve(replace(call, do_finalize=True, output=into), "mine")
        assert placed is into
        assert_bitwise(into, expected, "placed")


# How a call crosses torch.library


@dataclass(frozen=True)
class Inner:
    t: torch.Tensor
    method: RoutingMethodType
    left_out: int = 7


@dataclass(frozen=True)
class Outer:
    inner: Inner
    maybe: torch.Tensor | None
    recipe: Recipe
    word: Literal["a", "b"]
    factor: float
    scale: float | torch.Tensor


def test_a_dataclass_is_flattened_and_built_again():
    flat = Flat(Outer, {Inner: ("t", "method")})
    assert flat.schema == (
        "Tensor t, int method, Tensor? maybe, int recipe, str word, float factor, Tensor? scale, "
        "float scale_value"
    )
    value = Outer(Inner(X, RoutingMethodType.TopK), None, Recipe("exact"), "b", 0.5, 0.25)
    row = flat.flatten(value)
    assert row == (
        X, int(RoutingMethodType.TopK), None, Recipe("exact").code, "b", 0.5, None, 0.25,
    )  # fmt: skip
    assert flat.build(row) == flat.build((*row, "beside it")) == value
    assert type(flat.build(row).inner.method) is RoutingMethodType
    value = replace(value, scale=X)
    row = flat.flatten(value)
    assert row[-2] is X and flat.build(row) == value


def test_what_does_not_cross_is_named():
    @dataclass
    class Odd:
        x: dict

    with pytest.raises(TypeError, match=r"dict.* is no type that an op of torch.library takes"):
        Flat(Odd)
    with pytest.raises(TypeError, match=r"Inner begins with \['t'\], not \['method'\]"):
        Flat(Inner, {Inner: ("method",)})


# The engine


class Asked:
    capability = None


def test_an_explanation_binds_like_the_function_that_it_explains():
    operation = Operation("op", [Backend("only", backends.serves_all, lambda call: 7)])

    @operation.served()
    def function(x: int, *, backend: str = "auto"):
        """Doc."""
        if x < 0:
            raise ValueError("x is negative")
        return Asked(), operation.check_name(backend)

    explain = operation.explaining(function)
    assert function(1) == 7 and function.__doc__ == "Doc."
    parameters = inspect.signature(explain).parameters
    assert list(parameters) == ["x", "backend", "capability"]
    assert explain(1).backend == explain(x=1, backend="only").backend == "only"
    assert explain(-1).reason("only") == "x is negative" and explain(-1).backend is None
    with pytest.raises(TypeError, match="missing a required argument: 'x'"):
        explain()
    with pytest.raises(TypeError, match="unexpected keyword argument 'y'"):
        explain(1, y=2)
    assert "capability is 9" in explain(1, capability=9).reason("only")


def test_a_missing_kernel_falls_back_under_auto_alone():
    refused = []

    def run(call):
        raise RuntimeError("no kernel")

    def remembers(call, error):
        refused.append(str(error))
        return str(error) == "no kernel"

    first = Backend("first", lambda c: "none" if refused else None, run, remembers=remembers)
    operation = Operation("op", [first, Backend("second", backends.serves_all, lambda c: 2)])
    with pytest.raises(RuntimeError, match="no kernel"):
        operation.serve(Asked(), "first")
    assert not refused and operation.serve(Asked(), "auto") == 2 and refused == ["no kernel"]


def test_the_name_of_an_op_that_mutates_tells_its_schema():
    """Inductor's key of compiled code has the op's name, and not where the mutated argument stands."""

    @dataclass(frozen=True)
    class Call:
        x: torch.Tensor

    names = set()
    for tensors in ("Tensor y, Tensor(a!) out", "Tensor(a!) out, Tensor y"):
        register(
            "mutating", Flat(Call), lambda *_: None, lambda *_: None, "()",
            tensors=tensors, mutates=("out",),
        )  # fmt: skip
        names.add(OPS["mutating"]._qualname)
    assert len(names) == 2
