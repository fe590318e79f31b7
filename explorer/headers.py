"""What every answer of the app tells the browser: load nothing from anywhere else.

Names of runs, classes and files never reach a page as Markdown or HTML. Should one, the browser
still fetches no picture for it, sends nothing to another place, and no other site can put the app
into a frame to have its buttons clicked.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]

# Streamlit's page has a script of its own in it, Vega compiles expressions, and photos of the
# camera and downloads are blobs.
POLICY: Final = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "media-src 'self' data: blob:",
        "font-src 'self' data:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "frame-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'none'",
    )
)
_HEADERS: Final = (
    (b"content-security-policy", POLICY.encode()),
    (b"referrer-policy", b"same-origin"),
    (b"x-content-type-options", b"nosniff"),
)


class SafeHeaders:
    """ASGI middleware that adds them to every HTTP response."""

    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                ours = {name for name, _ in _HEADERS}
                theirs = [one for one in message.get("headers", ()) if one[0].lower() not in ours]
                message["headers"] = [*theirs, *_HEADERS]
            await send(message)

        await self._app(scope, receive, sending if scope["type"] == "http" else send)
