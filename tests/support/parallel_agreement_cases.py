"""Cases of the messages between ranks before a call: reasons, and ranges of experts."""

# SPDX-License-Identifier: Apache-2.0
from typing import Any

import moe_cases
import numpy as np
import pytest
import torch
from assertions import assert_bitwise
from parallel_cases import SHAPE, Rank, agree_on_refusing, case

from nvfp4_moe import Routing, RoutingMethodType
from nvfp4_moe.cases.moe_case import to_device
from nvfp4_moe.kernels.moe import api as moe_api
from nvfp4_moe.parallel import AgreementError, fused_moe_ep, rank_check
from nvfp4_moe.parallel import select_experts as select
from nvfp4_moe.parallel import shard_experts as shard


@case
def long_reasons(r: Rank) -> None:
    """Send reasons of any length and any characters: every rank is told, in shortened words."""
    layer = moe_cases.make(SHAPE)
    for text in ("\u6f22" * 1200, "x" * 10**6, "\udcff\n" * 600, "\U0001f600" * 3000):

        def refuse(*_: Any, text: str = text, **__: Any) -> None:
            raise RuntimeError(text)

        with pytest.MonkeyPatch.context() as patch:
            if r.rank == 1:
                patch.setattr(moe_api, "layer_call", refuse)
            with pytest.raises(AgreementError) as raised:
                r.tp(layer)
        told = str(raised.value)
        assert f"rank 1: RuntimeError: {text[:900]}" in told and told.endswith(" ...")
        assert len(told) < 1100
    agree_on_refusing(r, "activation must be", lambda: r.ep(layer, "all-to-all", activation="bf16"))


@case
def integers_of_other_libraries(r: Rank) -> None:
    """Every kind of integer is sent as an integer."""
    layer = moe_cases.make(SHAPE)
    first, count = r.local(SHAPE.experts)
    given = {"local": (np.int64(first), count), "num_experts": np.int64(SHAPE.experts)}
    got = r.ep(layer, "all-reduce", **given)
    assert_bitwise(got, r.ep(layer, "all-reduce"), "offsets of numpy")


@case
def each_rank_has_its_own_shard(r: Rank) -> None:
    layer = moe_cases.make(SHAPE)
    e, other = layer.experts, r.ranks + 1
    agree_on_refusing(
        r,
        f"rank 1 holds shard 0 of {r.ranks}; it must be shard_experts\\(experts, 1, {r.ranks}",
        lambda: r.tp(layer, shard(e, 0, r.ranks)),
    )
    agree_on_refusing(
        r, f"rank 0 holds shard 0 of {other}", lambda: r.tp(layer, shard(e, r.rank, other))
    )
    agree_on_refusing(r, "rank 0 holds shard 0 of 1", lambda: r.tp(layer, e))
    swapped = shard(e, r.ranks - 1 - r.rank, r.ranks)
    agree_on_refusing(r, "rank 0 holds shard", lambda: r.tp(layer, swapped))


@case
def each_rank_has_the_same_functions_and_contract(r: Rank) -> None:
    layer = moe_cases.make(SHAPE)
    logits = torch.zeros(SHAPE.tokens, SHAPE.experts, device=r.device)
    routing = logits, Routing(RoutingMethodType.Sigmoid, 2, functions="hopper")
    for patched, field in (("checksum", "functions"), ("fingerprint", "contract")):
        with pytest.MonkeyPatch.context() as patch:
            if r.rank == 1:
                patch.setattr(rank_check, patched, lambda *_: "another")
            agree_on_refusing(
                r,
                rf"the ranks' calls differ: {field} is \w{{64}} on .*another on 1",
                lambda: r.ep(layer, "all-reduce", routing=routing),
            )


@case
def arguments_are_checked_as_of_one_process(r: Rank) -> None:
    layer = moe_cases.make(SHAPE)
    for given, message in (
        ({"num_experts": 0}, "num_experts is 0; it must be an integer"),
        ({"check": "no"}, "check is 'no'; it must be True or False"),
    ):
        agree_on_refusing(r, message, lambda given=given: r.ep(layer, "all-reduce", **given))
    agree_on_refusing(r, "check is 1; it must be True or False", lambda: r.tp(layer, check=1))
    agree_on_refusing(
        r,
        r"routing\[0\] is a list of 1; it must be a tensor",
        lambda: fused_moe_ep(
            layer.x.to(r.device),
            to_device(layer.experts, r.device),
            ([1], Routing(RoutingMethodType.Renormalize, 2)),
            local_expert_offset=0,
            group=r.group,
            **r.options,
        ),
    )
    with pytest.raises(TypeError, match="group is 'x'; it must be a process group"):
        r.ep(layer, "all-reduce", group="x")


@case
def experts_of_another_rank(r: Rank) -> None:
    """Offsets that fit together, and on every rank the first experts of the layer."""
    layer = moe_cases.make(SHAPE)
    first, count = r.local(SHAPE.experts)
    mine = select(layer.experts, 0, count)
    agree_on_refusing(
        r,
        "rank 1: ValueError: local_expert_offset is .*; the local experts are those from 0 on",
        lambda: fused_moe_ep(
            layer.x.to(r.device),
            to_device(mine, r.device),
            r.placed((layer.ids, layer.weights)),
            local_expert_offset=first,
            num_experts=SHAPE.experts,
            group=r.group,
            **r.options,
        ),
    )
