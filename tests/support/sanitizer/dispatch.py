"""The shared memory of Triton's dispatch of `gl.warp_specialize`, and racecheck's reports of it.

Triton gives each warp beyond the default ones a byte of shared memory. The default warps write which
partition the warp is to run, and at the end that it is to stop. Both sides pass barrier 1 of the block,
for which every thread is counted:

    default warps:  write, barrier, barrier, partition, barrier, write, barrier, end
    other warps:           barrier, read, barrier, partition, barrier, barrier, read, end

A barrier is between each read and each write, so there is no race. The two sides pass these barriers in
different instructions, and racecheck of compute-sanitizer 2025.3.1 reports the read against both writes.
A report is taken for one of these only if each of its instructions is found here, in the machine code of
a kernel that the same process launched.
"""

# SPDX-License-Identifier: Apache-2.0
import re
import subprocess
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

_DEFAULT_WARPS = re.compile(r'"ttg\.num-warps" = (\d+)')  # those of the metadata are all warps
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(\S[^;]*?)\s*;", re.M)
_BARRIER = re.compile(r"BAR\.SYNC\S* 0x1$")  # without a count: every thread of the block
_SHARED = re.compile(r"(?:LDS|LDSM|LDGSTS|STS|STSM|ATOMS|LD|ST|ATOM|UTMA\w+|SYNCS)\b")
_READ = re.compile(r"LDS\.U8 \w+, \[.*\+(0x[0-9a-f]+)\]$")
_WRITE = re.compile(r"STS \[.*\+(0x[0-9a-f]+)\], \w+$")
_REPORT = re.compile(r"^=+ \w+: Race reported between .*\n(?:=+ +and .*\n)*", re.M)
_ACCESS = re.compile(r"(\w+) access at ([^\s+]+)\+(0x[0-9a-f]+) ")


@dataclass(frozen=True)
class Dispatch:
    """The instructions of one compiled kernel that access the warps' bytes, by offset in its code."""

    kernel: str
    read: int
    writes: tuple[int, ...]

    def __str__(self) -> str:
        return " ".join((self.kernel, hex(self.read), *map(hex, self.writes)))


def parse(text: str) -> Dispatch:
    """Return the dispatch of which `text` is the string."""
    kernel, read, *writes = text.split()
    return Dispatch(kernel, int(read, 16), tuple(int(w, 16) for w in writes))


def of(compiled: Any) -> Dispatch | None:
    """Return the dispatch of a kernel that Triton compiled; None: it specializes no warps."""
    intermediate = compiled.asm["ttgir"]
    if "ttg.warp_specialize" not in intermediate:
        return None
    warps = _DEFAULT_WARPS.search(intermediate)
    assert warps, intermediate[:200]
    disassembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        words = [str(disassembler), "-c", file.name]
        code = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return find(compiled.name, code, int(warps[1]))


def find(kernel: str, code: str, default_warps: int) -> Dispatch | None:
    """Return the dispatch of a kernel; None: it has none, or one of another form.

    Args:
        code: what `nvdisasm -c` prints.
        default_warps: the warps of the default partition. The byte of warp w is at an address + w, so
            that they write at the address + `default_warps`.

    Among barrier 1 and the accesses to shared memory, in the code's order, a barrier comes before and
    after the one read, and after each of the two writes.
    """
    lines = [(int(at, 16), text) for at, text in _INSTRUCTION.findall(code)]
    lines = [(at, text) for at, text in lines if _BARRIER.match(text) or _SHARED.match(text)]
    barrier = [_BARRIER.match(text) is not None for _, text in lines]
    inside = range(1, len(lines) - 1)
    reads = [
        (lines[i][0], int(m[1], 16))
        for i in inside
        if (m := _READ.match(lines[i][1])) and barrier[i - 1] and barrier[i + 1]
    ]
    if len(reads) != 1:
        return None
    read, address = reads[0]
    writes = [
        i
        for i in inside
        if (m := _WRITE.match(lines[i][1])) and int(m[1], 16) == address + default_warps
    ]
    if len(writes) != 2 or not all(barrier[i + 1] for i in writes):
        return None
    return Dispatch(kernel, read, tuple(lines[i][0] for i in writes))


def split(text: str, dispatches: Collection[Dispatch]) -> tuple[int, int, str]:
    """Return how many of racecheck's reports are of a dispatch, how many are not, and the text of these.

    Args:
        text: the output of a process under racecheck.
        dispatches: of the kernels that it launched.
    """
    reports = _REPORT.findall(text)
    of_dispatch = [r for r in reports if any(_is_of(r, d) for d in dispatches)]
    others = _REPORT.sub(lambda m: "" if m[0] in of_dispatch else m[0], text)
    return len(of_dispatch), len(reports) - len(of_dispatch), others


def _is_of(report: str, dispatch: Dispatch) -> bool:
    """Return True if the report names the dispatch's read, some of its writes, and nothing else."""
    accesses = _ACCESS.findall(report)
    if len(accesses) != report.count(" access at ") or len(accesses) < 2:
        return False
    places = {(kind, kernel, int(at, 16)) for kind, kernel, at in accesses}
    read = ("Read", dispatch.kernel, dispatch.read)
    writes = {("Write", dispatch.kernel, at) for at in dispatch.writes}
    return read in places and places <= {read} | writes
