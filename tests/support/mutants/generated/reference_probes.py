"""Probes of the reference, by module, on numbers at every edge of its rules."""

# SPDX-License-Identifier: Apache-2.0
import functools

from . import probe_experts, probe_formats, probe_layers, probe_quantize, probe_routing
from .answers import Asked, Kept
from .trial import Probe

ASKED: dict[str, Asked] = {
    "e2m1": probe_formats.of_e2m1,
    "e4m3": probe_formats.of_e4m3,
    "fp32": probe_formats.of_fp32,
    "layouts": probe_formats.of_layouts,
    "recipe": probe_formats.of_recipe,
    "quantize": probe_quantize.of_quantize,
    "routing": probe_routing.of_routing,
    "experts": probe_experts.of_experts,
    "moe": probe_layers.of_moe,
    "scalars": probe_experts.of_scalars,
    "builds": probe_experts.of_builds,
    "reload": probe_experts.of_reload,
    "dense": probe_layers.of_dense,
    "producers": probe_layers.of_producers,
    "traits": probe_layers.traits,
}
JUDGED = {"activation": probe_layers.of_activation, "fused": probe_layers.fused}
OF_FILE = {
    "reference/activation.py": ("traits", "activation", "fused"),
    "reference/weights/cute_dsl.py": ("builds",),
    "reference/weights/cutlass.py": ("builds",),
    "reference/dense.py": ("dense",),
    "reference/numerics/e2m1.py": ("e2m1", "quantize"),
    "reference/numerics/e4m3.py": ("e4m3", "quantize"),
    "reference/weights/experts.py": ("experts", "reload", "builds", "fused"),
    "reference/weights/layout.py": ("experts", "reload", "builds", "fused"),
    "reference/weights/prepare.py": ("experts", "reload", "builds", "fused"),
    "reference/numerics/fp32.py": ("fp32", "quantize"),
    "reference/layouts.py": ("layouts",),
    "reference/moe/activations.py": ("moe", "fused"),
    "reference/moe/finalize.py": ("moe", "fused"),
    "reference/moe/layer.py": ("moe", "fused"),
    "reference/moe/permute.py": ("moe",),
    "reference/numerics/accumulate.py": ("moe", "fused"),
    "reference/fused_quantize.py": ("producers",),
    "reference/quantize.py": ("quantize",),
    "reference/recipe.py": ("recipe", "dense"),
    "reference/weights/update.py": ("reload", "builds"),
    "reference/moe/routing.py": ("routing",),
    "reference/weights/scalars.py": ("scalars", "experts"),
    "reference/weights/writers.py": ("reload",),
}
"""Probes of each module, in order."""


@functools.cache
def probe(name: str) -> Probe:
    return JUDGED[name]() if name in JUDGED else Kept(ASKED[name])
