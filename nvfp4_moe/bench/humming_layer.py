"""The layer with humming's grouped GEMMs: NVFP4 weights, bf16 activations.

humming (humming-kernels on PyPI) has two forms of a grouped GEMM, and `tune` measures which is faster
for given inputs. "indexed" reads the hidden states through a list of slots in blocks of one expert.
"grouped_contiguous" reads rows that were gathered before. Both take the tiles that humming's own
heuristics choose. The other steps are in `rival_steps.py`.
"""

# SPDX-License-Identifier: Apache-2.0
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .bf16_layer import activated
from .bf16_weights import Quantized
from .clock import microseconds
from .rival_steps import blocked, gathered, grouped, sort, summed

FORMS = ("indexed", "grouped_contiguous")
_LOCKS = 16384
"""Counters by which the programs that share a tile of the output wait for one another."""


@dataclass(frozen=True)
class Layer:
    """A layer's weights as humming lays them out."""

    module: (
        Any  # a torch.nn.Module: the parameters w13_... and w2_..., and what humming knows of them
    )
    device: torch.device


@dataclass(frozen=True)
class Plan:
    """A form of the GEMM, and humming's tiles of both."""

    form: str
    first: dict[str, Any]
    second: dict[str, Any]
    slot: torch.Tensor  # [slots] int32: 0, 1, 2 ...


def prepare_layer(w13: Quantized, w2: Quantized) -> Layer:
    """Lay the weights out for humming, by its own functions.

    Args:
        w13: N = 2 I, rows [up; gate], K = H.
        w2: N = H, K = I.
    """
    from humming.layer import HummingMethod
    from humming.schema import BaseWeightSchema, HummingInputSchema

    module: Any = torch.nn.Module()
    device = w13[0].device
    experts = w13[0].shape[0]
    format = BaseWeightSchema.from_config({"quant_method": "modelopt", "quant_algo": "nvfp4"})
    for name, (codes, scales, decode) in (("w13", w13), ("w2", w2)):
        n, k = codes.shape[1], codes.shape[2] * 2
        schema, converted = format.convert_humming(
            tensors={
                "weight": codes,
                "weight_scale": scales.view(torch.float8_e4m3fn),
                "weight_scale_2": decode.reshape(experts, 1),
            },
            shape_n_stacks=[n],
            shape_k_stacks=[k],
            num_experts=experts,
            param_dtype=torch.bfloat16,
        )
        for part, tensor in converted.items():
            setattr(module, f"{name}_{part}", torch.nn.Parameter(tensor, requires_grad=False))
        HummingMethod.prepare_layer_meta(
            layer=module,
            shape_n=n,
            shape_k=k,
            pad_n_to_multiple=256,
            pad_k_to_multiple=128,
            input_schema=HummingInputSchema(),
            weight_schema=schema,
            has_bias=False,
            num_experts=experts,
            torch_dtype=torch.bfloat16,
            sublayer_name=name,
        )
        HummingMethod.transform_humming_layer(module, sublayer_name=name)
    module.register_buffer("locks", torch.zeros(_LOCKS, dtype=torch.int32, device=device))
    return Layer(module, device)


def plan(layer: Layer, form: str, slots: int) -> Plan:
    """Return the tiles that humming chooses for a number of slots."""
    first, second = (_tiles(layer, form, name, slots) for name in ("w13", "w2"))
    return Plan(form, first, second, torch.arange(slots, dtype=torch.int32, device=layer.device))


def _tiles(layer: Layer, form: str, name: str, slots: int) -> dict[str, Any]:
    from humming.config import GemmType
    from humming.layer import HummingMethod

    ranges = HummingMethod.get_default_tuning_configs(
        layer=layer.module, use_f16_accum=False, gemm_type=GemmType(form), sublayer_name=name
    )
    for above, most, tiles in ranges:
        if above < slots <= most:
            return dict(tiles)
    raise RuntimeError(f"humming has no tiles for {slots} slots of {name}")


def compile_kernels(layer: Layer, plans: list[Plan]) -> None:
    """Compile the GEMMs of the plans side by side; humming keeps them in its cache on disk."""
    from humming.kernel import HummingKernel

    jobs = {
        (layer.module.humming_metas[name].to_str(), _compute(p), json.dumps(tiles))
        for p in plans
        for name, tiles in (("w13", p.first), ("w2", p.second))
    }
    index = layer.device.index or 0
    with ThreadPoolExecutor(len(jobs)) as pool:
        list(pool.map(lambda job: HummingKernel.prepare_kernels(*job, index), sorted(jobs)))


def _compute(p: Plan) -> str:
    return json.dumps({"use_f16_accum": False, "gemm_type": p.form})


def run(x: torch.Tensor, logits: torch.Tensor, layer: Layer, top_k: int, p: Plan) -> torch.Tensor:
    """Compute the layer, from router logits to the weighted sum.

    Args:
        x: [T, H] bf16.
        logits: [T, E] fp32.
        layer: of `prepare_layer`.
        top_k: experts of a token.
        p: of `plan`, for T * top_k slots.

    Returns:
        [T, H] bf16.
    """
    s = sort(logits, top_k)
    slots = logits.shape[0] * top_k
    if p.form == "indexed":
        first_size, second_size = (tiles["block_shape"][0] for tiles in (p.first, p.second))
        blocks = blocked(s, first_size)
        y = _gemm(x, layer, "w13", p, slots, top_k=top_k, **_indexed(blocks))
        if second_size != first_size:
            blocks = blocked(s, second_size)
        a = activated(y, s.permutation.end)
        rows = _gemm(a, layer, "w2", p, slots, top_k=1, **_indexed(blocks))
        return summed(rows, p.slot, s.weights)
    groups = grouped(s)
    y = _gemm(gathered(x, groups.token), layer, "w13", p, slots, expert_layout=groups.first)
    a = activated(y, s.permutation.end)
    rows = _gemm(a, layer, "w2", p, slots, expert_layout=groups.first)
    return summed(rows, s.permutation.permuted, s.weights)


def _indexed(blocks: Any) -> dict[str, torch.Tensor]:
    return {
        "sorted_ids": blocks.slots,
        "expert_ids": blocks.expert,
        "num_tokens_padded": blocks.used,
    }


def _gemm(
    x: torch.Tensor, layer: Layer, name: str, p: Plan, slots: int, **options: Any
) -> torch.Tensor:
    """Return [slots, N] bf16: by expanded index if indexed, otherwise by permuted row."""
    from humming.layer import HummingMethod

    meta = layer.module.humming_metas[name]
    out = x.new_empty((slots, meta.shape_n - meta.pad_shape_n))
    HummingMethod.forward_layer(
        layer=layer.module,
        inputs=x,
        outputs=out,
        valid_shape_m=slots,
        compute_config=_compute(p),
        tuning_config=json.dumps(p.first if name == "w13" else p.second),
        sublayer_name=name,
        **options,
    )
    return out


def tune(x: torch.Tensor, logits: torch.Tensor, layer: Layer, top_k: int) -> Plan:
    """Return the form of the GEMM that is faster for these inputs, after compiling both."""
    plans = [plan(layer, form, logits.shape[0] * top_k) for form in FORMS]
    compile_kernels(layer, plans)
    calls: list[Callable[[], object]] = [partial(run, x, logits, layer, top_k, p) for p in plans]
    times = [microseconds(call, calls=1) for call in calls]
    return plans[times.index(min(times))]
