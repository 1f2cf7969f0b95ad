"""Run by `make check-wheel` in an environment that holds the wheel alone: it imports and works."""

# SPDX-License-Identifier: Apache-2.0
import importlib.util

import torch

import nvfp4_moe
from nvfp4_moe.cases import inputs

assert "site-packages" in nvfp4_moe.__file__, f"{nvfp4_moe.__file__} is not the installed package"
for name in ("kernels", "reference", "tests", "bench", "docs", "src", "mutants"):
    assert importlib.util.find_spec(name) is None, f"the wheel installs a top-level {name}"
assert importlib.util.find_spec("nvfp4_moe.mutants") is None, "the wheel holds the mutants"
x = torch.randn(5, 64).bfloat16()
codes, scales, per_token = nvfp4_moe.nvfp4_quantize(x, 1 / 2688, per_token_activation=True)
assert (codes.shape, scales.shape, per_token.shape) == ((5, 32), (128, 4), (5,))
assert inputs.activations() and inputs.golden(edge=True), "the data is missing"
print(nvfp4_moe.explain(x, 1 / 2688, per_token_activation=True))
print(f"nvfp4-moe {nvfp4_moe.__version__} works without its checkout")
