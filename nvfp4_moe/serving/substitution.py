"""Our fused layer as a solution of FlashInfer's substitution hook, `flashinfer.trace_apply`.

Any server that calls FlashInfer's two functions then gets ours for the shapes that are chosen.
FlashInfer looks the name of a call's definition up, and calls the solution before it asks which GPU this
is.

The hook gives a solution a part of the call's arguments, copies no output into `output`, and unwraps a
list of one (flashinfer-python 0.7.2.post1, `trace_apply/adapt.py:28` and `:195`; 0.7.4 is the same). A
solution of ours therefore reads the whole call from the hook, which holds it, and returns a list in a
list. A hook that holds it elsewhere ends in an error, never in another result.
"""

# SPDX-License-Identifier: Apache-2.0
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..kernels.backends import UnsupportedError
from ..kernels.flashinfer import trtllm
from ..kernels.flashinfer.description import Function
from ..kernels.flashinfer.rules import BLACKWELL, sm_of
from ..kernels.moe import api
from ..kernels.quantize.call import UNSET
from ..reference.activation import ActivationType
from ..reference.moe.routing import METHODS, RoutingMethodType
from ..reference.recipe import BLOCK_SIZE, NVFP44Over6Config, NVFP44Over6ErrMode

HOOK = "flashinfer.trace_apply.adapt"
"""The module of FlashInfer that calls a solution."""
NAMESPACE = "namespace"
"""The local variable there that holds the whole call, by the names of its parameters."""
SCRATCH = frozenset({"workspace_buffer"})
"""Arguments that are only memory for FlashInfer's own steps."""
GIVEN = "given"
"""The name, among routing methods, of a routing that the caller has computed."""
GPUS = ((8, 0), (8, 6), (8, 9), (9, 0), *BLACKWELL)
FILE, ENTRY = "solution.py", "run"


@dataclass(frozen=True)
class LayerShape:
    """The sizes by which FlashInfer names the definition of a layer's calls.

    Args:
        hidden_size, intermediate_size: of the weights as they are given to FlashInfer, padding included.
        num_experts: of all ranks; num_local: of this one.
        groups: n_group and topk_group of DeepSeekV3; None: it has no groups.
    """

    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    num_local: int
    activation: ActivationType = ActivationType.Swiglu
    groups: tuple[int, int] | None = None


def routings() -> tuple[str, ...]:
    """Return the names that `solutions` takes: of methods, and `GIVEN`."""
    return (*(method.name for method in METHODS), GIVEN)


