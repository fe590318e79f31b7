"""Thaw's models on LitServe, which brings the server, batches, /health and /info.

Needs requirements-serve.txt; `export.serve` is the command line. LitServe leaves to its users what
is here: a bound on the requests that wait, a limit on the time that each may take, and /metrics.
"""

# No `from __future__ import annotations`: FastAPI must find `Photo` itself in a signature.

import asyncio
import contextlib
import io
import signal
from pathlib import Path
from typing import Annotated, Any, Final

import litserve
from fastapi import Depends, HTTPException, Request, Response
from litserve.loops.simple_loops import BatchedLoop
from prometheus_client import CONTENT_TYPE_LATEST, Counter, Gauge, Histogram, generate_latest
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from export.classifier import Classifier, Result
from export.infer import json_top
from export.session import Device

PATH: Final = "/predict"
# LitServe refuses what has waited for too long when its turn comes. What is not answered by then,
# because it still arrives or the worker died, is given up this many seconds later.
_GRACE: Final = 5.0
# How long whoever is refused may go on sending: cut off, some would not read the answer.
_LINGER: Final = 2.0

_ANSWERS: Final = Counter("thaw_answers", "Answers to photos, by HTTP status", ["status"])
_SECONDS: Final = Histogram("thaw_answer_seconds", "Seconds from a request to its answer")
_UNDER_WAY: Final = Gauge("thaw_photos_under_way", "Photos that arrive, wait or are classified")


_Requests = tuple[list[Any], list[Any]]  # to answer, and those that have waited too long


async def _read(request: Request) -> bytes:
    """The photo: the body itself, or the file of a form."""
    try:
        return await _photo_of(request)
    except ClientDisconnect:
        raise HTTPException(400, "The photo did not arrive.") from None


async def _photo_of(request: Request) -> bytes:
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        return await request.body()
    async with request.form(max_files=1, max_fields=8) as form:
        for value in form.values():
            if isinstance(value, UploadFile):
                return await value.read()
    raise HTTPException(400, "There is no file in the form.")


Photo = Annotated[bytes, Depends(_read)]


class Api(litserve.LitAPI):  # type: ignore[misc, unused-ignore]
    """What LitServe's worker does with photos; the results are those of `export.infer`."""

    def __init__(self, model: Path, device: Device, top: int, batch: int) -> None:
        super().__init__(max_batch_size=batch, loop=_SleepingLoop(), api_path=PATH)
        self._model, self._device, self._top = model, device, top

    def setup(self, device: str) -> None:
        """`device` is LitServe's word for this worker; the session finds its own."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C: the server ends this process, last
        self._classifier = Classifier.load(self._model, self._device)

    def decode_request(self, request: Photo) -> bytes:
        """As it came. LitServe decodes one after the other, and one that fails takes its whole
        batch along; the classifier decodes on all cores, and names the one that failed."""
        return request

    def predict(self, photos: list[bytes]) -> list[Result]:
        return self._classifier.classify(map(io.BytesIO, photos), self._top)

    def encode_response(self, result: Result) -> JSONResponse:
        if result.error is not None:
            return JSONResponse({"detail": result.error}, 422)
        run, provider = self._classifier.metadata.run_id, self._classifier.provider
        return JSONResponse({"run_id": run, "provider": provider, **json_top(result)})


class _SleepingLoop(BatchedLoop):  # type: ignore[misc, unused-ignore]
    """LitServe's own asks for requests without a pause: 0.65 of a core while there were none. This
    one sleeps until the first is there, and takes those along that came meanwhile."""

    def get_batch_requests(self, api: Any, queue: Any, transport: Any) -> _Requests:
        first = self.get_request(queue, timeout=1.0)
        if first is None:
            return [], []
        found: _Requests = super().get_batch_requests(api, _Begun(first, queue), transport)
        return found


class _Begun:
    """A queue of which the first was taken already."""

    def __init__(self, first: Any, rest: Any) -> None:
        self._first, self._rest = [first], rest

    def get_nowait(self) -> Any:
        return self._first.pop() if self._first else self._rest.get_nowait()


class Gate:
    """ASGI middleware: at most `capacity` photos under way, the others are answered 503 at once;
    nobody waits longer than `seconds`."""

    def __init__(self, app: ASGIApp, capacity: int, seconds: float) -> None:
        self._app, self._capacity, self._seconds = app, capacity, seconds
        self._under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != PATH:
            await self._app(scope, receive, send)
        elif self._under_way >= self._capacity:
            await _discard(receive)
            await _refusal(503, "Too many photos wait already.")(scope, receive, send)
        else:
            self._under_way += 1
            with _UNDER_WAY.track_inprogress(), _SECONDS.time():
                try:
                    await self._in_time(scope, receive, send)
                finally:
                    self._under_way -= 1

    async def _in_time(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                _ANSWERS.labels(message["status"]).inc()
            await send(message)

        try:
            async with asyncio.timeout(self._seconds):
                await self._app(scope, receive, sending)
        except TimeoutError:
            if begun:
                raise
            await _refusal(504, "Request timed out")(scope, receive, send)


def _refusal(status: int, why: str) -> JSONResponse:
    _ANSWERS.labels(status).inc()
    again = {"Retry-After": "1"} if status == 503 else None
    return JSONResponse({"detail": why}, status, again)


async def _discard(receive: Receive) -> None:
    # A body that is too large ends in LitServe's own HTTPException.
    with contextlib.suppress(TimeoutError, HTTPException):
        async with asyncio.timeout(_LINGER):
            while (await receive()).get("more_body"):
                pass


def make_server(
    api: Api, capacity: int, seconds: float, most_bytes: int, facts: dict[str, Any]
) -> Any:
    """A LitServer that is ready to run, in one process that answers and one that computes.

    `facts` is what /info says of the model.
    """
    server = litserve.LitServer(
        api,
        accelerator="cpu",  # LitServe's word for one worker; see Api.setup
        devices=1,
        timeout=seconds,
        max_payload_size=most_bytes,
        model_metadata=facts,
        middlewares=[(Gate, {"capacity": capacity, "seconds": seconds + _GRACE})],
        disable_openapi_url=True,  # its page would load scripts from elsewhere
        restart_workers=True,
    )
    server.uvicorn_graceful_timeout = int(seconds + 2 * _GRACE)
    allowed = [Depends(server.setup_auth())]
    server.app.add_api_route("/metrics", _metrics, dependencies=allowed)
    return server


def _metrics() -> Response:
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)
