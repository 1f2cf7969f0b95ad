"""`nvfp4-moe explain`: the backend that would serve a layer of a shape on a GPU, and why."""

# SPDX-License-Identifier: Apache-2.0
import re
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import torch

from ..console.table import print_table
from ..exits import CommandError, Exit
from ..kernels.backends import Explanation
from ..kernels.moe.api import explain_fused_moe
from ..kernels.quantize.api import explain as explain_quantizer
from ..reference.activation import IMPLEMENTED
from ..reference.moe.routing import Routing, RoutingMethodType
from ..reference.recipe import NVFP44Over6Config, Recipe, SfLayout
from ..reference.weights.experts import Experts
from ..reference.weights.prepare import prepare_experts
from ..report import terminal
from .output import Result

GPUS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121")
"""The GPUs that are asked about where the machine has none and none is named."""
LAYER, QUANTIZER = "fused layer", "its quantizer"


def run(options: SimpleNamespace) -> Result:
    asked = _gpus(options)
    answers = {gpu: _answers(options, capability) for gpu, capability in asked.items()}
    print(
        f"{options.tokens} tokens of {options.hidden}, {options.experts} experts of "
        f"{options.intermediate}, top {options.top_k}, {options.activation}, {options.routing}, "
        f'build="{options.build}"'
    )
    if len(answers) > 1:
        print("this machine has no GPU; on others (--gpu names one, and shows every reason):")
        rows = [
            (gpu, *(explanation.backend or "nothing" for explanation in of_gpu.values()))
            for gpu, of_gpu in answers.items()
        ]
        print_table(["GPU", LAYER, QUANTIZER], rows, sys.stdout)
    else:
        ((gpu, of_gpu),) = answers.items()
        for call, explanation in of_gpu.items():
            print(f"\n{call} on {gpu}")
            print_explanation(as_dict(explanation))
    document = {
        gpu: {call: as_dict(explanation) for call, explanation in of_gpu.items()}
        for gpu, of_gpu in answers.items()
    }
    return Result(Exit.DONE, {"gpus": document})


def print_explanation(facts: dict[str, Any]) -> None:
    """Print what `as_dict` returned: the backend that would run, each one's reason, and the notes."""
    print(f"would run: {facts['would_run'] or 'nothing'}")
    rows = [
        (name, "can serve" if reason is None else f"no: {reason}")
        for name, reason in facts["reasons"].items()
    ]
    print_table(["backend", "verdict"], rows, sys.stdout, terminal.style)
    for note in facts["notes"]:
        print(f"note: {note}")


def as_dict(explanation: Explanation) -> dict[str, Any]:
    """Return an explanation for JSON."""
    return {
        "would_run": explanation.backend,
        "reasons": dict(explanation.reasons),
        "notes": list(explanation.notes),
    }


def _gpus(options: SimpleNamespace) -> dict[str, tuple[int, int]]:
    """Return the compute capabilities to ask about, by name."""
    names = [options.gpu] if options.gpu is not None else list(GPUS)
    if options.gpu is None and torch.cuda.is_available():
        names = ["sm_{}{}".format(*torch.cuda.get_device_capability())]
    found = {}
    for name in names:
        match = re.fullmatch(r"(?:sm_?)?(\d{1,2})(\d)", name)
        if match is None:
            raise CommandError(f"--gpu is {name!r}; it must be a compute capability, as sm_90")
        found[f"sm_{match[1]}{match[2]}"] = int(match[1]), int(match[2])
    return found


def _answers(options: SimpleNamespace, capability: tuple[int, int]) -> dict[str, Explanation]:
    """Ask about both calls with tensors that have no values."""
    kinds = {kind.name: kind for kind in IMPLEMENTED}
    if options.activation not in kinds:
        allowed = ", ".join(kinds)
        raise CommandError(f"--activation is {options.activation!r}; it must be among {allowed}")
    activation = kinds[options.activation]
    for name in ("tokens", "hidden", "intermediate", "experts", "top_k"):
        if getattr(options, name) < 1:
            flag = name.replace("_", "-")
            raise CommandError(f"--{flag} is {getattr(options, name)}; it must be at least 1")
    rows = (2 if activation.gated else 1) * options.intermediate
    four_over_six = NVFP44Over6Config() if options.four_over_six else None
    fast_math = None if options.math is None else options.math == "fast"
    x = _meta(options.tokens, options.hidden)
    try:
        one = prepare_experts(
            _meta(1, rows, options.hidden),
            _meta(1, options.hidden, options.intermediate),
            activation,
        )
        experts = replace(one, **dict(_repeated(one, options.experts)))
        routing = Routing(RoutingMethodType[options.routing], top_k=options.top_k)
        logits = torch.empty(options.tokens, options.experts, dtype=torch.float32, device="meta")
        layer = explain_fused_moe(
            x,
            experts,
            (logits, routing),
            fast_math=fast_math,
            build=options.build,
            nvfp4_4over6=four_over_six,
            batch_invariant=options.batch_invariant,
            capability=capability,
        )
    except ValueError as error:
        raise CommandError(f"no such layer: {error}") from None
    quantizer = explain_quantizer(
        x,
        Recipe().base_scale_inv,
        SfLayout.layout_linear,
        per_token_activation=True,
        nvfp4_4over6=four_over_six,
        fast_math=fast_math,
        build="cute-dsl" if options.build == "cute-dsl" else "cuda",
        capability=capability,
    )
    return {LAYER: layer, QUANTIZER: quantizer}


def _repeated(one: Experts, count: int) -> Iterator[tuple[str, Any]]:
    """Yield the tensors of so many experts, given those of one: to prepare all takes long."""
    for name in (field.name for field in fields(one)):
        tensor = getattr(one, name)
        if isinstance(tensor, torch.Tensor):
            yield name, tensor.expand(count, *tensor.shape[1:]).contiguous()


def _meta(*size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.bfloat16, device="meta")
