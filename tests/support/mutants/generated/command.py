"""`--generated`: try the mutants made by rule, and go on where the last call ended."""

# SPDX-License-Identifier: Apache-2.0
import argparse
import functools
import hashlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from nvfp4_moe.kernels.triton_target import INTERPRETING
from nvfp4_moe.reference import recipe

from ..planted import KERNELS
from . import harmless, trial
from .rules import Generated, generate

REFERENCE = Path(recipe.__file__).resolve().parent
SECONDS = {"reference": 60.0, "cpu": 240.0, "cuda": 120.0}
"""After which a mutant has timed out."""
AT_ONCE = {"cpu": 1, "cuda": 16}
"""Mutants that a process tries one after the other: it takes seconds to start a GPU."""


def every(which: str) -> list[Generated]:
    """All mutants of the reference, or of the kernels."""
    from . import kernel_probes, reference_probes

    folder, files = (
        (REFERENCE, reference_probes.OF_FILE)
        if which == "reference"
        else (KERNELS, kernel_probes.OF_FILE)
    )
    return [
        mutant
        for file in files
        for mutant in generate(
            file, (folder / file.split("/", 1)[1]).read_text("utf-8"), jitted=which == "kernels"
        )
    ]


def probes_of(mutant: Generated, device: str) -> list[trial.Probe]:
    """What a mutant is shown to, in order."""
    return [probe for _, probe in _named_probes(mutant.file, device)]


@functools.cache
def _named_probes(file: str, device: str) -> list[tuple[str, trial.Probe]]:
    from . import kernel_probes, reference_probes

    if file.startswith("reference/"):
        return [(name, reference_probes.probe(name)) for name in reference_probes.OF_FILE[file]]
    return [(name, kernel_probes.probe(name, device)) for name in kernel_probes.asked(file, device)]


def _digest(mutant: Generated) -> str:
    return hashlib.blake2b(mutant.source.encode(), digest_size=8).hexdigest()


class Results:
    """What is known of mutants, by key, in a file that is written whole."""

    def __init__(self, path: Path, device: str):
        self.path, self.device = path, device
        self.known: dict[str, dict[str, dict[str, Any]]] = (
            json.loads(path.read_text("utf-8")) if path.exists() else {}
        )
        self.own = self.known.setdefault(device, {})

    def has(self, mutant: Generated, again: bool) -> bool:
        """Whether this very text has been tried here, or has been caught anywhere."""
        found = [
            (device, known[mutant.key]["status"])
            for device, known in self.known.items()
            if mutant.key in known and known[mutant.key]["digest"] == _digest(mutant)
        ]
        if any(status != "survived" for _, status in found):
            return True
        return bool(found) and not again and self.device in dict(found)

    def add(self, result: trial.Result) -> None:
        self.own[result.mutant.key] = {
            "status": result.status, "by": result.by, "seconds": result.seconds,
            "digest": _digest(result.mutant),
        }  # fmt: skip

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(self.known, indent=1) + "\n", "utf-8")
        part.replace(self.path)


def run(options: argparse.Namespace) -> int:
    """Exit status: 0 if every mutant that was tried is caught, or known to be harmless; else 1.

    Raises:
        trial.WrongProbe: a probe finds fault with the code as it is.
    """
    if options.generated == "report":
        print(report(Path(options.results)))
        return 0
    interpreted = options.generated == "kernels" and options.device == "cpu"
    if interpreted and not INTERPRETING:
        variables = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
        return subprocess.run(
            [sys.executable, "-m", "mutants", *sys.argv[1:]], env=variables
        ).returncode
    torch.set_num_threads(1)  # a child of a process with threads would wait for them
    first, count = (int(part) for part in options.shard.split("/"))
    results = Results(Path(options.results), options.device)
    mutants = [m for m in every(options.generated) if not options.only or options.only in m.shown]
    waiting = [m for m in mutants[first - 1 :: count] if not results.has(m, options.again)]
    end = time.monotonic() + (options.seconds or float("inf"))
    limit = SECONDS["reference" if options.generated == "reference" else options.device]
    children = {"jobs": options.jobs, "at_once": AT_ONCE[options.device]}
    start = written = time.monotonic()
    probes = {name: probe for m in waiting for name, probe in _named_probes(m.file, options.device)}
    trial.check(probes.items(), seconds=2 * limit, **children)
    tried = 0
    for result in trial.run(_until(waiting, options.device, end), seconds=limit, **children):
        results.add(result)
        tried += 1
        if result.status == "survived" and harmless.reason(result.mutant.key) is None:
            print(f"SURVIVED {result.mutant.shown}", flush=True)
        if time.monotonic() - written > 20:
            results.write()
            written = time.monotonic()
    results.write()
    text, still = summary(mutants, results.known)
    print(f"{tried} tried in {time.monotonic() - start:.0f} s, {len(waiting) - tried} left\n{text}")
    return 1 if still else 0


def _until(
    waiting: Sequence[Generated], device: str, end: float
) -> Iterator[tuple[Generated, list[trial.Probe]]]:
    for mutant in waiting:
        if time.monotonic() > end:
            return
        yield mutant, probes_of(mutant, device)


def status_of(mutant: Generated, known: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The best that is known on any device: killed, timed out, harmless, open, or not tried."""
    digest = _digest(mutant)
    found = {
        device[mutant.key]["status"]
        for device in known.values()
        if mutant.key in device and device[mutant.key]["digest"] == digest
    }
    for status in ("killed", "timed out"):
        if status in found:
            return status
    if harmless.reason(mutant.key):
        return "harmless"
    return "open" if found else "not tried"


STATUSES = ("killed", "timed out", "harmless", "open", "not tried")


def summary(
    mutants: Sequence[Generated], known: dict[str, dict[str, dict[str, Any]]]
) -> tuple[str, list[str]]:
    """(a table by module, the mutants that are open)."""
    counts: dict[str, Counter[str]] = {}
    still = []
    for mutant in mutants:
        status = status_of(mutant, known)
        counts.setdefault(mutant.file, Counter())[status] += 1
        if status == "open":
            still.append(mutant.shown)
    rows = [["module", "generated", *STATUSES]]
    counts["all"] = sum(counts.values(), Counter())
    for file, count in counts.items():
        rows.append([file, str(sum(count.values())), *(str(count[s]) for s in STATUSES)])
    head, *rest = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *rest]), still


_HEAD = """\
## Made by rule

`make mutants` also makes small changes of every function of the reference and of the Triton kernels
(`tests/support/mutants/generated/rules.py`): a rounding left out, a constant moved by one or by an ulp,
a comparison made strict or not, an operator exchanged, an index moved by one. Each is *killed* by an
answer that is not the unchanged reference's, to the bit where the contract determines it, else outside
of its interval; or by an error; it *timed out*; it is *harmless*, for a reason that is written down
(`harmless.py`); or it is *open*: nothing saw it, and nobody has shown that it keeps the contract.
Kernels are tried in the interpreter, where paths of a GPU alone do nothing, and on a GPU.
"""


def report(path: Path) -> str:
    """What is known of all generated mutants, as docs/mutants.md has it."""
    mutants = [*every("reference"), *every("kernels")]
    text, still = summary(mutants, Results(path, "cpu").known)
    listed = "\n".join(f"- `{key}`" for key in still) or "None."
    return f"{_HEAD}\n{text}\n\nOpen:\n\n{listed}"
