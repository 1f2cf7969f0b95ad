"""MkDocs calls these functions when `make docs` builds the site (`mkdocs.yml`, `hooks`).

The README, CONTRIBUTING and CHANGELOG lie outside `docs/`, where readers of a repository look for them.
They become pages of the site, and their links lead to pages.
"""

# SPDX-License-Identifier: Apache-2.0
import posixpath
import re
import shutil
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""The files of the repository's root that are pages, and their names in the site."""
LINK = re.compile(r"\[([^\]]*)\]\((?!https?://|#)([^)#]+)(#[^)]*)?\)")

ASKED = re.compile(r" -> Asked\[\w+\](?=:)")
"""The annotation of a function whose decorator runs the checked call; a caller gets another type."""


def on_startup(**_: object) -> None:
    """Copy the package to a folder whose every folder is a package, for the API reference.

    The package has links for `kernels` and `reference`, which lack an `__init__.py`; griffe, which
    reads the docstrings, enters neither.
    """
    package = ROOT / "build" / "api" / "nvfp4_moe"
    shutil.rmtree(package, ignore_errors=True)
    unread = shutil.ignore_patterns("__pycache__", "data", "*.xz")
    shutil.copytree(ROOT / "nvfp4_moe", package, ignore=unread)
    for name in ("kernels", "reference"):
        (package / name / "__init__.py").touch()
    for path in package.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        path.write_text(ASKED.sub("", text), encoding="utf-8")


def on_files(files: Files, *, config: MkDocsConfig) -> None:
    """Add the pages of the repository's root."""
    for name, page in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to pages of the site; a link to a file that is no page becomes the file's path."""
    source = {new: old for old, new in PAGES.items()}.get(page.file.src_uri)
    folder = "" if source else "docs"

    def rewritten(link: re.Match[str]) -> str:
        text, target, anchor = link.groups()
        path = posixpath.normpath(posixpath.join(folder, target))
        inside = PAGES.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(inside):
            return f"[{text}]({inside}{anchor or ''})"
        return f"`{path}`"

    return LINK.sub(rewritten, markdown)
