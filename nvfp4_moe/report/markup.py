"""HTML built of elements, so that no text of the data can become markup."""

# SPDX-License-Identifier: Apache-2.0
import html

VOID = ("meta",)
"""Elements without content that we use."""


class Markup(str):
    """Text that is HTML already; `element` and `join` escape every other."""


def join(*content: str) -> Markup:
    """Join contents, and escape text."""
    return Markup("".join(c if isinstance(c, Markup) else escape(c) for c in content))


def element(tag: str, /, *content: str, **attributes: str | int | None) -> Markup:
    """Make an element; its text and the values of its attributes are escaped.

    Args:
        tag: its name.
        content: `Markup` is taken as it is.
        attributes: None leaves one out. `class_` is class, `aria_label` is aria-label.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{tag}{given}>" if tag in VOID else f"<{tag}{given}>{join(*content)}</{tag}>")


def escape(text: str) -> Markup:
    """Escape any text; a character that UTF-8 cannot write (a lone surrogate) becomes `?`."""
    return Markup(html.escape(text.encode("utf-8", "replace").decode()))
