"""The service: the same answers as export.infer, or a status that says why not."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from export import infer
from export.classifier import Classifier
from export.serve import main
from export.to_onnx import export_run
from tests.test_hostile_images import BOMBS, HARMLESS
from tests.tiny_run import make_run

ROOT = Path(__file__).resolve().parents[1]
KEY = {"X-API-Key": "of the tests"}
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.onnx, and data/ with 12 photos in 3 folders."""
    folder = tmp_path_factory.mktemp("serve")
    export_run(make_run(folder), output=folder / "model.onnx")
    return folder


# --- without a server -------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--port=80", "--host=example.org", "--batch=0", "--device=tpu"])
def test_wrong_flags(flag: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["model.onnx", flag])


def test_without_litserve_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    for name in ("litserve", "export.litserve_api"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["model.onnx"]) == 2
    assert "pip install -r requirements-serve.txt" in capsys.readouterr().err


@pytest.fixture(scope="module")
def adapter() -> Any:
    for name in ("litserve", "prometheus_client"):
        pytest.importorskip(name, reason="needs requirements-serve.txt")
    from export import litserve_api

    return litserve_api


def test_what_litserve_calls_gives_what_the_classifier_says(adapter: Any, folder: Path) -> None:
    api = adapter.Api(folder / "model.onnx", "cpu", 2, 8)
    before = signal.getsignal(signal.SIGINT)
    api.setup("cpu")
    signal.signal(signal.SIGINT, before)
    contents = [path.read_bytes() for path in sorted((folder / "data").rglob("*.jpg"))]
    contents.insert(1, b"not a photo")
    batch = [api.decode_request(content) for content in contents]
    answers = [api.encode_response(result) for result in api.predict(batch)]
    known = Classifier.load(folder / "model.onnx").classify(map(io.BytesIO, contents), top=2)
    assert [answer.status_code for answer in answers] == [200, 422, *[200] * 11]
    for answer, result in zip(answers, known, strict=True):
        said = json.loads(answer.body)
        if result.error is None:
            assert said.pop("provider") == "CPUExecutionProvider"
            assert said.pop("run_id")
            assert said["top"] == [vars(one) for one in result.top]
            assert (said["label"], said["probability"]) == tuple(said["top"][0].values())[::2]
        else:
            assert said == {"detail": result.error}


def through(gate: Any, path: str, bodies: int) -> list[int]:
    """The statuses of so many requests at once."""
    statuses = []

    async def ask() -> None:
        parts = iter([{"type": "http.request", "body": b"", "more_body": False}])

        async def receive() -> dict[str, Any]:
            return next(parts, {"type": "http.disconnect"})

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        await gate({"type": "http", "path": path, "method": "POST"}, receive, send)

    async def all_of_them() -> None:
        await asyncio.gather(*(ask() for _ in range(bodies)))

    asyncio.run(all_of_them())
    return statuses


def test_the_gate_lets_no_more_in_than_it_may(adapter: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.02)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    gate = adapter.Gate(app, capacity=3, seconds=5)
    assert Counter(through(gate, "/predict", 10)) == {503: 7, 200: 3}
    assert through(gate, "/predict", 3) == [200] * 3, "those that were answered make room"
    assert through(gate, "/health", 10) == [200] * 10


def test_the_gate_waits_no_longer_than_it_may(adapter: Any) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(60)

    gate = adapter.Gate(app, capacity=3, seconds=0.02)
    assert through(gate, "/predict", 2) == [504, 504]
    assert through(gate, "/predict", 3) == [504] * 3


# --- with one ---------------------------------------------------------------------------------


@contextmanager
def served(model: Path, *flags: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A service in a process of its own: its address and the process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "export.serve", str(model), "--port", str(port), *flags]
    environment = {**os.environ, "LIT_SERVER_API_KEY": KEY["X-API-Key"]}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=pipe, stderr=pipe, text=True
    ) as process:
        url = f"http://127.0.0.1:{port}"
        try:
            _wait_until_ready(url, process)
            yield url, process
        finally:
            process.send_signal(signal.SIGTERM)


def _wait_until_ready(url: str, process: subprocess.Popen[str]) -> None:
    for _ in range(300):
        assert process.poll() is None, process.stderr and process.stderr.read()
        try:
            if httpx.get(f"{url}/health", headers=KEY).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise AssertionError("it is not ready after a minute")


@pytest.fixture(scope="module")
def service(adapter: Any, folder: Path) -> Iterator[str]:
    with served(folder / "model.onnx", "--capacity", "8", "--top", "3") as (url, _):
        yield url


def post(url: str, **given: Any) -> httpx.Response:
    return httpx.post(f"{url}/predict", headers=KEY, timeout=60, **given)


