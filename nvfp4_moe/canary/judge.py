"""Judges a sample by the intervals of the contract, and writes a replay file of what lies outside."""

# SPDX-License-Identifier: Apache-2.0
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from ..cases.moe_case import MoECase
from ..differential.verdict import Allowed
from ..failures.replay_file import MoEFailure, Origin, save_moe
from .sample import Sample, case_of


@dataclass(frozen=True)
class Alarm:
    """Rows of a server in which an element has a value that no correct implementation gives."""

    layer: str
    case: MoECase
    backend: str
    output: torch.Tensor  # [R, H], the server's, on the CPU
    text: str  # how many elements, and the first, with what is allowed

    def __str__(self) -> str:
        return f"{self.layer} on {self.backend}: {self.text}"

    def write(self, folder: Path, number: int) -> Path:
        """Write a file for `nvfp4-moe replay`, named by the process, a number and the layer.

        Raises:
            OSError: it cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        plain = re.sub(r"[^\w.-]+", "_", self.layer)[-80:]
        path = folder / f"canary-{os.getpid()}-{number:02}-{plain}.safetensors"
        origin = Origin(command="canary", note=self.text)
        save_moe(path, MoEFailure(self.case, self.backend, self.output, origin=origin))
        return path


@torch.no_grad()
def judge(sample: Sample) -> Alarm | None:
    """Return an alarm if an element of the sample's output lies outside its interval.

    It copies the rows and their experts to the CPU, and computes there.
    """
    case, output = case_of(sample), sample.output.cpu()
    outside = Allowed(case, backend=sample.backend).first(output)
    if outside is None:
        return None
    text = f"{case.name}: {outside}; {outside.where()}"
    return Alarm(sample.layer, case, sample.backend, output, text)
