"""Realistic mistakes, each put into a run of the reference.

A mutant replaces a stage (`stages`), the quantizer of the hidden states (`quantize`), the routing
(`routed`), what the fused call is handed (`inputs`), or its result (`after`).
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from nvfp4_moe.differential.conforming import SETTINGS, Setting, perform
from nvfp4_moe.differential.stages import Call, Run
from nvfp4_moe.reference.moe.activations import Activations, quantize_activations
from nvfp4_moe.reference.moe.layer import MoEResult, Stages
from nvfp4_moe.reference.recipe import Recipe, SfLayout

from .arguments import (
    gate_and_up_exchanged,
    laid_out,
    natural_rows,
    other_activations,
    other_experts,
    other_tensor,
    padding_filled,
)
from .edges import EDGES
from .quantizers import QUANTIZERS, as_activations, as_requantize, read_otherwise
from .stages import (
    GEMMS,
    ROUNDINGS,
    ROUTINGS,
    as_gemm,
    beta_after_scale,
    bias_after_scale,
    clamp_after_scale,
    coarse_sigmoid,
    in_bf16,
    of_other_experts,
    one_lost,
    other_activation,
    other_finalize,
    other_order,
    sigmoid_of_up,
    unfused,
    weights_first,
    weights_in_fp16,
)
from .tensors import (
    first_block_dropped,
    flip,
    less,
    next_row,
    of_bytes,
    of_one,
    swap_nibbles,
    without_subnormals,
)

Given = dict[str, Any]
Tensor = torch.Tensor


EVERY_SETTING: dict[str, Setting] = SETTINGS | EDGES


@dataclass(frozen=True)
class Mutant:
    name: str
    stage: str  # of `judge.STAGES`: the one to be named
    setting: str = "qwen"
    stages: Stages = Stages()  # noqa: RUF009 (it is frozen)
    quantize: Callable[[Tensor, Recipe], Activations] = quantize_activations
    routed: Callable[[Call], tuple[Tensor, Tensor]] | None = None
    inputs: Callable[[Given], Given] = lambda given: given
    after: Callable[[MoEResult], MoEResult] = lambda result: result

    def call(self, seed: int) -> Call:
        return EVERY_SETTING[self.setting].call(seed)

    def run(self, call: Call) -> Run:
        routed = None if self.routed is None else self.routed(call)
        run = perform(call, self.stages, routed=routed, quantize=self.quantize, inputs=self.inputs)
        return replace(run, result=self.after(run.result))


_SETTINGS = {
    "ties of a code round away from zero": "grid",
    "reciprocals by division": "grid",
    "ties of bf16 rounded up": "grid",
    "input rounded through fp16": "any size",
    "subnormal block scales flushed": "far below",
    "4over6: the fast error": "near ties of 4over6",
    "hidden states below 2^-6 lost": "far below",
    "weights below 2^-6 lost": "far below",
    "weights in fp16": "any size",
}
"""The settings of mistakes that ordinary numbers hide."""


def _setting(name: str) -> str:
    return _SETTINGS.get(name, "qwen")


def _mutants() -> Iterator[Mutant]:
    for name, (setting, routed) in ROUTINGS.items():
        yield Mutant(f"routing: {name}", "routing", setting, routed=routed)
    for name, quantizer in QUANTIZERS.items():
        yield Mutant(
            f"activations: {name}",
            "activations",
            _setting(name),
            quantize=as_activations(quantizer),
        )
    for name, inputs in {
        "nibbles of weights exchanged": other_tensor("gemm1_weights", swap_nibbles),
        "rows not shuffled": natural_rows(1),
        "scales linear, read as 128x4": laid_out(1, SfLayout.layout_linear),
        "scales 8x4, read as 128x4": laid_out(1, SfLayout.layout_8x4),
        "scales of the next expert": other_tensor("gemm1_weights_scale", of_bytes(next_row)),
        "gate and up exchanged": other_experts(gate_and_up_exchanged),
        "one weight off by one": other_tensor("gemm1_weights", of_one(flip)),
        "one block scale of a weight off by one": other_tensor(
            "gemm1_weights_scale", of_bytes(of_one(less))
        ),
        "subnormal block scales of weights flushed": other_tensor(
            "gemm1_weights_scale", of_bytes(without_subnormals)
        ),
        "hidden states of the next token": other_activations("hidden_states", next_row),
        "block scales of the next token": other_activations("block_scales", next_row),
        "padding not zero": other_experts(padding_filled),
    }.items():
        setting = "far below" if "subnormal" in name else "qwen"
        yield Mutant(f"GEMM 1: {name}", "accumulator1", setting, inputs=inputs)
    yield Mutant(
        "GEMM 1: local offset ignored",
        "accumulator1",
        "deepseek",
        inputs=lambda given: given | {"local_expert_offset": 0},
    )
    for name, gemm in GEMMS.items():
        stages = Stages(gemm1=as_gemm(gemm))
        yield Mutant(f"GEMM 1: {name}", "accumulator1", _setting(name), stages=stages)
    for name, inputs in {
        "per-token scale forgotten": other_activations("per_token_scale", torch.ones_like),
        "per-token scale applied twice": other_activations("per_token_scale", torch.square),
        "per-token scale of the next row": other_activations("per_token_scale", next_row),
        "scalars of the next expert": other_experts(
            lambda e: {
                "output1_scale_scalar": next_row(e.output1_scale_scalar),
                "output1_scale_gate_scalar": next_row(e.output1_scale_gate_scalar),
            }
        ),
        "the up scalar forgotten": other_tensor("output1_scale_scalar", torch.ones_like),
        "scalars rounded to bf16": other_tensor(
            "output1_scale_scalar", lambda t: t.bfloat16().float()
        ),
    }.items():
        yield Mutant(f"activation: {name}", "intermediate", inputs=inputs)
    yield Mutant(
        "activation: sigmoid of up", "intermediate", stages=other_activation(sigmoid_of_up)
    )
    yield Mutant(
        "activation: an error of 2^-11", "intermediate", stages=other_activation(coarse_sigmoid)
    )
    for name, stages in {
        "alpha ignored": of_other_experts(gemm1_alpha=None),
        "beta ignored": of_other_experts(gemm1_beta=None),
        "beta after the scale": other_activation(beta_after_scale),
        "limit ignored": of_other_experts(gemm1_clamp_limit=None),
        "limit after the scale": other_activation(clamp_after_scale),
        "bias forgotten": of_other_experts(gemm1_bias=None),
        "bias divided twice": other_activation(bias_after_scale),
    }.items():
        yield Mutant(f"activation: {name}", "intermediate", "gpt-oss", stages=stages)
    for name, rounding in ROUNDINGS.items():
        if name != "kept in fp32" and name != "rounded to fp16":
            stages = Stages(round_intermediate=rounding)
            yield Mutant(f"intermediate: {name}", "intermediate", _setting(name), stages=stages)
    for name, quantizer in QUANTIZERS.items():
        stages = Stages(requantize=as_requantize(quantizer))
        yield Mutant(f"requantization: {name}", "requantization", _setting(name), stages=stages)
    for name, stages in {
        "left out": read_otherwise(lambda v, s, y: (y, torch.ones_like(s))),
        "per-token scale forgotten": read_otherwise(lambda v, s, y: (v, torch.ones_like(s))),
        "per-token scale of the next row": read_otherwise(lambda v, s, y: (v, s.roll(1, 0))),
        "codes of the next row": read_otherwise(lambda v, s, y: (v.roll(1, 0), s)),
        "per-token scale applied twice": read_otherwise(lambda v, s, y: (v, s * s)),
    }.items():
        yield Mutant(f"GEMM 2: requantization {name}", "rows", stages=stages)
    for name, gemm in GEMMS.items():
        stages = Stages(gemm2=as_gemm(gemm))
        yield Mutant(f"GEMM 2: {name}", "rows", _setting(name), stages=stages)
    for name, inputs in {
        "rows not shuffled": natural_rows(2),
        "scales linear, read as 128x4": laid_out(2, SfLayout.layout_linear),
        "nibbles of weights exchanged": other_tensor("gemm2_weights", swap_nibbles),
        "scalar of the next expert": other_tensor("output2_scale_scalar", next_row),
        "one weight off by one": other_tensor("gemm2_weights", of_one(flip)),
        "first block scales dropped": other_tensor(
            "gemm2_weights_scale", of_bytes(first_block_dropped)
        ),
    }.items():
        yield Mutant(f"GEMM 2: {name}", "rows", inputs=inputs)
    yield Mutant(
        "GEMM 2: bias forgotten",
        "rows",
        "gpt-oss",
        inputs=other_experts(lambda e: {"gemm2_bias": None}),
    )
    for name, rounding in ROUNDINGS.items():
        yield Mutant(f"rows: {name}", "rows", _setting(name), stages=Stages(round_rows=rounding))
    for name, stages in {
        "in bf16": other_finalize(in_bf16),
        "products rounded to bf16": other_finalize(unfused),
        "weighted rows rounded": Stages(finalize=weights_first),
        "one addition lost": other_finalize(one_lost),
        "weights left out": other_finalize(lambda rows, w: rows.sum(1)),
        "weights in fp16": Stages(finalize=weights_in_fp16),
    }.items():
        yield Mutant(f"finalize: {name}", "output", _setting(name), stages=stages)
    yield Mutant(
        "finalize: slots ascending, to fp32",
        "output",
        "deepseek",
        stages=Stages(finalize=other_order),
        inputs=lambda given: given | {"output_dtype": torch.float32},
    )
    yield Mutant(
        "output: a stale row",
        "output",
        after=lambda r: replace(r, output=torch.cat([r.output[:-1], r.output[:1]])),
    )


MUTANTS = tuple(_mutants())
