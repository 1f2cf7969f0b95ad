"""A fused call with made-up tokens, whose GEMMs can also be run alone, and the time that one takes."""

# SPDX-License-Identifier: Apache-2.0
import functools
import statistics
from collections.abc import Callable

import torch

from ..reference.moe.activations import Activations
from ..reference.recipe import Recipe
from ..reference.weights.experts import Experts
from . import config_cache, moe
from .config_cache import Configs, GemmConfig, Mode
from .quantize import quantize_global_scale

_RECIPE = Recipe()
_FLUSH_BYTES = 256 << 20  # several times any L2 cache


class Trial:
    """Tokens of normal values on experts drawn evenly; `skewed`, all on the same, those held first."""

    def __init__(
        self,
        experts: Experts,
        top_k: int,
        mode: Mode,
        num_experts: int,
        local_expert_offset: int,
        tokens: int,
        *,
        skewed: bool = False,
    ) -> None:
        device = experts.gemm1_weights.device
        g = torch.Generator(device).manual_seed(tokens)
        score = torch.rand(tokens, num_experts, dtype=torch.float32, device=device, generator=g)
        if skewed:
            place = (
                torch.arange(num_experts, dtype=torch.int64, device=device) - local_expert_offset
            ) % num_experts
            score = (num_experts - place).expand(tokens, -1)
        self.experts, self.top_k, self.tokens, self.mode = experts, top_k, tokens, mode
        self.ids, self.slots = score.topk(top_k).indices.int(), tokens * top_k
        self.offset = local_expert_offset
        held = moe.held_slots(self.slots, experts, num_experts)
        self.key = config_cache.key_of(experts, held, top_k, mode)
        self.table = moe.table_configs(experts, held)
        self.num_experts = num_experts
        local = self.ids - local_expert_offset
        self.rows = int(((local >= 0) & (local < experts.num_local)).sum())
        size = tokens, experts.padded_hidden_size
        x = torch.randn(size, dtype=torch.float32, device=device, generator=g).bfloat16()
        self._permutations: dict[int, moe.Permutation] = {}
        self.activations = Activations(x)
        if mode == "static":
            self.activations = Activations(*quantize_global_scale(x, experts.input_scale, _RECIPE))

    def gemm(self, which: int, config: GemmConfig) -> torch.Tensor:
        """[T * K, columns] of the first or the second GEMM; rows from `self.rows` on are undefined."""
        if config.bn not in self._permutations:
            self._permutations[config.bn] = moe.permute(
                self.ids, self.experts.num_local, self.offset, config.bn
            )
        p = self._permutations[config.bn]
        if which == 1:
            static = self.mode == "static"
            return moe._gemm1(
                self._x1, self.experts, p, self.slots, self.top_k, config, fp32=static
            )
        return moe._gemm2(self._x2, self.experts, p, self.slots, config)

    def call(self, configs: Configs) -> torch.Tensor:
        """The output [T, H] bf16 of the whole call."""
        weights = torch.full_like(self.ids, 1 / self.top_k, dtype=torch.bfloat16)
        with config_cache.using(self.key, configs):
            return moe._fused_moe(
                self.activations, self.experts, self.ids, weights, recipe=_RECIPE,
                local_expert_offset=self.offset, finalize_order="slot", do_finalize=True,
                num_experts=self.num_experts, quantize=self.mode == "per-token",
            )[0]  # fmt: skip

    @functools.cached_property
    def _x1(self) -> moe.Operand:
        if self.mode == "per-token":
            return moe.quantized(self.activations.hidden_states, _RECIPE)
        return moe.operand(self.activations)

    @functools.cached_property
    def _x2(self) -> moe.Operand:
        y = self.gemm(1, self.table[0])
        if self.mode == "bf16":
            return moe.operand(Activations(y))
        return moe.quantized(y, _RECIPE, per_token=self.mode == "per-token")


def microseconds(call: Callable[[], object], replays: int = 20) -> float:
    """Median time of a call on the GPU, in a CUDA graph, nothing of it in the L2 cache before.

    A model's layers evict one another; weights that stay in the cache would favour other tiles.
    """
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    other = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    times = []
    for i in range(replays + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        other.zero_()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i >= 2:  # warm
            times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)
