"""Calls of the launch that sorts few tokens and writes their rows: of every form, and part of a row."""

# SPDX-License-Identifier: Apache-2.0
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from nvfp4_moe import host
from nvfp4_moe.kernels.moe.hopper.prologue import route_and_place, sort_and_place
from nvfp4_moe.kernels.moe.routing import router_of
from nvfp4_moe.reference.moe.hidden_states import Activations
from nvfp4_moe.reference.moe.routing import Routing, RoutingMethodType, route
from nvfp4_moe.reference.quantize import dequantize, quantize_per_token
from nvfp4_moe.reference.recipe import NVFP44Over6Config, Recipe

from ..calls import Answered, Call
from .numbers import seeded
from .part_calls import exactly, in_places, permutation_of, tensors_of

Tensor = torch.Tensor


@dataclass(frozen=True)
class PrologueCall:
    """Rows of three tokens, among them NaN, blocks of zeros and of NaN, and a row with a small scale.

    Slots of one token have the same expert as another's, one next to the local ones, or none.
    """

    form: Recipe | str
    """A recipe: rows are quantized per token; else "plain", "codes" or "codes alone"."""
    columns: int = 320
    top_k: int = 5
    experts: int = 5
    offset: int = 2
    tile: int = 2
    tokens: int = 3
    placed: bool = True

    def _ids(self) -> Tensor:
        first, behind = self.offset, self.offset + self.experts
        some = [behind - 1, first, -1, first + 1, behind, first, first - 1, first + 1, behind + 3]
        ids = torch.tensor(some * 8, dtype=torch.int32, device="cpu")
        return ids[: self.tokens * self.top_k].view(self.tokens, self.top_k)

    def _states(self) -> Tensor:
        x = host.normal(seeded(self.columns), self.tokens, self.columns)
        x[0, 3], x[0, 48:64] = torch.nan, torch.nan
        x[-1, 16:32], x[-1] = 0.0, x[-1] * 2.0**-118
        return x.bfloat16()

    def _recipe(self) -> Recipe | None:
        return self.form if isinstance(self.form, Recipe) else None

    def _activations(self) -> Activations:
        if self.form == "plain" or self._recipe() is not None:
            return Activations(self._states())
        q = quantize_per_token(self._states(), 1 / 2688, Recipe())
        token = q.per_token_scale if self.form == "codes" else None
        return Activations(q.codes, q.block_scales, token)

    def answer(self, device: str = "cpu") -> Any:
        a = self._activations()
        given = (a.hidden_states, a.block_scales, a.per_token_scale)
        a = Activations(*(None if t is None else t.to(device) for t in given))
        p, values, scale = sort_and_place(
            a, self._ids().to(device), self.experts, self.offset, self.tile, self._recipe(),
            placed=self.placed,
        )  # fmt: skip
        rows = int(p.end[-1]) if self.placed else self.tokens
        written = [values[:rows].cpu()] + ([] if scale is None else [scale[:rows].cpu()])
        return tensors_of(p) + written

    def judge(self) -> Answered:
        ids, recipe, a = self._ids(), self._recipe(), self._activations()
        permutation = permutation_of(ids.flatten().tolist(), self.experts, self.offset, self.tile)
        token = permutation[0].long() // self.top_k if self.placed else host.arange(self.tokens)
        if recipe is not None:
            q = quantize_per_token(self._states(), recipe.base_scale_inv, recipe)
            values, scale = dequantize(q.codes, q.block_scales, 1.0), q.per_token_scale
        elif self.form == "plain":
            values, scale = self._states(), None
        else:
            assert a.block_scales is not None
            values, scale = dequantize(a.hidden_states, a.block_scales, 1.0), a.per_token_scale
        rows = [in_places(values)[token]] + ([] if scale is None else [scale.flatten()[token]])
        return exactly(permutation + rows)


@dataclass(frozen=True)
class RoutedCall:
    """Logits of three tokens, with ties, both zeros and NaN, routed in the launch."""

    routing: Routing
    tokens: int = 3
    dtype: torch.dtype = torch.float32
    experts: int = 16
    local: int = 9
    offset: int = 4

    def _logits(self) -> Tensor:
        logits = host.normal(seeded(self.tokens), self.tokens, self.experts) * 3
        logits[0] = logits[0].round()
        logits[0, 0] = 10.03125  # between two numbers of bf16
        if self.tokens > 1:
            logits[1, ::2], logits[1, 1::2], logits[2, 3:5] = 0.0, -0.0, torch.nan
            logits[2, 6], logits[2, 7:] = torch.inf, -torch.inf
        return logits.to(self.dtype)

    def _states(self) -> Tensor:
        return host.normal(seeded(64), self.tokens, 64).bfloat16()

    def answer(self, device: str = "cpu") -> Any:
        router = router_of(self._logits().to(device), self.routing)
        (ids, weights), (p, values, _) = route_and_place(
            Activations(self._states().to(device)), router, self.local, self.offset, 2, None
        )
        return [ids.cpu(), weights.cpu(), *tensors_of(p), values[: int(p.end[-1])].cpu()]

    def judge(self) -> Answered:
        routed = route(self._logits(), self.routing)
        permutation = permutation_of(routed.ids.flatten().tolist(), self.local, self.offset, 2)
        token = permutation[0].long() // self.routing.top_k
        rows = in_places(self._states())[token]
        return exactly([routed.ids, routed.weights_bf16, *permutation, rows])


def named() -> Iterator[tuple[str, Callable[[], Call]]]:
    four_over_six = Recipe("exact", NVFP44Over6Config(256, "MSE"))
    recipes = Recipe(), Recipe("exact"), Recipe(build="cute-dsl"), four_over_six
    for form in (*recipes, "plain", "codes", "codes alone"):
        yield f"prologue, {form}", functools.partial(PrologueCall, form)
    for form in (Recipe(), four_over_six, "plain", "codes"):
        yield f"prologue, {form}, parts of rows", functools.partial(PrologueCall, form, 4224)
        by_token = functools.partial(PrologueCall, form, placed=False)
        yield f"prologue, {form}, rows of tokens", by_token
    one = PrologueCall("plain", 64, top_k=3, experts=1, offset=0)
    yield "prologue, one expert", lambda: one
    yield "prologue, one token", lambda: replace(one, tokens=1, experts=9, form=Recipe())
    for method, top_k in (("Renormalize", 5), ("TopK", 3), ("TopKSigmoid", 3), ("Llama4", 1)):
        routing = Routing(RoutingMethodType[method], top_k)
        yield f"prologue, routed by {method}", functools.partial(RoutedCall, routing)
    routing = Routing(RoutingMethodType.Renormalize, 8)
    few = RoutedCall(routing, 1, torch.bfloat16, 32, 32, 0)
    yield "prologue, routed, one token", lambda: few
