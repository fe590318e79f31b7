"""The page."""

from __future__ import annotations

from explorer.pages import parts


def page() -> None:
    parts.opened("Is the model you ship the one you measured?")
