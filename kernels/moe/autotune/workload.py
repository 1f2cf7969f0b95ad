"""A fused call with made-up tokens, whose GEMMs can also be run alone, and the time that one takes."""

# SPDX-License-Identifier: Apache-2.0
import functools
import statistics
from collections.abc import Callable
from dataclasses import replace

import torch

from ....reference.moe.hidden_states import Activations
from ....reference.recipe import Recipe
from ...quantize.launch import quantize_global_scale
from .. import launch
from ..call import KernelCall
from ..hopper.config import RingConfig
from ..permute import Permutation, permute
from ..tile_table import Config, Configs, local_slots, table_configs
from . import cache

_RECIPE = Recipe()
_FLUSH_BYTES = 256 << 20  # several times any L2 cache


class Trial:
    """A call's layer with tokens of normal values on experts drawn evenly.

    With `skewed` all tokens take the same experts, the local ones first.
    """

    def __init__(self, call: KernelCall, top_k: int, tokens: int, *, skewed: bool = False) -> None:
        experts, num_experts = call.experts, call.all_experts
        offset, mode = call.local_expert_offset, call.mode
        device = experts.gemm1_weights.device
        g = torch.Generator(device).manual_seed(tokens)
        score = torch.rand(tokens, num_experts, dtype=torch.float32, device=device, generator=g)
        if skewed:
            place = (
                torch.arange(num_experts, dtype=torch.int64, device=device) - offset
            ) % num_experts
            score = (num_experts - place).expand(tokens, -1)
        self.experts, self.top_k, self.tokens = experts, top_k, tokens
        self.ids, self.slots = score.topk(top_k).indices.int(), tokens * top_k
        self.offset = offset
        slots = local_slots(self.slots, experts, num_experts)
        self.key = cache.key_of(experts, slots, top_k, mode)
        self.table = table_configs(experts, slots)
        local = self.ids - offset
        self.rows = int(((local >= 0) & (local < experts.num_local)).sum())
        size = tokens, experts.padded_hidden_size
        x = torch.randn(size, dtype=torch.float32, device=device, generator=g).bfloat16()
        self._ring = isinstance(self.table[0], RingConfig)
        self._permutations: dict[int, Permutation] = {}
        activations = Activations(x)
        if mode == "static":
            scale = 1.0 if experts.input_scale is None else experts.input_scale
            activations = Activations(*quantize_global_scale(x, scale, _RECIPE))
        self._call = replace(
            call,
            activations=activations,
            recipe=_RECIPE,
            finalize_order="slot",
            quantize="per-token" if mode == "per-token" else None,
        )

    def gemm(self, which: int, config: Config) -> torch.Tensor:
        """Run the first or the second GEMM: [T * K, columns]; rows from `self.rows` on are undefined."""
        p = self._permutation(config)
        if which == 1:
            static = self._call.mode == "static"
            return launch.gemm1(
                self._x1, self.experts, p, self.slots, self.top_k, config, fp32=static
            )
        return launch.gemm2(self._x2, self.experts, p, self.slots, config)

    def _permutation(self, config: Config) -> Permutation:
        if config.bn not in self._permutations:
            self._permutations[config.bn] = permute(
                self.ids, self.experts.num_local, self.offset, config.bn
            )
        return self._permutations[config.bn]

    def call(self, configs: Configs) -> torch.Tensor:
        """Run the whole call: output [T, H] bf16."""
        weights = torch.full_like(self.ids, 1 / self.top_k, dtype=torch.bfloat16)
        with cache.using(self.key, configs):
            return launch.fused_moe(self._call, self.ids, weights)[0]

    @functools.cached_property
    def _x1(self) -> launch.Operand:
        config, columns = self.table[0], self.experts.padded_hidden_size
        place = launch.places(self._permutation(config), config, self.tokens, columns)
        activations = self._call.activations
        if self._call.mode == "per-token":
            return launch.quantized(
                activations.hidden_states, _RECIPE, ring=self._ring, place=place
            )
        return launch.operand(activations, ring=self._ring, place=place)

    @functools.cached_property
    def _x2(self) -> launch.Operand:
        y = self.gemm(1, self.table[0])
        if self._call.mode == "bf16":
            return launch.operand(Activations(y), ring=self._ring)
        per_token = self._call.mode == "per-token"
        return launch.quantized(y, _RECIPE, per_token=per_token, ring=self._ring)


def microseconds(call: Callable[[], object], replays: int = 20) -> float:
    """Return the median time of a call on the GPU, in a CUDA graph, with a cold L2 cache.

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