@pytest.mark.slow
def test_the_same_answers_as_infer(folder: Path, service: str, capsys: Capture) -> None:
    """As a body and as a form; alone, and beside others."""
    photos = sorted((folder / "data").rglob("*.jpg"))
    infer.main([str(folder / "model.onnx"), *map(str, photos), "--json"])
    document = json.loads(capsys.readouterr().out)
    known = {result.pop("file"): result for result in document["results"]}
    with ThreadPoolExecutor(4) as pool:
        for answers in (
            [post(service, content=path.read_bytes()) for path in photos],
            [post(service, files={"photo": path.read_bytes()}) for path in photos],
            list(pool.map(lambda path: post(service, content=path.read_bytes()), photos)),
        ):
            for path, answer in zip(photos, answers, strict=True):
                said = answer.json()
                assert said.pop("run_id") == document["run_id"]
                assert said.pop("provider") == document["provider"]
                assert [one.pop("probability") for one in said["top"]] == pytest.approx(
                    [one["probability"] for one in known[str(path)]["top"]], abs=1e-6
                )
                assert said["label"] == known[str(path)]["label"]


@pytest.mark.slow
def test_what_is_no_photo_is_refused_in_the_words_of_infer(folder: Path, service: str) -> None:
    classifier = Classifier.load(folder / "model.onnx", "cpu")
    for name, (make, _) in BOMBS.items():
        answer = post(service, content=make())
        (result,) = classifier.classify([io.BytesIO(make())])
        assert (answer.status_code, answer.json()["detail"]) == (422, result.error), name
    for name in ("an APNG", "a GIF of 20,000 frames"):
        assert post(service, content=HARMLESS[name]()).status_code == 200, name
    assert post(service, content=b"").status_code == 422
    assert post(service, data={"photo": "no file"}, files={}).status_code == 422
    assert post(service, data={"a": "b"}, files={"c": ("", b"")}).status_code in (400, 422)
    assert post(service, content=bytes(20_000_001)).status_code == 413
    assert post(service, files={"photo": bytes(20_000_001)}).status_code == 413
    assert post(service, content=bytes(20_000_000)).status_code == 422


@pytest.mark.slow
def test_past_its_capacity_it_answers_or_says_503(folder: Path, service: str) -> None:
    content = (folder / "data" / "rose" / "0.jpg").read_bytes()
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda _: post(service, content=content), range(200)))
    statuses = Counter(answer.status_code for answer in answers)
    assert statuses.keys() == {200, 503}
    assert all(a.headers["Retry-After"] == "1" for a in answers if a.status_code == 503)
    assert httpx.get(f"{service}/health", headers=KEY).text == "ok"
    metrics = httpx.get(f"{service}/metrics", headers=KEY).text
    assert 'thaw_answers_total{status="503"}' in metrics
    assert "thaw_photos_under_way 0.0" in metrics


@pytest.mark.slow
def test_nobody_is_answered_without_the_key(folder: Path, service: str) -> None:
    assert httpx.post(f"{service}/predict", content=b"x").status_code == 401
    for path in ("info", "metrics", "health"):
        assert httpx.get(f"{service}/{path}", headers={"X-API-Key": "no"}).status_code == 401
    info = httpx.get(f"{service}/info", headers=KEY).json()
    assert info["model"]["classes"] == ["daisy", "rose", "tulip"]
    assert httpx.get(f"{service}/docs", headers=KEY).status_code == 404


@pytest.mark.slow
def test_who_is_under_way_is_answered_when_it_is_stopped(folder: Path, service: str) -> None:
    content = (folder / "data" / "rose" / "0.jpg").read_bytes()
    with served(folder / "model.onnx") as (url, process):

        async def ask() -> list[int]:
            unlimited = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(headers=KEY, timeout=60, limits=unlimited) as client:
                asked = [
                    asyncio.create_task(client.post(f"{url}/predict", content=content))
                    for _ in range(50)
                ]
                await until_all_are_there(client, asked)
                process.send_signal(signal.SIGTERM)
                return [(await one).status_code for one in asked]

        async def until_all_are_there(client: httpx.AsyncClient, asked: list[Any]) -> None:
            there = 0.0
            while there < len(asked):
                metrics = (await client.get(f"{url}/metrics")).text
                under_way = metrics.rpartition("\nthaw_photos_under_way ")[2].split()[0]
                there = float(under_way) + sum(one.done() for one in asked)

        assert asyncio.run(ask()) == [200] * 50
        assert process.wait(20) == 0
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


@pytest.mark.slow
def test_a_worker_that_dies_is_begun_again(folder: Path, service: str) -> None:
    content = (folder / "data" / "rose" / "0.jpg").read_bytes()
    with served(folder / "model.onnx", "--timeout", "1") as (url, process):
        for child in children(process.pid):
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                os.kill(child, signal.SIGKILL)
        assert post(url, content=content).status_code in (200, 504)
        _wait_until_ready(url, process)
        assert post(url, content=content).status_code == 200


def children(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
