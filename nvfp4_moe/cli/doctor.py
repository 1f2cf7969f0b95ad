"""`nvfp4-moe doctor`: what is here, and which backend would serve."""

# SPDX-License-Identifier: Apache-2.0
import sys
from types import SimpleNamespace

import torch

from ..console import progress
from ..console.table import print_table
from ..exits import Exit
from ..kernels.flashinfer import version
from ..kernels.moe.api import explain_fused_moe
from ..kernels.moe.backends import ORDER
from ..kernels.quantize.api import auto_order, explain
from ..machine import machine
from ..reference.fingerprint import steps
from ..reference.numerics import fp32
from ..reference.recipe import Recipe, SfLayout
from ..reference.weights.prepare import prepare_experts
from . import doctor_table
from .explain import as_dict, print_explanation
from .output import Result


def run(options: SimpleNamespace) -> Result:
    with progress.bar("examining this machine"):
        examined = examine()
    columns = ["thing", "here", "what mends it"]
    print_table(columns, doctor_table.rows(examined), sys.stdout, _style)
    for line in examined["flashinfer"]["differences"]:
        print(f"FlashInfer differs: {line}")
    for build, facts in examined["builds"].items():
        print(f'\na bf16 matrix per token, build="{build}"; auto tries {", ".join(facts["auto"])}:')
        print_explanation(facts)
    layer = examined["fused_moe"]
    print(f"\nthe fused mixture of experts, per token; auto tries {', '.join(layer['auto'])}:")
    print_explanation(layer)
    print("\nenvironment:")
    values = examined["environment"].items()
    variables = [(name, "(unset)" if value is None else value) for name, value in values]
    print_table(["variable", "value"], variables, sys.stdout, _style)
    return Result(Exit.DONE, examined)


def _style(cell: str) -> str:
    if cell.startswith("NOT "):
        return "bold red"
    return "dim" if cell in ("none", "not installed", "(unset)") else ""


def examine() -> dict:
    """Everything that `doctor` prints."""
    on_gpu = torch.cuda.is_available()
    x = torch.empty(16, 4096, dtype=torch.bfloat16, device="cuda" if on_gpu else "cpu")
    builds = {}
    for build in ("cuda", "cute-dsl"):
        explanation = explain(
            x,
            Recipe().base_scale_inv,
            SfLayout.layout_linear,
            per_token_activation=True,
            nvfp4_4over6=None,
            build=build,
        )
        builds[build] = {
            "auto": list(auto_order(build)),
            **as_dict(explanation),
            "explanation": str(explanation),
        }
    return {
        **machine(),
        "system": doctor_table.system(),
        "contract_steps": steps(),
        "rcp_table": _rcp_table() if on_gpu else None,
        "routing_functions": _routing_functions() if on_gpu else None,
        "flashinfer": _flashinfer(),
        "builds": builds,
        "fused_moe": (layer := _fused_moe(x.device)),
        "sums": _sums(layer["reasons"]) if on_gpu else {},
    }


def _flashinfer() -> dict:
    """Compare the installed version, and the signatures of its functions, with the described ones."""
    if version.HERE.version is None:
        return {"version": "not installed", "differences": []}
    here = version.written(version.HERE.version) or "of an unknown version"
    from ..kernels.flashinfer import functions

    found = functions.differences()
    said = "with other functions than are described:" if found else "with the functions described"
    if not version.HERE.is_described:
        said = f"not described, {said}"
    return {"version": f"{here}, {said}", "differences": found}


def _fused_moe(device: torch.device) -> dict:
    """The backend that would serve a layer of two experts, whose values nothing reads."""
    w13 = torch.zeros(2, 256, 256, dtype=torch.bfloat16, device=device)
    w2 = torch.zeros(2, 256, 128, dtype=torch.bfloat16, device=device)
    ids = torch.zeros(1, 1, dtype=torch.int32, device=device)
    explanation = explain_fused_moe(
        w13[0, :1],
        prepare_experts(w13, w2),
        (ids, torch.ones(1, 1, dtype=torch.float32, device=device)),
    )
    return {
        "auto": list(ORDER),
        **as_dict(explanation),
        "explanation": str(explanation),
    }


def _sums(reasons: dict[str, str | None]) -> dict[str, str]:
    """Say how each available backend accumulates; a failure is reported, not raised."""
    from ..differential import accumulation

    found = {}
    for backend, reason in reasons.items():
        if reason is None and backend != "reference":
            try:
                found[backend] = str(accumulation.measure(backend, "cuda"))
            except Exception as error:
                found[backend] = f"not measured: {error}"
    return found


def _rcp_table() -> str:
    """Compare this GPU's rcp.approx with the reference's table; if it differs, so does fast math."""
    from ..kernels.instruction_probe import measure_rcp_delta

    measured = measure_rcp_delta("cuda")
    wrong = int((measured != fp32.rcp_delta(measured.device)).sum())
    if wrong == 0:
        return "the known one"
    return f"NOT the known one: {wrong} of {measured.numel()} significands differ; use exact math"


def _routing_functions() -> str:
    """Name the table of ex2.approx and tanh.approx that is this GPU's."""
    from ..kernels.instruction_probe import functions_that_differ

    if wrong := functions_that_differ("cuda"):
        return f"not known: those of an H200 differ at {wrong} arguments"
    return 'functions="hopper", to the bit'
