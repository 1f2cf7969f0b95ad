"""The files of a checkpoint's folder: those that may be opened, and their names.

Only regular files are opened, so that no FIFO or device can block. A link may lead to a file in the
folder; and, since a Hugging Face cache is made of links (`models--*/snapshots/REVISION/NAME` to
`models--*/blobs/HASH`), to one in the `blobs` of the same cached repository. Other links could bring
any file of the machine into a checkpoint, and are refused. Names are UTF-8 whatever the locale.
"""

# SPDX-License-Identifier: Apache-2.0
import os
import stat
from pathlib import Path
from typing import Any

SUFFIX = ".safetensors"
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def is_shard_name(name: Any) -> bool:
    """Return True for the plain name of a safetensors file that is not hidden."""
    return (
        isinstance(name, str)
        and name.endswith(SUFFIX)
        and not name.startswith(".")
        and not any(c in name for c in "/\\\0")
    )


def is_below(name: Any) -> bool:
    """Return True for the name of a file in a folder or below it."""
    return (
        isinstance(name, str)
        and not any(c in name for c in "\\\0")
        and all(part not in ("", ".", "..") for part in name.split("/"))
    )


def local(name: str) -> str:
    """Encode a name in UTF-8, as the functions of the operating system take it under any locale."""
    return os.fsdecode(name.encode())


def name_of(path: Path | str) -> str | None:
    """Return the name of a file; None if it is not UTF-8."""
    try:
        return os.fsencode(path).decode()
    except UnicodeDecodeError:
        return None


def refusal(folder: Path, path: Path) -> str | None:
    """Say why a file of the folder may not be opened; None if it may.

    Args:
        path: below the folder, itself a link or not.

    Raises:
        OSError: there is no such file, or it cannot be reached.
    """
    root, real = (Path(os.path.realpath(p)) for p in (folder, path))
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        return f"it is a link out of the folder, to {real}, which is not followed"
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        return f"it is {_KINDS.get(stat.S_IFMT(mode), 'no file')}; only regular files are opened"
    return None
