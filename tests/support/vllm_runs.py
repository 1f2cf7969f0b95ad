"""Offline runs of vLLM, one after another in one process: `python vllm_runs.py RUNS.json RESULTS.json`.

A run is {"model": folder, ...options of `LLM`}; its result is {"tokens": [[...], ...]}, and
{"routed": shape} where that is asked for, or {"error": text}. With {"wrong": true} a wrong kernel takes
the layers. Where NVFP4_MOE_CANARY is set, {"canary": counts} has what it has found in all runs so far.
"""

# SPDX-License-Identifier: Apache-2.0
import gc
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import own_backends
import vllm_models

from nvfp4_moe import register_backend
from nvfp4_moe.canary import from_environment

SMALL = {
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "dtype": "bfloat16",
    "max_model_len": 64,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "enable_prefix_caching": False,
}


def served(run: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    planted: Any = nullcontext()
    if run.pop("wrong", False):
        planted = register_backend(
            "fused_moe", "wrong", own_backends.layer_without_a_tile, before="reference"
        )
    try:
        llm = LLM(**(SMALL | run))
        sampling = SamplingParams(
            temperature=0, max_tokens=vllm_models.TOKENS, detokenize=False, ignore_eos=True
        )
        prompts = [{"prompt_token_ids": prompt} for prompt in vllm_models.PROMPTS]
        with planted:
            outputs = llm.generate(prompts, sampling)
        found: dict[str, Any] = {"tokens": [list(o.outputs[0].token_ids) for o in outputs]}
        if run.get("enable_return_routed_experts"):
            routed = outputs[0].outputs[0].routed_experts
            found["routed"] = None if routed is None else list(routed.shape)
        if (canary := from_environment()) is not None:
            canary.wait()
            found["canary"] = vars(canary.counts).copy()
        return found
    except Exception as e:  # of vLLM's own validation, of the plug-in, of an engine's process
        causes, cause = [], e
        while cause is not None and len(causes) < 8:
            causes.append(f"{type(cause).__name__}: {cause}")
            cause = cause.__cause__ or cause.__context__
        return {"error": "\n".join(causes)}


if __name__ == "__main__":
    results = []
    for wanted in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        results.append(served(wanted))
        gc.collect()
        Path(sys.argv[2]).write_text(json.dumps(results), encoding="utf-8")
