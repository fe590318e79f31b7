"""Who may see the runs, and who may change them. Knows no Streamlit.

Everything in the explorer that writes to a runs folder or starts a process asks `may_write` first:
buttons that are not shown are a courtesy, this is the rule.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from explorer.remote import is_url, runs_place, shown
from trainer.runlog import RunError

READ_ONLY_VARIABLE: Final = "THAW_READ_ONLY"
# Also what somebody may type who means it: an explorer that is writable by a slip is no use.
_FLAGS: Final = ("--read-only", "--readonly", "--read_only")
_NO: Final = ("0", "no", "false", "off")

_exposed = ""


class ReadOnlyError(RunError):
    """A change that was asked of an explorer in which nothing may be changed."""


# --- read-only ----------------------------------------------------------------------------------


def read_only_because() -> str:
    """Why this process may change nothing; empty where it may.

    `-- --read-only` on the command line and THAW_READ_ONLY=1 ask for it. THAW_READ_ONLY=0 says that
    an explorer which others can reach may be changed by them all the same. Runs at a URL are never
    changed.
    """
    if is_url(place := runs_place(sys.argv[1:], os.environ)):
        return f"The runs are at {shown(place)}, and Thaw only reads what is not on this machine."
    said = os.environ.get(READ_ONLY_VARIABLE, "").strip().lower()
    if _is_asked_for(sys.argv[1:]) or (said and said not in _NO):
        return "The explorer was started read-only."
    return "" if said else _exposed


def may_write(what: str) -> None:
    """Raise ReadOnlyError where nothing may be changed; `what` is what somebody wanted to."""
    if reason := read_only_because():
        raise ReadOnlyError(f"{what} is not possible here. {reason}")


def _is_asked_for(arguments: Sequence[str]) -> bool:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(*_FLAGS, action="store_true")
    try:
        return bool(parser.parse_known_args(list(arguments))[0].read_only)
    except argparse.ArgumentError:  # `--read-only=yes`
        return True


@dataclass(frozen=True)
class Server:
    """What Streamlit's options say of how the app can be reached."""

    address: str | None
    cors: bool
    xsrf: bool
    sign_in: bool


def exposure(server: Server) -> str:
    """Why anybody but who sits at this machine could use the app; empty where nobody can.

    With sign-in Streamlit keeps foreign pages out whatever its options say.
    """
    if server.sign_in:
        return ""
    if not _is_loopback(server.address):
        where = f"at {server.address}" if server.address else "at every address"
        return (
            f"The explorer can be reached from other machines ({where}) and asks nobody to sign in."
        )
    if not (server.cors and server.xsrf):
        return "Streamlit's protection against other pages in the same browser is off."
    return ""


def note_exposure(reason: str) -> None:
    """Make this process read-only for this reason, unless THAW_READ_ONLY says something else."""
    global _exposed
    _exposed = reason


def _is_loopback(address: str | None) -> bool:
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address or "").is_loopback
    except ValueError:
        return False


# --- sign-in ------------------------------------------------------------------------------------


def is_let_in(user: Mapping[str, Any], allowed: Sequence[str] | None) -> bool:
    """Whether who signed in may see the app. `user` is what the provider says of them; `allowed`
    holds addresses and whole domains such as "@example.org"; None: all whom the provider knows.

    An address that the provider calls unverified counts for nothing: anybody could have typed it.
    """
    if user.get("is_logged_in") is not True:
        return False
    if allowed is None:
        return True
    address = user.get("email")
    if not isinstance(address, str) or user.get("email_verified", True) not in (True, "true"):
        return False
    domain = "@" + address.rpartition("@")[2]
    return not {_plain(address), _plain(domain)}.isdisjoint(map(_plain, allowed))


def _plain(text: str) -> str:
    """In small letters, where that is safe: some letters of other scripts become a to z by it."""
    return text.lower() if text.isascii() else text


def allowed_addresses(listed: object) -> tuple[str, ...] | None:
    """The list `allowed` in the table [thaw] of secrets.toml; None where there is none. Whatever is
    no list of texts lets nobody in."""
    if listed is None:
        return None
    one = [listed] if isinstance(listed, str) else listed
    entries = one if isinstance(one, Sequence) else []
    return tuple(entry.strip() for entry in entries if isinstance(entry, str) and "@" in entry)
