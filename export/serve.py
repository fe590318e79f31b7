"""`python -m export.serve MODEL`: a service that classifies photos, on LitServe.

POST a photo to /predict, as the body or as the file of a form:

    curl --data-binary @rose.jpg http://127.0.0.1:8000/predict

It answers with the JSON of `python -m export.infer --json`, or with a status and the reason:
401 (no or a wrong X-API-Key, where $LIT_SERVER_API_KEY is set), 413 (too large), 422 (no photo that
can be read), 503 (too many wait already), 504 (out of time). /health, /info and /metrics are there.
SIGTERM and Ctrl+C let requests under way be answered; the exit status is then 0 (143 in the first
second or two, while it is still being loaded).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import FrameType
from typing import Any, Final

from export.classifier import Classifier
from export.infer import note, positive
from export.session import DEVICES, Device
from trainer.cli import guarded, inert
from trainer.schema import ThawError

_BATCH: Final = 64
_CAPACITY: Final = 64
_SECONDS: Final = 30
_MOST_BYTES: Final = 20_000_000  # as the app takes
_TOP: Final = 5
_LOOPBACK: Final = "127.0.0.1"
_KEY: Final = "LIT_SERVER_API_KEY"


class ServeError(ThawError):
    """The service cannot start."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0 stopped by a signal, 2 not started."""
    args = _parser().parse_args(argv)
    return guarded(lambda: _until_stopped(args))


def _until_stopped(args: argparse.Namespace) -> int:
    """LitServe drains on KeyboardInterrupt, and knows no SIGTERM."""
    ours = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        if os.getpid() == ours:  # LitServe's processes inherit this
            for name in (signal.SIGTERM, signal.SIGINT):
                signal.signal(name, signal.SIG_IGN)
            raise KeyboardInterrupt

    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, stop)
    try:
        _serve(args)
    except KeyboardInterrupt:
        pass  # before it was ready; later LitServe catches it
    finally:
        for process in multiprocessing.active_children():
            process.kill()
    return 0


def _serve(args: argparse.Namespace) -> None:
    try:
        from export.litserve_api import PATH, Api, make_server
    except ImportError as error:
        raise ServeError(
            f"The service needs LitServe ({error}): pip install -r requirements-serve.txt"
        ) from error
    _refuse_taken(args.host, args.port)
    facts = _try(args.model, args.device)
    if args.host != _LOOPBACK and not os.environ.get(_KEY):
        note(f"Whoever reaches this machine may use it: ${_KEY} is not set.")
    api = Api(args.model, args.device, args.top, args.batch)
    server = make_server(api, args.capacity, args.timeout, _MOST_BYTES, facts)
    print(f"{inert(facts['run_id'])} on {facts['provider']}: {args.host}:{args.port}{PATH}")
    sys.stdout.flush()
    own = {"access_log": False, "server_header": False, "generate_client_file": False}
    server.run(args.host, args.port, num_api_servers=1, log_level="warning", **own)


def _try(model: Path, device: Device) -> dict[str, Any]:
    """What /info says of the model. Raises what Classifier.load does, which a worker of LitServe's
    would only log; in a process of its own, which takes a GPU's memory along when it ends."""
    process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    try:
        facts, said = process.submit(_facts, model, device).result()
    except BrokenProcessPool as error:
        raise ServeError(f"The process that opened {model} died: {error}") from error
    process.shutdown()
    if said:
        note(said)
    return facts


def _facts(model: Path, device: Device) -> tuple[dict[str, Any], str | None]:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the service ends it
    classifier = Classifier.load(model, device, tell=note)
    about = classifier.metadata
    named = ("run_id", "arch", "precision", "classes")
    facts = {name: getattr(about, name) for name in named} | {"provider": classifier.provider}
    return facts, classifier.note


def _refuse_taken(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServeError(f"Cannot listen on {host}, port {port}: {error.strerror}.") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export.serve",
        description="Serve a model.onnx that `python -m export` wrote: POST a photo to /predict.",
        epilog=f"Where ${_KEY} is set, clients must send it as X-API-Key. Exit status: 0 stopped "
        "by SIGTERM or Ctrl+C, all requests under way answered; 2 not started.",
        allow_abbrev=False,
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="a model.onnx")
    parser.add_argument(
        "--host",
        choices=(_LOOPBACK, "0.0.0.0", "::"),
        default=_LOOPBACK,
        help=f"who may reach it; others than {_LOOPBACK}: everybody (default: {_LOOPBACK})",
    )
    parser.add_argument("--port", type=_port, default=8000, help="default: 8000")
    parser.add_argument(
        "--device", choices=DEVICES, default="auto", help="as of export.infer (default: auto)"
    )
    for flag, default, what in (
        ("--top", _TOP, "classes to name"),
        ("--batch", _BATCH, "photos that are classified together at most; 1: each by itself"),
        ("--capacity", _CAPACITY, "photos under way at most; others are answered 503"),
        ("--timeout", _SECONDS, "seconds that a photo may wait; then it is answered 504"),
    ):
        parser.add_argument(
            flag, type=positive, default=default, metavar="N", help=f"{what} (default: {default})"
        )
    return parser


def _port(text: str) -> int:
    """LitServe takes no others."""
    if not (text.isdecimal() and 1024 <= int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 1024 to 65535")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
