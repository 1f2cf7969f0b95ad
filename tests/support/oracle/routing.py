"""Experts and weights against FlashInfer's routing kernels.

Rows that are not equal must lie in `routing_bounds`: FlashInfer's exp and tanh are approximate, so
nearly equal scores may change places, and last bits of weights differ. Nothing is asked of a row of
which the bounds say nothing: with fewer than top_k scores above -inf the kernels themselves leave it
open.
"""

# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from nvfp4_moe.reference.bounds.routing import determined, routing_bounds
from nvfp4_moe.reference.moe.routing import Routing, RoutingMethodType, refusal, route

from . import inputs
from .cases import Golden, Outcome, tensor
from .draw import bf16_bits
from .implementations import REFERENCE, Implementation
from .inputs import Case

GIVEN = "{}/ids"


def routing_of(c: Case) -> Routing:
    method = RoutingMethodType[c["method"]]
    scale = c["scale"] if method.biased else None
    groups = c["n_group"] or None, c["topk_group"] or None
    return Routing(method, c["K"], *groups, scale, c["norm"])


def logits_of(c: Case, seed: int) -> torch.Tensor:
    """[T, E] bf16 or fp32; torch's own cast would change the sign of NaNs."""
    x = inputs.logits(c, seed)
    return tensor(bf16_bits(x), "bf16") if c["bf16"] else torch.from_numpy(x.copy())


def bias_of(c: Case, seed: int) -> torch.Tensor | None:
    x = inputs.routing_bias(c, seed)
    if x is None:
        return None
    if c["bias"].startswith("bf16"):
        return tensor(bf16_bits(x), "bf16")
    return torch.from_numpy(x.copy())


def compare(
    golden: Golden, ours: Implementation, every: int = 1, most_tokens: int = 1 << 20
) -> Iterator[Outcome]:
    for c in golden.cases("routing", GIVEN, every):
        routing = routing_of(c)
        logits, bias = logits_of(c, golden.seed), bias_of(c, golden.seed)
        has_shared_slots = c["shared"] > 0
        assert refusal(routing, c["E"], bias is not None) is None, c["name"]
        if c["T"] > most_tokens or ours.routing_refusal(routing) is not None:
            continue  # the layer then routes by the reference
        ids, weights = (
            t.cpu()
            for t in ours.route(
                logits.to(ours.device), routing, None if bias is None else bias.to(ours.device)
            )
        )
        top_k = c["K"]
        want_ids = torch.from_numpy(golden.arrays[f"{c['name']}/ids"].astype(np.int32))
        given = golden.arrays[f"{c['name']}/w"]
        want = tensor(given[:, :top_k], "bf16")
        same = (ids == want_ids) & (
            (weights.view(torch.int16) == want.view(torch.int16)) | weights.isnan() & want.isnan()
        )
        rows = (~same.all(1)).nonzero()[:, 0]
        outside = 0
        if rows.numel():
            bounds = routing_bounds(logits[rows], routing, bias)
            outside = bounds.outside(want_ids[rows], want[rows].double())
        if has_shared_slots:
            one = int(bf16_bits(np.ones(1, np.float32))[0])
            outside += int((given[:, top_k:] != one).sum())
        group = f"routing, {c['method']}, {c['kernel']}"
        first = f", row {int(rows[0])} among {rows.numel()} not equal" if rows.numel() else ""
        yield Outcome(group, c["name"], len(ids), outside, first)


def compare_exactly(
    golden: Golden, ours: Implementation, every: int = 1, most_tokens: int = 1 << 20
) -> Iterator[Outcome]:
    """With the functions of the GPU that FlashInfer ran on: every bit of every determined row."""
    for c in golden.cases("routing", GIVEN, every):
        routing = replace(routing_of(c), functions="hopper")
        if c["T"] > most_tokens or ours.routing_refusal(routing) is not None:
            continue
        logits, bias = logits_of(c, golden.seed), bias_of(c, golden.seed)
        result = route(logits, routing, bias)
        ids, weights = result.ids, result.weights_bf16
        if ours is not REFERENCE:
            given = logits.to(ours.device), routing, None if bias is None else bias.to(ours.device)
            ids, weights = (t.cpu() for t in ours.route(*given))
        want_ids = torch.from_numpy(golden.arrays[f"{c['name']}/ids"].astype(np.int32))
        want = tensor(golden.arrays[f"{c['name']}/w"][:, : c["K"]], "bf16")
        same = (ids == want_ids) & (
            (weights.view(torch.int16) == want.view(torch.int16)) | weights.isnan() & want.isnan()
        )
        wrong = ~same.all(1) & determined(result.scores, routing)
        group = f"routing to the bit, {c['method']}"
        first = f", first at row {int(wrong.nonzero()[0])}" if wrong.any() else ""
        yield Outcome(group, c["name"], len(want), int(wrong.sum()), first)
