"""The slow imports that every page needs, made once and by one thread at a time."""

from __future__ import annotations

import threading
from importlib import import_module

_LOCK = threading.Lock()


def load() -> None:
    """Import the first page and what it needs: over half a second.

    Altair's modules import each other in circles. Where two threads begin at different ends, one of
    them finds a module half done and fails, so whoever comes second waits here.
    """
    with _LOCK:
        import_module("explorer.pages.compare")
        # Streamlit has each chart checked as a whole; checking its parts too as they are made takes
        # a third of the time of a chart.
        import_module("altair.utils.schemapi").disable_debug_mode()