def solutions(shape: LayerShape, routing: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield the definition of a shape's calls and our solution of it, as flashinfer-bench writes them.

    FlashInfer itself makes the definition, from a call on meta tensors, so that its name is the one that
    it will look up. A given routing has two: that of packed ids names top_k, that of a tuple does not.
    Nothing is yielded for a method of which FlashInfer traces no calls.

    Args:
        routing: one of `routings()`.
    """
    function = trtllm.ROUTED if routing == GIVEN else trtllm.FROM_LOGITS
    constants = _constants(shape, routing)
    trace = function.get().fi_trace  # type: ignore[attr-defined]
    for chosen in _chosen(shape, routing):
        definition = trace(**chosen, **_call(shape), **constants)
        if definition:
            yield definition, _solution(definition["name"], function, constants)


def _constants(shape: LayerShape, routing: str) -> dict[str, Any]:
    """Return the numbers of a call, which its definition fixes."""
    n_group, topk_group = shape.groups or (None, None)
    method = RoutingMethodType.Renormalize if routing == GIVEN else RoutingMethodType[routing]
    return {
        "num_experts": shape.num_experts,
        "top_k": shape.top_k,
        "n_group": n_group,
        "topk_group": topk_group,
        "intermediate_size": shape.intermediate_size,
        "local_num_experts": shape.num_local,
        "routing_method_type": int(method),
        "activation_type": int(shape.activation),
    }


def _empty(dtype: torch.dtype, *size: int) -> torch.Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def _chosen(shape: LayerShape, routing: str) -> Iterator[dict[str, Any]]:
    """Yield the routing of one token, in each form that a call may have."""
    if routing != GIVEN:
        yield {"routing_logits": _empty(torch.float32, 1, shape.num_experts)}
        return
    ids = _empty(torch.int32, 1, shape.top_k)
    yield {"topk_ids": ids}
    yield {"topk_ids": (ids, _empty(torch.bfloat16, 1, shape.top_k))}


def _call(shape: LayerShape) -> dict[str, Any]:
    """Return the other tensors of a call of one token, per token, without memory."""
    e, h, i = shape.num_local, shape.hidden_size, shape.intermediate_size
    rows = i * (2 if shape.activation.gated else 1)
    empty, codes, e4m3, fp32 = _empty, torch.uint8, torch.float8_e4m3fn, torch.float32
    scalars = ("output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar")
    return {
        "routing_bias": None,
        "hidden_states": empty(codes, 1, h // 2),
        "hidden_states_scale": empty(e4m3, 1, h // BLOCK_SIZE),
        "gemm1_weights": empty(codes, e, rows, h // 2),
        "gemm1_weights_scale": empty(e4m3, e, rows, h // BLOCK_SIZE),
        "gemm2_weights": empty(codes, e, h, i // 2),
        "gemm2_weights_scale": empty(e4m3, e, h, i // BLOCK_SIZE),
        **{name: empty(fp32, e) for name in scalars},
        "per_token_scale": empty(fp32, 1),
        "local_expert_offset": 0,
        "routed_scaling_factor": None,
    }


def _solution(name: str, function: Function, constants: Mapping[str, Any]) -> dict[str, Any]:
    given = ", ".join(f"{key}={value!r}" for key, value in constants.items())
    source = (
        '"""NVFP4 mixture of experts with a per-token scale, by nvfp4-moe."""\n'
        "from nvfp4_moe.serving.substitution import substitute\n\n"
        f"{ENTRY} = substitute({function.name!r}, {given})\n"
    )
    return {
        "name": f"nvfp4_moe_{name}",
        "definition": name,
        "author": "nvfp4-moe",
        "description": "The fused NVFP4 layer of nvfp4-moe: Triton on a GPU, the reference on a CPU.",
        "spec": {
            "language": "triton",
            "target_hardware": [sm_of(gpu).replace("_", "") for gpu in GPUS],
            "entry_point": f"{FILE}::{ENTRY}",
            "dependencies": ["nvfp4-moe"],
            "destination_passing_style": False,
        },
        "sources": [{"path": FILE, "content": source}],
    }


def substitute(name: str, **constants: Any) -> Callable[..., Any]:
    """Return the function of a solution.

    Called by the hook, it serves the whole call and returns FlashInfer's own list: the output, written
    into `output` where that is given; three tensors without `do_finalize`. Called by anybody else, as
    flashinfer-bench does, it takes the definition's inputs and returns the output [T, H] bf16. Triton
    serves tensors on a GPU, the reference those on a CPU; FlashInfer, which would call the hook again,
    never does.

    Args:
        name: of FlashInfer's function.
        constants: numbers of the call that the definition fixes.

    Raises:
        UnsupportedError: (the function) a call that ours does not serve, or a hook that is not known.
        TypeError, ValueError: (the function) an argument that no backend accepts, as MXFP4 weights.
    """
    ours = getattr(api, name)
    known = inspect.signature(ours).parameters
    required = [n for n, p in known.items() if p.default is p.empty]

    def run(**inputs: Any) -> Any:
        caller = sys._getframe(1)
        by_hook = caller.f_globals.get("__name__") == HOOK
        call = (
            _whole(caller.f_locals, known) if by_hook else _by_inputs(constants | inputs, required)
        )
        backend = "triton" if call["hidden_states"].is_cuda else "reference"
        results = ours(**call, backend=backend)
        return [results] if by_hook else results[0]

    return run


def _by_inputs(given: dict[str, Any], required: list[str]) -> dict[str, Any]:
    """Return the arguments of a call by a definition's inputs, which leaves optional ones out."""
    return {name: None for name in required} | given


def _whole(local: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the call that the hook serves, in our own types."""
    namespace = local.get(NAMESPACE)
    if not isinstance(namespace, dict) or "hidden_states" not in namespace:
        raise UnsupportedError(
            f"{HOOK} of this flashinfer-python holds no {NAMESPACE!r} with the call's arguments, and "
            "without them the result could be another one: take the solution away"
        )
    call = {}
    for name, value in namespace.items():
        if name == "nvfp4_4over6":
            call[name] = _four_over_six(value)
        elif name in known:
            call[name] = value
        elif value is not None and name not in SCRATCH:
            raise UnsupportedError(f"{name} is given, and nvfp4-moe's layer has no such argument")
    return call


def _four_over_six(theirs: Any) -> Any:
    if theirs is None:
        return None
    if type(theirs).__name__ == "_UnsetType":
        return UNSET
    mode = NVFP44Over6ErrMode(int(theirs.err_mode))
    return NVFP44Over6Config(int(theirs.e4m3_max), mode, bool(theirs.err_use_fast_math))
