"""A visitor without a browser: what Streamlit's front end says to its server, and the answer."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from urllib.parse import quote, urlencode, urlsplit

from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from websockets.sync.client import connect

_PROTOCOL = "streamlit"


@dataclass(frozen=True)
class Seen:
    """What one look at a page brought: the seconds until it was complete, the bytes, how many
    elements, the errors shown, and the parts that want to be refreshed (id, seconds in between)."""

    seconds: float
    size: int
    elements: int
    errors: tuple[str, ...]
    refreshing: tuple[tuple[str, float], ...]


def xsrf_cookie(address: str) -> str:
    """The cookie that the server gives every visitor; empty where it is set to give none."""
    with urllib.request.urlopen(f"{address}/_stcore/health", timeout=30) as answer:
        return (answer.headers["Set-Cookie"] or "").partition(";")[0]


class Visitor:
    """One session, until it is left."""

    def __init__(self, address: str, cookies: Mapping[str, str] | None = None) -> None:
        self.cookie = xsrf_cookie(address)
        token = self.cookie.partition("=")[2].strip('"') or "none"
        own = [f"{name}={quote(value)}" for name, value in (cookies or {}).items()]
        place = urlsplit(address).netloc
        self._connection = connect(
            f"ws://{place}/_stcore/stream",
            origin=address,  # type: ignore[arg-type]
            subprotocols=[_PROTOCOL, token],  # type: ignore[list-item]
            additional_headers={"Cookie": "; ".join([self.cookie, *own])},
            max_size=None,
        )
        self.session_id = ""
        self._text = b""

    def __enter__(self) -> Visitor:
        self._socket = self._connection.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._connection.__exit__(kind, error, trace)

    def open(self, page: str = "", seconds: float = 60, **link: str | list[str]) -> Seen:
        """Look at a page, such as "runs"."""
        message = BackMsg()
        message.rerun_script.page_name = page
        message.rerun_script.query_string = urlencode(link, doseq=True)
        return self._ask(message, seconds)

    def says(self, text: str) -> bool:
        """Whether the last answer held these words."""
        return text.encode() in self._text

    def refresh(self, fragment: str, page: str = "", seconds: float = 60) -> Seen:
        """Have a part of the page drawn again, as the front end does from time to time."""
        message = BackMsg()
        message.rerun_script.page_name = page
        message.rerun_script.fragment_id = fragment
        message.rerun_script.is_auto_rerun = True
        return self._ask(message, seconds)

    def _ask(self, message: BackMsg, seconds: float) -> Seen:
        started = time.perf_counter()
        self._socket.send(message.SerializeToString())
        size, elements, self._text = 0, 0, b""
        errors: list[str] = []
        refreshing: list[tuple[str, float]] = []
        for content in self._until_finished(started + seconds):
            size += content.ByteSize()
            kind = content.WhichOneof("type")
            if kind == "new_session":
                self.session_id = content.new_session.initialize.session_id or self.session_id
            elif kind == "auto_rerun":
                refreshing.append((content.auto_rerun.fragment_id, content.auto_rerun.interval))
            elif kind == "delta" and content.delta.WhichOneof("type") == "new_element":
                elements += 1
                self._text += content.SerializeToString()
                errors += _errors(content)
        taken = time.perf_counter() - started
        return Seen(taken, size, elements, tuple(errors), tuple(refreshing))

    def _until_finished(self, deadline: float) -> Iterator[ForwardMsg]:
        while True:
            content = ForwardMsg()
            received = self._socket.recv(deadline - time.perf_counter(), decode=False)
            content.ParseFromString(received)
            yield content
            early = content.script_finished == ForwardMsg.FINISHED_EARLY_FOR_RERUN
            if content.WhichOneof("type") == "script_finished" and not early:
                return


def _errors(content: ForwardMsg) -> list[str]:
    element = content.delta.new_element
    if element.WhichOneof("type") == "exception":
        return [element.exception.message]
    return []
