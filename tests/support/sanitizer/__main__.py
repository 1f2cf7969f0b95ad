"""Run every kernel of the library under the tools of compute-sanitizer: `make sanitizer`.

Each cell of the table, a tool and a group of kernels, is a process of its own, so that a fault in one
group hides none in another. Each group first runs without a tool, which fills Triton's cache. Each tool
must find a fault that is planted for it. Racecheck's reports of Triton's dispatch of
`gl.warp_specialize` (`dispatch.py`) are counted apart, if a small kernel that specializes its warps has
them too (`reproducer.py`).

The exit status is 0 if every cell is clean, 1 if a tool reported something or a group failed, 2 for a
wrong argument, and 3 if cells were not run.
"""

# SPDX-License-Identifier: Apache-2.0
import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path

import torch

from nvfp4_moe.exits import Exit
from nvfp4_moe.kernels.moe.hopper.config import refusal
from nvfp4_moe.kernels.triton_target import arch

from .cases import GROUPS
from .outcome import PRINTED, Outcome, judge
from .planted import TOOLS

ENVIRONMENT = {
    # Processes run side by side, each on one core.
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # Each tensor is an allocation of the driver's, so that memcheck sees its end.
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    # Every call launches by Triton's own code or by `launcher.py`.
    "NVFP4_MOE_RECORDS": "0",
}
OPTIONS = (
    (
        "--launch-timeout",
        "120",
        TOOLS,
    ),  # seconds until the first call of CUDA: torch is imported first
    ("--print-limit", "20", ("memcheck", "initcheck", "synccheck")),
    ("--print-limit", str(PRINTED), ("racecheck",)),
    ("--report-api-errors", "no", TOOLS),  # PyTorch asks for functions that a driver may lack
    (
        "--padding",
        "256",
        ("memcheck",),
    ),  # bytes behind each allocation, in which a store is an error
    # PyTorch's own kernels. Initcheck has to see what they write.
    ("--kernel-name-exclude", "kernel_substring=at6native", ("memcheck", "racecheck", "synccheck")),
)
"""(option of compute-sanitizer, value, tools that get it); one that its `--help` lacks is left out."""
NO_LIMIT = float("inf")
PLANTED_ROW = "planted fault"
DISPATCH_ROW = "specialized warps: "  # and the form of the kernel
KNOWN = "known: reads and writes of Triton's dispatch of warp_specialize, which barriers order"


def command(program: str, tool: str, known: str) -> list[str]:
    """Return the words before the process's own; `known` is what the program's `--help` prints."""
    given = [(o, v) for o, v, tools in OPTIONS if tool in tools and o in known]
    return [program, "--tool", tool, *(word for pair in given for word in pair)]


class Runner:
    """Runs processes, and ends those that take too long.

    Args:
        program: compute-sanitizer.
        known: what its `--help` prints.
        logs: the folder of their output, a file for each.
        limit: seconds of one process.
        total: seconds of all; after it none is started.
    """

    def __init__(self, program: str, known: str, logs: Path, limit: float, total: float) -> None:
        self._program, self._known = program, known
        self._logs, self._limit = logs, limit
        self._end = time.monotonic() + total
        self._accepted = False

    def run(
        self,
        tool: str,
        group: str,
        kernels: Collection[str],
        words: Sequence[str],
        *,
        accepted: bool = False,
    ) -> Outcome:
        """Run a worker with these words under a tool, or under none if it is "plain"."""
        begin = time.monotonic()
        limit = min(self._limit, self._end - begin)
        if limit <= 0:
            return Outcome(tool, group, "not run", first="no time was left")
        log = self._logs / f"{tool}-{''.join(c if c.isalnum() else '-' for c in group)}.log"
        before = [] if tool == "plain" else command(self._program, tool, self._known)
        worker = [*before, sys.executable, "-m", "sanitizer.worker", *words]
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                worker,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | ENVIRONMENT,
                start_new_session=True,  # its group is ended as a whole
            )
            try:
                status: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                status = None
        text = log.read_text(encoding="utf-8", errors="replace")
        seconds = time.monotonic() - begin
        found = judge(tool, group, text, status, seconds, kernels, limit, accepted=accepted)
        if status is None and limit < self._limit and found.verdict == "failed":
            return replace(found, verdict="not run")  # the whole run's time was over
        return found

    def planted(self, tool: str) -> Outcome:
        """Run the tool's planted fault: "clean" if the tool reports it."""
        found = self.run(tool, PLANTED_ROW, (), ("--planted", tool))
        if found.verdict == "errors":
            return progress(replace(found, verdict="clean", errors=0, first=""))
        if found.verdict == "clean":
            found = replace(found, verdict="failed", first="it was not reported")
        return progress(found)

    def dispatch(self, form: str) -> Outcome:
        """Run a small kernel that specializes its warps under racecheck.

        If it has reports, and all of them are of Triton's dispatch, those of the groups are accepted.
        """
        words = ("--reproducer", form)
        found = self.run("racecheck", DISPATCH_ROW + form, (), words, accepted=True)
        if found.known:
            self._accepted = True
        return progress(found)

    def group(self, tool: str, name: str) -> Outcome:
        """Run the cases of a group under a tool."""
        words = ("--dispatch", name) if tool == "racecheck" else (name,)
        kernels = GROUPS[name].kernels
        return progress(self.run(tool, name, kernels, words, accepted=self._accepted))


def progress(outcome: Outcome) -> Outcome:
    """Print the outcome on a line, and return it."""
    name = f"{outcome.tool:<11}{outcome.group:<24}"
    print(f"{name}{outcome.shown:<12}{outcome.seconds:>6.1f} s", flush=True)
    return outcome


