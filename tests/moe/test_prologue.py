"""Few tokens are routed, sorted and written in one launch, to the bits of the launches it replaces."""

# SPDX-License-Identifier: Apache-2.0
import prologue_cases
import pytest
import torch

from nvfp4_moe import Routing, RoutingMethodType
from nvfp4_moe.kernels.moe.hopper.prologue import routes, serves
from nvfp4_moe.reference.moe.routing import METHODS

pytestmark = pytest.mark.interpreter


@pytest.mark.parametrize("columns", prologue_cases.WIDTHS)
@pytest.mark.parametrize("form", prologue_cases.FORMS, ids=str)
def test_equal(form, columns):
    prologue_cases.equal("cpu", form, columns)


@pytest.mark.parametrize("columns", [64, 2880, 4224])
@pytest.mark.parametrize("form", prologue_cases.FORMS, ids=str)
def test_a_row_for_each_token(form, columns):
    prologue_cases.equal("cpu", form, columns, placed=False)


@pytest.mark.parametrize(
    "tokens,top_k,experts,offset", [(1, 1, 1, 0), (1, 8, 33, 3), (16, 5, 7, 1)]
)
def test_equal_for_other_routings(tokens, top_k, experts, offset):
    recipe = prologue_cases.RECIPES[0]
    prologue_cases.equal("cpu", recipe, 128, tokens, top_k, experts, offset)


def test_it_serves_few_tokens_alone():
    assert serves(1, 8, 2048) and serves(16, 8, 7168) and serves(11, 22, 1024)
    assert not serves(0, 8, 2048) and not serves(17, 1, 2048)
    assert not serves(16, 22, 1024) and not serves(1, 8, 32768)


@pytest.mark.parametrize("routing", prologue_cases.ROUTINGS, ids=str)
def test_it_routes(routing):
    prologue_cases.routed_equal("cpu", routing)


@pytest.mark.parametrize(
    "tokens,experts,local,offset,dtype,form",
    [
        (1, 128, 128, 0, torch.float32, prologue_cases.RECIPES[0]),
        (1, 16, 4, 12, torch.bfloat16, "plain"),
        (4, 112, 9, 30, torch.float32, "plain"),
        (2, 256, 16, 240, torch.bfloat16, prologue_cases.RECIPES[0]),
        (16, 32, 10, 0, torch.float32, "plain"),
    ],
)
def test_it_routes_other_calls(tokens, experts, local, offset, dtype, form):
    """One token and sixteen, a rank's experts first and last, logits that fill no power of two."""
    routing = prologue_cases.ROUTINGS[0]
    prologue_cases.routed_equal("cpu", routing, tokens, experts, local, offset, dtype, form)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", range(1, 17))
def test_it_routes_every_count_of_tokens(tokens):
    for routing in prologue_cases.ROUTINGS:
        prologue_cases.routed_equal("cpu", routing, tokens)


def _routes(tokens, experts, routing, dtype=torch.float32):
    return routes(torch.empty((tokens, experts), dtype=dtype, device="meta"), routing)


def test_it_routes_where_logits_choose_few_experts():
    renormalize = Routing(RoutingMethodType.Renormalize, 8)
    assert _routes(1, 128, renormalize) and _routes(4, 128, renormalize)
    assert _routes(16, 32, renormalize) and _routes(2, 256, renormalize, torch.bfloat16)
    assert not _routes(5, 128, renormalize) and not _routes(3, 256, renormalize, torch.bfloat16)
    assert not _routes(1, 256, renormalize)
    assert not _routes(1, 72, renormalize)
    assert not _routes(1, 128, Routing(RoutingMethodType.Renormalize, 9))
    for method in METHODS:
        assert _routes(1, 64, Routing(method, 1)) == method.raw
