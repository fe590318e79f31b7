"""The page."""

from __future__ import annotations

from explorer.pages import parts


def page() -> None:
    parts.opened("Which classes and photos did unfreezing change?")
