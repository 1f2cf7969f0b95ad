"""Speed of transformers' experts on this GPU: `python bench/transformers_speed.py [--json FILE]`.

One layer of Qwen3-30B-A3B, called through transformers as a model calls it, in a CUDA graph: its own
implementations in bf16, and ours. Microseconds of device time, with routes that are random.
"""

# SPDX-License-Identifier: Apache-2.0
from functools import partial

import torch
import transformers
from measure import arguments, save, start
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from nvfp4_moe.bench.clock import microseconds
from nvfp4_moe.serving.transformers import IMPLEMENTATIONS, prepare, register

TOKENS = (1, 8, 32, 128, 1024)
THEIRS = {"batched_mm": 128, "grouped_mm": 1024}
"""Their implementations in bf16, and the most tokens: `batched_mm` copies a weight for each slot."""


def layer() -> Qwen3MoeExperts:
    config = transformers.Qwen3MoeConfig(
        hidden_size=2048, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        made = Qwen3MoeExperts(config)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return made.requires_grad_(False)


def main() -> None:
    options, where = start(arguments(__doc__ or ""))
    register()
    module = layer()
    prepare(module)
    print(f"transformers {transformers.__version__}; microseconds by tokens", *TOKENS, sep=" | ")
    results: dict[str, object] = {**where, "transformers": transformers.__version__}
    for name in (*THEIRS, *IMPLEMENTATIONS):
        module.config._experts_implementation_internal = name
        cells: dict[int, float | None] = {}
        for tokens in TOKENS:
            x = torch.randn(tokens, 2048, device="cuda", dtype=torch.bfloat16)
            logits = torch.randn(tokens, 128, device="cuda", dtype=torch.float32)
            weights, ids = logits.softmax(1).topk(8)
            routing = ids, weights.bfloat16()
            too_many = tokens > THEIRS.get(name, tokens)
            cells[tokens] = None if too_many else microseconds(partial(module, x, *routing), 10)
        results[name] = cells
        print(name, *("-" if c is None else round(c) for c in cells.values()), sep=" | ")
    save(options.json, results)


if __name__ == "__main__":
    main()
