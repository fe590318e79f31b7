"""Thaw's explorer. Start it with `streamlit run streamlit_app.py [-- --runs-dir DIR]`."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import streamlit as st
from starlette.formparsers import MultiPartParser

from explorer.loading import load

# Uploads stay in memory: what is larger would be written to a temporary file.
MultiPartParser.spool_max_size = 2**25


@asynccontextmanager
async def _warm_up(app: st.App) -> AsyncIterator[None]:
    """Import pandas and Altair while the browser is still opening."""
    threading.Thread(target=load, daemon=True).start()
    yield


app = st.App("explorer/pages/app.py", lifespan=_warm_up)
