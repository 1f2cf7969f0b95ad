"""Wrong arguments of every public function: one clear error that names the argument.

Each argument has a kind, and each kind a strategy of values that are never right. The form of the
message is that of `reference/checks.py`: `<argument> is <given>; it must be <allowed>`, in one line.
"""

# SPDX-License-Identifier: Apache-2.0
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import dense_cases
import moe_cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nvfp4_moe
from nvfp4_moe import ActivationType, Recipe, Routing, RoutingMethodType, checkpoints, parallel
from nvfp4_moe.serving.activation_policy import activation_of

OBJECTS = st.sampled_from([object(), object, [1], (), {"a": 1}, b"x", 1j, lambda: None])
WORDS = st.sampled_from(["", "yes", "cuda:99", "None", "fast_math"])
NUMBERS = st.sampled_from([-1, 0, 3, 2.5, float("nan"), float("inf"), True])


def tensors(like: torch.Tensor, flat: bool) -> st.SearchStrategy:
    """`like` with another dtype, shape or device; every one is wrong.

    Args:
        flat: the number of elements counts, not how they are arranged.
    """
    dtypes = [torch.int64, torch.bool, torch.complex64, torch.float64, torch.float8_e5m2]
    wrong = [like.to(dtype) for dtype in dtypes if dtype != like.dtype]
    if not flat:
        wrong += [like[None], like.new_empty((0, *like.shape)), like.unsqueeze(-1)]
    if like.dim() and like.shape[-1] > 1:
        wrong += [like[..., : like.shape[-1] - 1].contiguous(), like[..., :0]]
    return st.sampled_from(wrong)


def elsewhere(like: torch.Tensor) -> st.SearchStrategy:
    return st.just(like.to("meta"))


@dataclass(frozen=True)
class Function:
    call: Callable[..., Any]
    right: dict[str, Any]
    wrong: dict[str, st.SearchStrategy]
    also: tuple[str, ...] = ()  # names by which a message may call an argument, too


def tensor(
    like: torch.Tensor, primary: bool = False, optional: bool = False, flat: bool = False
) -> st.SearchStrategy:
    found = OBJECTS | WORDS | NUMBERS | tensors(like, flat)
    if not primary:  # whose device decides
        found |= elsewhere(like)
    return found if optional else found | st.none()


NOT_A_FLAG = OBJECTS | WORDS | st.sampled_from([0, 1, -1, 2.5, float("nan")])
NOT_A_FLAG_OR_NONE = NOT_A_FLAG
NO_NAME = OBJECTS | WORDS | NUMBERS | st.none()
NO_NAME_OR_NONE = OBJECTS | WORDS | NUMBERS
NO_RECIPE = OBJECTS | WORDS | st.sampled_from([3, 2.5, True])
NO_AMAX = (
    OBJECTS
    | WORDS
    | st.sampled_from(
        [-3.0, 0, 0.0, float("nan"), float("inf"), True, torch.ones(8, dtype=torch.float32)]
    )
)
NO_PATH = st.sampled_from(["", None, 3, [1], object(), True])
NO_FUNCTION = WORDS | NUMBERS | st.sampled_from([True, [1], object()])
NO_DEVICE = OBJECTS | st.sampled_from(["gpu", "cuda:99", "meta", "", 3, None, "cpu:x"])
NO_DTYPE = OBJECTS | WORDS | NUMBERS | st.sampled_from([torch.int8, torch.float64, torch.uint8])
NO_COUNT = OBJECTS | WORDS | st.sampled_from([-1, 2.5, float("nan"), True])

