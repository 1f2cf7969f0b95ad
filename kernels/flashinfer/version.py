"""The installed version of flashinfer-python, and the versions that the descriptions cover."""

# SPDX-License-Identifier: Apache-2.0
import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

Version = tuple[int, ...]
"""The numbers of a release: (0, 7, 2) for 0.7.2.post1."""


@dataclass(frozen=True)
class Versions:
    """A range of versions from `since` on, without `before`; None means no end."""

    since: Version = ()
    before: Version | None = None

    def __contains__(self, version: Version) -> bool:
        return self.since <= version and (self.before is None or version < self.before)


EVERY = Versions()
CITED = (0, 7, 2)
"""The version that the sources cite, 0.7.2.post1, unless they name another."""
NEW = (0, 7, 4)
"""The newest version that is described. It follows 0.7.2 in the registry that we know."""
UNTIL_NEW, SINCE_NEW = Versions(before=NEW), Versions(NEW)
"""The ranges of what NEW removed or changed, and of what it added."""
DESCRIBED = (Versions((0, 7), before=(0, 7, 3)), Versions(NEW, before=(0, 7, 5)))
"""The versions whose arguments and bits are described: those like CITED, and NEW."""


@dataclass(frozen=True)
class Installation:
    """The installed parts that FlashInfer's backends need."""

    version: Version | None  # None: FlashInfer is not installed; (): its version is not known
    has_cake_programs: bool = False
    has_cudnn: bool = False

    @property
    def described_as(self) -> Version:
        """The version by which arguments and rules are chosen."""
        return self.version or CITED

    @property
    def is_described(self) -> bool:
        """True if the arguments and bits of this version are known."""
        return self.version is not None and any(self.version in span for span in DESCRIBED)


def parsed(text: str) -> Version:
    """Parse "0.7.2.post1" to (0, 7, 2), and a text that begins with no release to ()."""
    release = re.match(r"\d+(\.\d+){0,2}", text)
    return () if release is None else tuple(int(part) for part in release[0].split("."))


def written(version: Version) -> str:
    """ "0.7.2" of (0, 7, 2)."""
    return ".".join(map(str, version))


def _version() -> Version | None:
    if importlib.util.find_spec("flashinfer") is None:
        return None
    try:
        return parsed(importlib.metadata.version("flashinfer-python"))
    except importlib.metadata.PackageNotFoundError:
        return ()


def _has_cake_programs() -> bool:
    """True if cake can be built here: the wheel of 0.7.2.post1 lacks the sources that it lists."""
    spec = importlib.util.find_spec("flashinfer")
    if spec is None or importlib.util.find_spec("flashinfer_jit_cache") is not None:
        return spec is not None
    folders = [
        Path(p) / "experimental/cake_nvfp4_per_token/csrc"
        for p in spec.submodule_search_locations or ()
    ]
    return any(folder.is_dir() for folder in folders)


HERE = Installation(
    _version(), _has_cake_programs(), has_cudnn=importlib.util.find_spec("cudnn") is not None
)
"""This environment. A test puts another in its place."""
