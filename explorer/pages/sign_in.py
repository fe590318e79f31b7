"""Sign-in: what a visitor sees before, who is let in, and the way out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import streamlit as st
from streamlit.errors import StreamlitAuthError

from explorer.access import allowed_addresses, is_let_in

_AUTH: Final = "auth"  # Streamlit's table in secrets.toml
_OURS: Final = "thaw"


def is_required() -> bool:
    """Whether secrets.toml asks for sign-in, or may: one that cannot be read keeps all out."""
    return _unreadable() or (st.secrets.load_if_toml_exists() and _AUTH in st.secrets)


def admitted() -> bool:
    """Whether this visitor may see the app. Where not, the page says what there is to do."""
    if not is_required():
        return True
    user = st.user.to_dict()
    if not _unreadable() and is_let_in(user, _allowed()):
        return True
    st.header("Thaw", anchor=False)
    if _unreadable():
        st.error("The file .streamlit/secrets.toml cannot be read, so nobody can sign in.")
    elif user.get("is_logged_in") is True:
        st.text(f"You are signed in as {_name(user)}, but this explorer is not open to you.")
        st.text("Whoever runs it can add your address, or you can sign in with another one.")
        _way_out()
    else:
        _way_in()
    return False


def page() -> None:
    """Who is signed in, and the way out."""
    st.header("Account", anchor=False)
    st.text(f"Signed in as {_name(st.user.to_dict())}.")
    _way_out()


def _unreadable() -> bool:
    """There is a secrets.toml, and Streamlit goes on as if there was none."""
    files = st.get_option("secrets.files")
    return any(Path(path).exists() for path in files) and not st.secrets.load_if_toml_exists()


def _allowed() -> tuple[str, ...] | None:
    ours = st.secrets.get(_OURS, {})
    return allowed_addresses(ours.get("allowed") if isinstance(ours, Mapping) else ())


def _way_in() -> None:
    if find_spec("authlib") is None:
        st.error("Sign-in is set up here, but what it needs is not installed.")
        st.code("pip install 'streamlit[auth]'", language="bash")
        return
    st.text("Sign in to see the runs.")
    for provider in _providers(st.secrets[_AUTH]):
        # An identity provider's name is whatever the operator wrote, and labels are Markdown.
        label = "Sign in" if provider is None else f"Sign in with `{provider}`"
        if st.button(label, type="primary", key=f"sign-in-{provider}"):
            _login(provider)


def _login(provider: str | None) -> None:
    try:
        st.login(provider)
    except StreamlitAuthError:
        st.error("Sign-in is not set up completely: see the table auth in secrets.toml.")


def _providers(auth: Mapping[str, Any]) -> Sequence[str | None]:
    """The providers that have a name, or the one that needs none."""
    named = [name for name, value in auth.items() if isinstance(value, Mapping)]
    return [name for name in named if name != "client_kwargs"] or [None]


def _way_out() -> None:
    st.button("Sign out", on_click=st.logout)


def _name(user: Mapping[str, Any]) -> str:
    return str(user.get("email") or user.get("name") or user.get("sub") or "somebody")