def table(tools: Sequence[str], rows: Sequence[str], outcomes: Sequence[Outcome]) -> str:
    """Return groups by tools, and below it the first report or note of each cell that has one."""
    cells = {(o.tool, o.group): o for o in outcomes}
    lines = [f"{'kernels':<24}" + "".join(f"{tool:>14}" for tool in tools)]
    for row in rows:
        shown = (cells[tool, row].shown if (tool, row) in cells else "-" for tool in tools)
        lines.append(f"{row:<24}" + "".join(f"{text:>14}" for text in shown))
    if any(o.known for o in outcomes):
        lines.append(KNOWN)
    return "\n".join([*lines, *(f"{o.tool}, {o.group}: {o.first}" for o in outcomes if o.first)])


def status_of(outcomes: Sequence[Outcome], wanted: int) -> Exit:
    """Return the exit status of a run that was to have `wanted` outcomes."""
    if any(o.verdict in ("errors", "failed") for o in outcomes):
        return Exit.DIFFERENCE
    clean = sum(o.verdict == "clean" for o in outcomes)
    return Exit.DONE if clean == wanted > 0 else Exit.NOT_RUN


def positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < NO_LIMIT:
        raise argparse.ArgumentTypeError(f"it is {text!r}; it must be a number above 0")
    return number


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sanitizer",
        description=(__doc__ or "").split("\n")[0],
        epilog=f"groups: {', '.join(GROUPS)}",
    )
    parser.add_argument("--tool", action="append", choices=TOOLS, help="this tool; repeat it")
    parser.add_argument(
        "--only",
        action="append",
        metavar="TEXT",
        help="the groups whose names begin with it; repeat it",
    )
    parser.add_argument("--jobs", type=positive, default=14, help="processes at a time")
    parser.add_argument("--seconds", type=positive, default=240, help="the limit of one process")
    parser.add_argument(
        "--total", type=positive, default=NO_LIMIT, help="the limit of the run, in s"
    )
    parser.add_argument(
        "--logs", type=Path, default=Path("build/sanitizer"), help="outputs' folder"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every cell to FILE")
    options = parser.parse_args(words)
    options.tools = [tool for tool in TOOLS if tool in (options.tool or TOOLS)]
    only = options.only or [""]
    if unknown := [t for t in only if not any(name.startswith(t) for name in GROUPS)]:
        parser.error(f"--only: no group begins with {unknown[0]!r}; they are: {', '.join(GROUPS)}")
    options.groups = [
        name
        for name, group in GROUPS.items()
        if name.startswith(tuple(only)) and set(group.tools) & set(options.tools)
    ]
    if not options.groups:
        parser.error(f"--only: {', '.join(options.tools)} runs none of these groups")
    return options


def missing() -> str | None:
    """Return what this machine lacks, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device: there is nothing to check"
    if program() is None:
        return "compute-sanitizer is not found; CUDA's toolkit has it: add its folder to PATH"
    return None


def program() -> str | None:
    """Return the path of compute-sanitizer."""
    cuda = Path(os.sep, "usr", "local", "cuda", "bin")
    return shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}{os.pathsep}{cuda}")


def main(words: Sequence[str]) -> int:
    options = parse(words)
    if lacking := missing():
        print(f"sanitizer: {lacking}", file=sys.stderr)
        return Exit.NOT_RUN
    path, device = program() or "", torch.device("cuda")
    known = subprocess.run([path, "--help"], capture_output=True, text=True, check=False).stdout
    version = subprocess.run(
        [path, "--version"], capture_output=True, text=True, check=False
    ).stdout
    print(torch.cuda.get_device_name(), *version.splitlines()[-2:], sep="; ")
    refused = {name: why for name in options.groups if (why := GROUPS[name].refusal(arch(device)))}
    groups = [name for name in options.groups if name not in refused]
    options.logs.mkdir(parents=True, exist_ok=True)
    runner = Runner(path, known, options.logs, options.seconds, options.total)
    found, wanted = [], len(options.tools)
    rows = [PLANTED_ROW]
    with ThreadPoolExecutor(int(max(1, options.jobs))) as pool:
        planted = [pool.submit(runner.planted, tool) for tool in options.tools]
        if "racecheck" in options.tools and refusal(arch(device)) is None:
            from .reproducer import FORMS  # Gluon, which serves here

            planted += [pool.submit(runner.dispatch, form) for form in FORMS]
            rows += [DISPATCH_ROW + form for form in FORMS]
            wanted += len(FORMS)
        found += [one.result() for one in planted]
        if all(o.verdict != "clean" for o in found if o.group == PLANTED_ROW):
            groups = []  # no tool works on this machine
        plain = [pool.submit(runner.group, "plain", name) for name in groups]
        cells: list[Future[Outcome]] = []
        failed = []
        for one in as_completed(plain):
            outcome = one.result()
            if outcome.verdict != "clean":
                failed.append(outcome)
                continue
            tools = [t for t in options.tools if t in GROUPS[outcome.group].tools]
            cells += [pool.submit(runner.group, tool, outcome.group) for tool in tools]
        found += [one.result() for one in cells]
    found += failed
    columns = ["plain", *options.tools] if failed else options.tools
    print("\n" + table(columns, [*rows, *groups], found))
    for name, why in refused.items():
        print(f"not here, {name}: {why}")
    if options.json:
        options.json.write_text(json.dumps([asdict(o) for o in found], indent=1), "utf-8")
    wanted += sum(len(set(options.tools) & set(GROUPS[name].tools)) for name in groups)
    status = status_of(found, wanted)
    launches = sum(o.cases[0] for o in found if o.verdict == "clean")
    print(f"{len(found)} processes, {launches} cases without a report; exit status {int(status)}")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
