"""The page."""

from __future__ import annotations

from explorer.pages import parts


def page() -> None:
    parts.opened("Which learning rate, and how many layers?")
