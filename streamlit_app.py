"""Thaw's explorer: `streamlit run streamlit_app.py [-- [--runs-dir DIR] [--read-only]]`."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import streamlit as st
from starlette.formparsers import MultiPartParser
from starlette.middleware import Middleware

from explorer.access import Server, exposure, note_exposure
from explorer.headers import SafeHeaders
from explorer.loading import load
from explorer.pages.sign_in import is_required

# Uploads stay in memory: what is larger would be written to a temporary file.
MultiPartParser.spool_max_size = 2**25


@asynccontextmanager
async def _start(app: st.App) -> AsyncIterator[None]:
    """See who can reach the app, and import pandas and Altair while the browser is opening."""
    note_exposure(exposure(_server()))
    threading.Thread(target=load, daemon=True).start()
    yield


def _server() -> Server:
    return Server(
        address=st.get_option("server.address"),
        cors=bool(st.get_option("server.enableCORS")),
        xsrf=bool(st.get_option("server.enableXsrfProtection")),
        sign_in=is_required(),
    )


app = st.App("explorer/pages/app.py", lifespan=_start, middleware=[Middleware(SafeHeaders)])
