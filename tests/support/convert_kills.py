"""Kills a conversion in each of its operations on files, and resumes it: the process of a test.

    convert_kills.py SOURCE FOLDER

A child is killed before its n-th operation in the destination, for every n; and, in place of each
synchronization of a file, after half of the file is lost. What lies there then must be no checkpoint,
or all of it; and converting again must leave the bytes of a conversion in one go. Prints the operations.
"""

# SPDX-License-Identifier: Apache-2.0
import itertools
import os
import sys
from pathlib import Path

import torch
from checkpoint_cases import bytes_of

from nvfp4_moe.checkpoints import CheckpointError, convert
from nvfp4_moe.checkpoints.folder import INDEX
from nvfp4_moe.checkpoints.layer_error import LayerError
from nvfp4_moe.checkpoints.resumable_writer import PART, RECORD

KILLED, OTHER = 9, 8
EVENTS = (
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.truncate",
    "shutil.copyfile",
)


class Killer:
    """Ends the process at an operation below a folder; counts them from 0."""

    def __init__(self, folder: Path, at: int, half: bool):
        self.folder, self.at, self.half = str(folder), at, half
        self.count = 0
        self.armed = True
        os.fsync = self.fsync
        sys.addaudithook(self.event)

    def event(self, name: str, arguments: tuple) -> None:
        if self.armed and name in EVENTS:
            paths = [os.fsdecode(a) for a in arguments if isinstance(a, str | bytes | os.PathLike)]
            if any(path.startswith(self.folder) for path in paths):
                self.step(name)

    def fsync(self, number: int) -> None:
        self.step("fsync", os.readlink(f"/proc/self/fd/{number}"))

    def step(self, name: str, synced: str = "") -> None:
        if self.count == self.at:
            self.armed = False
            if self.half and os.path.isfile(synced):
                os.truncate(synced, os.path.getsize(synced) // 2)
            elif self.half:
                os._exit(OTHER)
            os.write(1, f"{name}\n".encode())
            os._exit(KILLED)
        self.count += 1


def killed(source: Path, folder: Path, at: int, half: bool) -> int:
    """The exit status of a process that is killed at an operation; 0 if it has no so many."""
    child = os.fork()
    if child == 0:
        Killer(folder, at, half)
        convert(source, folder)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(source: Path, base: Path) -> None:
    torch.set_num_threads(1)  # so that a child may go on after a fork
    os.fsync = lambda number: None  # the machine stays on
    errors = convert(source, base / "whole")
    whole = bytes_of(base / "whole")
    for half in (False, True):
        for at in itertools.count():
            folder = base / f"{at}{'-half' * half}"
            status = killed(source, folder, at, half)
            if status == 0:
                break
            if status == KILLED:
                check(source, folder, whole, errors)
            else:
                assert status == OTHER, (folder, status)


def check(source: Path, folder: Path, whole: dict[str, bytes], errors: list[LayerError]) -> None:
    """Check the folder that a killed conversion left, and the result of the next conversion."""
    left = bytes_of(folder) if folder.exists() else {}
    if INDEX in left:
        left = {name: content for name, content in left.items() if name not in (RECORD, PART)}
        assert left == whole, f"{folder}: an index over other files"
    try:
        assert convert(source, folder) == errors, folder
    except CheckpointError as e:
        assert "it is complete" in str(e) and left == whole, (folder, e)
    after = bytes_of(folder)
    assert after == whole, (folder, after.keys() ^ whole.keys())


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
