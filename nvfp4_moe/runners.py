"""The sides of a comparison: what runs a case, here or in a child process."""

# SPDX-License-Identifier: Apache-2.0
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from .compare import run_reference
from .kernels import dispatch
from .kernels.request import Request, make_request
from .matrix import Case
from .reference.quantize import Quantized

Job = tuple[torch.Tensor, Case]
INTERPRETER = "triton (interpreter)"


def request(x: torch.Tensor, case: Case) -> Request:
    """The case as the public call's request."""
    per_token = case.mode != "global-scale"
    scale = case.recipe.base_scale_inv if per_token else case.global_scale
    assert scale is not None
    return make_request(
        x,
        scale,
        case.layout,
        False,
        16,
        None,
        per_token,
        None,
        None,
        case.recipe.four_over_six,
        case.recipe.math == "fast",
        case.recipe.build,
    )


def run(backend: str, x: torch.Tensor, case: Case) -> Quantized:
    """A backend's answer, on the CPU."""
    if backend == "reference":
        q = run_reference(x, case)
        outputs: Sequence[torch.Tensor | None] = (q.codes, q.block_scales, q.per_token_scale)
    else:
        outputs = dispatch.run(backend, request(x, case))
    codes, scales, *token = (t.cpu() for t in outputs if t is not None)
    return Quantized(codes, scales, token[0] if token else None)


def refusal(backend: str, x: torch.Tensor, case: Case) -> str | None:
    """Why a backend does not run the case; None if it does."""
    return dispatch.refusal(backend, request(x, case))


def interpret(jobs: list[Job]) -> list[Quantized]:
    """The Triton kernels' answers from their interpreter, in child processes, one a processor.

    Raises:
        RuntimeError: a child failed; the message has the end of what it printed.
    """
    count = min(os.cpu_count() or 1, 8, max(1, len(jobs)))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    root = str(Path(__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(
        [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for i in range(count):
            path = Path(folder) / f"{i}.pt"
            torch.save([(x, c) for x, c in jobs[i::count]], path)
            command = [sys.executable, "-m", "nvfp4_moe.runners", str(path)]
            child = subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            children.append((child, path))
        results: list[Quantized] = [None] * len(jobs)  # type: ignore[list-item]
        for i, (child, path) in enumerate(children):
            printed, _ = child.communicate()
            if child.returncode:
                raise RuntimeError(f"the interpreter's process failed:\n{printed[-2000:]}")
            results[i::count] = torch.load(path, weights_only=False)
    return results


def _child(path: Path) -> None:
    jobs = torch.load(path, weights_only=False)
    torch.save([run("triton", x, case) for x, case in jobs], path)


Runner = Callable[[torch.Tensor, Case], Quantized]

if __name__ == "__main__":
    _child(Path(sys.argv[1]))
