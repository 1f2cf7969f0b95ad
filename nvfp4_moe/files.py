"""The paths that a command is given, checked before its work: each refusal is one line."""

# SPDX-License-Identifier: Apache-2.0
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .exits import CommandError

ROOM = 4 << 20
"""The assumed bytes of a report, or of its JSON."""


def check_safetensors(argument: str, path: str | Path) -> None:
    """Check that a file can be read as safetensors.

    Raises:
        CommandError: it is missing, no regular file, unreadable, or of another format.
    """
    said = f"{argument} is {str(path)!r}"
    try:
        mode = Path(path).stat().st_mode
        if not stat.S_ISREG(mode):
            what = "a folder" if stat.S_ISDIR(mode) else "no regular file"
            raise CommandError(f"{said}, {what}; it must be a safetensors file")
        with safe_open(str(path), "pt") as file:
            file.keys()
    except SafetensorError as error:
        raise CommandError(f"{said}, no safetensors file ({error}); it must be one") from None
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        raise CommandError(f"{said}; it must be a file that can be read: {_why(error)}") from None


def check_folder(argument: str, path: str | Path, room: int = ROOM) -> None:
    """Check that files can be written into a folder, which is made anew or is there; it is left as is.

    Root may write where the mode forbids it, and nobody may below /proc: so a file is written.

    Args:
        room: bytes that must be free.

    Raises:
        CommandError: a part of the path is no folder, nothing can be written there, or the disk is full.
    """
    said = f"{argument} is {str(path)!r}"
    made: list[Path] = []
    if not str(path):
        raise CommandError(f"{said}; it must be a folder to write to")
    try:
        folder = Path(path).absolute()
        for part in (*reversed(folder.parents), folder):
            if part.is_dir():
                continue
            if os.path.lexists(part):
                raise CommandError(f"{said}; it must be a folder, and {part} is a file")
            part.mkdir()
            made.append(part)
        _check_room(said, folder, room)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".nvfp4-moe-") as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
            os.fsync(probe.fileno())
    except (OSError, ValueError) as error:
        raise CommandError(f"{said}; it must be a folder to write to: {_why(error)}") from None
    finally:
        for part in reversed(made):
            with suppress(OSError):  # another process may have begun to use it
                part.rmdir()


def check_file(argument: str, path: str | Path, room: int = ROOM) -> None:
    """Check that a file can be written, and leave it, or its absence, as it is.

    Raises:
        CommandError: it is a folder, lies in none, cannot be written, or the disk is full.
    """
    said, file = f"{argument} is {str(path)!r}", Path(path)
    try:
        if file.is_dir():
            raise CommandError(f"{said}, a folder; it must be a file")
        if not file.parent.is_dir():
            raise CommandError(f"{said}; it must be in a folder, and {file.parent} is none")
        if not file.exists():
            _check_room(said, file.parent, room)
            with tempfile.NamedTemporaryFile(dir=file.parent, prefix=".nvfp4-moe-"):
                return
        if stat.S_ISFIFO(file.stat().st_mode):  # opening one waits for its reader
            return
        number = os.open(file, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(number, b"")  # /dev/full refuses even that
        finally:
            os.close(number)
        if file.is_file():
            _check_room(said, file.parent, room)
    except (OSError, ValueError) as error:
        raise CommandError(
            f"{said}; it must be a file that can be written: {_why(error)}"
        ) from None


def _check_room(said: str, folder: Path, room: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < room:
        raise CommandError(
            f"{said}; its disk must have {megabytes(room)} free, and has {megabytes(free)}"
        )


def megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