X = torch.randn(32, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
ONE = torch.ones(1, dtype=torch.float32)
LAYER = moe_cases.make(moe_cases.Shape(5, 128, 64, 4, 2))
DENSE = dense_cases.coarse(33, 64, 256, alpha="rows").arguments
LOGITS = torch.zeros(5, 4, dtype=torch.float32)
ROUTING = Routing(RoutingMethodType.Renormalize, 2)
BIAS13, BIAS2 = (torch.zeros(4, n, dtype=torch.float32) for n in (128, 128))
QUANTIZER = {
    "sfLayout": OBJECTS | WORDS | st.sampled_from([3, -1, True]),
    "nvfp4_4over6": NO_RECIPE,
    "fast_math": NOT_A_FLAG_OR_NONE,
    "backend": NO_NAME,
    "a_global_sf": OBJECTS
    | WORDS
    | st.sampled_from([-1, 0, 0.0, -2.5, float("nan"), True])
    | st.sampled_from([ONE.half(), -ONE, ONE * 0, ONE.repeat(3), ONE * float("nan"), ONE[:0]]),
}
FUSED = {
    "hidden_states": tensor(LAYER.x, primary=True),
    "experts": OBJECTS | WORDS | NUMBERS | st.none() | st.just((LAYER.w13, LAYER.w2)),
    "routing": OBJECTS
    | WORDS
    | st.none()
    | st.sampled_from(
        [
            LOGITS,
            (ROUTING, LOGITS),
            (LOGITS, 2),
            (LOGITS, LOGITS),
            (LAYER.ids, ROUTING),
            (LAYER.ids.long(), LAYER.weights),
            (LAYER.ids[:3], LAYER.weights[:3]),
            (LAYER.ids, LAYER.weights[:, :1]),
            (LAYER.ids, LAYER.weights.double()),
            (LAYER.ids + 100, LAYER.weights),
            (LAYER.ids - 100, LAYER.weights),
            (LAYER.ids, LAYER.weights * float("nan")),
            (LAYER.ids.to("meta"), LAYER.weights),
            (LOGITS[:, :3], ROUTING),
            (LOGITS.half(), ROUTING),
            (LOGITS[0], ROUTING),
            (LAYER.ids, LAYER.weights, 1),
        ]
    ),
    "activation": NO_NAME_OR_NONE,
    "routing_bias": OBJECTS | WORDS | st.just(LOGITS[0]),  # the ids are given
    "num_experts": NO_COUNT | st.sampled_from([0, 3]),
    "local_expert_offset": NO_COUNT | st.sampled_from([1, 5]),
    "backend": NO_NAME,
    "fast_math": NOT_A_FLAG_OR_NONE,
    "build": NO_NAME,
    "nvfp4_4over6": NO_RECIPE,
    "finalize_order": NO_NAME,
    "batch_invariant": NOT_A_FLAG | st.none(),
    "output_dtype": NO_DTYPE,
    "stats": NOT_A_FLAG | st.none(),
}
FOUR = torch.ones(4, dtype=torch.float32)
NO_NUMBERS = (float("nan"), 1e39, 10**400, True, FOUR * float("nan"), FOUR.to("meta"))
QUANTIZED = {
    "w13_codes": torch.zeros(4, 128, 64, dtype=torch.uint8),
    "w13_scales": torch.zeros(4, 128, 8, dtype=torch.uint8),
    "w13_decode": FOUR,
    "w2_codes": torch.zeros(4, 128, 32, dtype=torch.uint8),
    "w2_scales": torch.zeros(4, 128, 4, dtype=torch.uint8),
    "w2_decode": FOUR,
}
DECODE = st.sampled_from([-FOUR, FOUR * float("nan"), FOUR / 0])
WEIGHTS = {
    "w13": tensor(LAYER.w13, primary=True) | st.just(LAYER.w13 * float("nan")),
    "w2": tensor(LAYER.w2) | st.just(LAYER.w2 * float("inf")),
    "activation": OBJECTS | WORDS | st.sampled_from([3, 99, ActivationType.SwigluBias, None]),
    "recipe": NO_RECIPE,
    "w13_bias": tensor(BIAS13, optional=True),
    "w2_bias": tensor(BIAS2, optional=True) | st.just(BIAS2 * float("nan")),
    "alpha": OBJECTS | WORDS | st.sampled_from([*NO_NUMBERS, torch.ones(3).float()]),
    "beta": OBJECTS | WORDS | st.sampled_from([*NO_NUMBERS, float("inf"), BIAS2]),
    "clamp_limit": OBJECTS | WORDS | st.sampled_from([-1.0, *NO_NUMBERS]),
}
NO_EXPERTS = OBJECTS | WORDS | NUMBERS | st.none()
NO_INTEGER = st.sampled_from(["0", 0.0, 2.5, float("nan"), True, None])
STATIC = nvfp4_moe.prepare_experts(LAYER.w13, LAYER.w2, input_amax=1.0, intermediate_amax=1.0)
FUNCTIONS = {
    "nvfp4_quantize": Function(
        nvfp4_moe.nvfp4_quantize,
        {"a": X, "a_global_sf": 1 / 2688, "per_token_activation": True},
        QUANTIZER
        | {
            "a": tensor(X, primary=True),
            "do_shuffle": NOT_A_FLAG | st.none(),
            "per_token_activation": NOT_A_FLAG | st.none(),
            "enable_pdl": NOT_A_FLAG_OR_NONE,
            "sf_vec_size": OBJECTS | WORDS | st.sampled_from([0, 32, None, 16.5]),
            "build": NO_NAME_OR_NONE,
            "out_scale": OBJECTS
            | WORDS
            | st.sampled_from([0.5, ONE.half(), ONE.repeat(2), ONE[:0], ONE.to("meta")]),
            "expanded_idx_to_permuted_idx": tensor(
                torch.arange(32, dtype=torch.int32), optional=True
            ),
        },
    ),
    "mm_fp4": Function(
        nvfp4_moe.mm_fp4,
        DENSE,
        {
            "a": tensor(DENSE["a"], primary=True),
            "a_descale": tensor(DENSE["a_descale"], flat=True),
            "alpha": tensor(DENSE["alpha"], optional=True, flat=True),
            "out": tensor(torch.zeros(33, 64, dtype=torch.bfloat16), optional=True),
            "out_dtype": NO_DTYPE,
            "block_size": OBJECTS | WORDS | st.sampled_from([0, 32, None]),
            "use_nvfp4": NOT_A_FLAG | st.sampled_from([None, False]),
            "use_8x4_sf_layout": NOT_A_FLAG | st.none(),
            "enable_pdl": NOT_A_FLAG | st.none(),
            "backend": NO_NAME,
        },
        also=("b",),
    ),
    "silu_and_mul_nvfp4_quantize": Function(
        nvfp4_moe.silu_and_mul_nvfp4_quantize,
        {"x": X},
        QUANTIZER | {"x": tensor(X, primary=True), "build": NO_NAME},
    ),
    "add_rmsnorm_nvfp4_quantize": Function(
        lambda residual=X, **given: nvfp4_moe.add_rmsnorm_nvfp4_quantize(
            residual=residual.clone() if residual is X else residual, **given
        ),
        {"x": X, "weight": X[0].contiguous()},
        QUANTIZER
        | {
            "x": tensor(X, primary=True),
            "residual": tensor(X),
            "weight": tensor(X[0].contiguous()),
            "eps": OBJECTS | WORDS | st.sampled_from([-1.0, 1e39, float("nan"), None, True]),
            "build": NO_NAME,
        },
        also=("residual",),  # which must be as x is
    ),
    "fused_moe": Function(
        nvfp4_moe.fused_moe,
        {
            "hidden_states": LAYER.x,
            "experts": LAYER.experts,
            "routing": (LAYER.ids, LAYER.weights),
        },
        FUSED,
        also=("num_experts",),  # which bounds the offset
    ),
    "prepare_experts": Function(
        nvfp4_moe.prepare_experts,
        {"w13": LAYER.w13, "w2": LAYER.w2},
        WEIGHTS | {"input_amax": NO_AMAX, "intermediate_amax": NO_AMAX},
        also=("w13", "w2"),  # which must fit each other
    ),
    "assemble_experts": Function(
        nvfp4_moe.assemble_experts,
        QUANTIZED,
        {k: v for k, v in WEIGHTS.items() if k not in ("w13", "w2", "recipe")}
        | {name: tensor(t, primary=name == "w13_codes") for name, t in QUANTIZED.items()}
        | {name: tensor(FOUR) | DECODE for name in ("w13_decode", "w2_decode")}
        | {"input_amax": NO_AMAX, "intermediate_amax": NO_AMAX},
        also=("w13_codes", "w2_codes"),
    ),
    "fake_quantized_moe": Function(
        nvfp4_moe.fake_quantized_moe,
        {
            "x": LAYER.x,
            "w13": LAYER.w13,
            "w2": LAYER.w2,
            "routing": (LAYER.ids, LAYER.weights),
        },
        {k: v for k, v in WEIGHTS.items() if k != "w13"}
        | {k: FUSED[k] for k in ("backend", "fast_math", "nvfp4_4over6", "output_dtype")}
        | {
            "x": tensor(LAYER.x),
            "build": NO_NAME,
            "batch_invariant": NOT_A_FLAG | st.none(),
            "experts": OBJECTS | WORDS | NUMBERS,
            "routing": OBJECTS | WORDS | NUMBERS | st.sampled_from([None, (LOGITS, ROUTING)]),
        },
        also=("w13", "w2"),
    ),
    "autotune_fused_moe": Function(
        nvfp4_moe.autotune_fused_moe,
        {"experts": LAYER.experts, "tokens": 8, "top_k": 2},
        {
            "experts": OBJECTS | WORDS | NUMBERS | st.none(),
            "tokens": WORDS | st.sampled_from([0, -1, 2.5, True, None, [0], ["x"], object()]),
            "top_k": NO_COUNT | st.sampled_from([0, 5, None]),
            "activation": NO_NAME_OR_NONE,
            "num_experts": NO_COUNT | st.sampled_from([0, 3]),
            "local_expert_offset": NO_COUNT | st.sampled_from([1, 5, None]),
        },
    ),
    "Routing": Function(
        Routing,
        {"method": RoutingMethodType.DeepSeekV3, "top_k": 2},
        {
            "method": OBJECTS | WORDS | st.sampled_from([-1, 10, 99, 2.5, True, None]),
            "top_k": NO_COUNT | st.sampled_from([0, None]),
            "n_group": NO_COUNT,
            "topk_group": NO_COUNT | st.just(2),
            "routed_scaling_factor": OBJECTS | WORDS | st.sampled_from([float("nan"), True]),
            "norm_topk_prob": NOT_A_FLAG | st.none(),
        },
    ),
    "quantization_statistics": Function(
        nvfp4_moe.quantization_statistics,
        {"x": X, "recipe": Recipe()},
        {
            "x": tensor(X, primary=True),
            "recipe": NO_RECIPE,
            "experts": OBJECTS
            | WORDS
            | st.sampled_from([ONE.expand(32), torch.zeros(3, dtype=torch.int32)]),
            "num_experts": NO_COUNT | st.sampled_from([0, None]),
            "encode_scale": OBJECTS | WORDS | st.sampled_from([1.0, ONE.half(), ONE.repeat(3)]),
        },
    ),
    "weight_statistics": Function(
        nvfp4_moe.weight_statistics,
        {"w": LAYER.w13},
        {"w": tensor(LAYER.w13, primary=True), "recipe": NO_RECIPE},
    ),
    "convert": Function(
        checkpoints.convert,
        {"source": "/nowhere/a", "destination": "/nowhere/b"},
        {
            "source": NO_PATH,
            "destination": NO_PATH,
            "recipe": NO_RECIPE | st.just("exact"),
            "exclude": WORDS | st.sampled_from([3, None, [3], "model.layers.0.*"]),
            "input_scale": NOT_A_FLAG | st.none(),
            "device": NO_DEVICE,
            "progress": NO_FUNCTION,
        },
    ),
    "load_experts": Function(
        checkpoints.load_experts,
        {"folder": "/nowhere/a", "layer": 0},
        {
            "folder": NO_PATH,
            "layer": st.sampled_from([-1, 2.5, None, True, [0], object()]),
            "activation": OBJECTS | WORDS | st.sampled_from([3, ActivationType.SwigluBias]),
            "device": NO_DEVICE,
            "static": NOT_A_FLAG | st.none(),
            "local": OBJECTS | WORDS | st.sampled_from([4, (0, 4)]),
            "progress": NO_FUNCTION,
        },
    ),
    "select_experts": Function(
        parallel.select_experts,
        {"experts": LAYER.experts, "first": 0, "count": 1},
        {"experts": NO_EXPERTS, "first": OBJECTS | NO_INTEGER, "count": OBJECTS | NO_INTEGER},
    ),
    "shard_experts": Function(
        parallel.shard_experts,
        {"experts": LAYER.experts, "rank": 0, "shards": 2},
        {"experts": NO_EXPERTS, "rank": OBJECTS | NO_INTEGER, "shards": OBJECTS | NO_INTEGER},
    ),
    "with_cute_dsl": Function(
        nvfp4_moe.with_cute_dsl, {"experts": LAYER.experts}, {"experts": NO_EXPERTS}
    ),
    "with_cutlass": Function(nvfp4_moe.with_cutlass, {"experts": STATIC}, {"experts": NO_EXPERTS}),
    "statistics_table": Function(
        nvfp4_moe.statistics_table, {"named": {}}, {"named": WORDS | NUMBERS | st.just([1])}
    ),
    "activation_of": Function(
        activation_of,
        {"server": "vllm", "backend": "marlin", "quantization": "modelopt_fp4", "per_token": False},
        {"server": NO_NAME, "backend": NO_NAME, "quantization": NO_NAME, "per_token": NOT_A_FLAG},
    ),
    "Recipe": Function(
        Recipe,
        {},
        {
            "math": NO_NAME,
            "build": NO_NAME | st.just("cutlass"),
            "four_over_six": NO_RECIPE,
        },
    ),
}
BEYOND = {
    "autotune_fused_moe": "only a GPU can be measured",
    "convert": "there is no such folder",
    "load_experts": "there is no such folder",
}
"""The error that a function raises here with right arguments."""
CASES = [(name, argument) for name, f in FUNCTIONS.items() for argument in f.wrong]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_right_is_accepted(name):
    f = FUNCTIONS[name]
    if name in BEYOND:
        with pytest.raises(ValueError, match=BEYOND[name]):
            f.call(**f.right)
    else:
        f.call(**f.right)


@pytest.mark.parametrize(("name", "argument"), CASES, ids=["-".join(c) for c in CASES])
@settings(max_examples=12)
@given(data=st.data())
def test_a_wrong_argument_is_named(name, argument, data):
    f = FUNCTIONS[name]
    value = data.draw(f.wrong[argument])
    with pytest.raises((TypeError, ValueError)) as raised:
        f.call(**{**f.right, argument: value})
    message = str(raised.value)
    names = "|".join(map(re.escape, (argument, *f.also)))
    form = rf"({names})[\[\]0-9, ]* (is|are|has|holds) .+; .*must"
    assert re.match(form, message), f"{argument}={value!r}: {message}"
    assert "\n" not in message and len(message) < 400
