"""Many photos on Ray: each once in the result, whoever is killed meanwhile."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from export import infer_ray, parts
from export.classifier import Prediction, Result
from export.infer import main
from export.parts import Folder, Job, PartsError, Plan, fetched, photos_at, to_parquet
from export.to_onnx import export_run
from tests.s3_server import s3_server
from tests.test_infer_many import write_photos
from tests.tiny_run import make_run
from trainer.preprocess import PhotoError, open_photo

ROOT = Path(__file__).resolve().parents[1]
Capture = pytest.CaptureFixture[str]
JOB = Job(("photos",), "/work", "00ff", "run", 2)


# --- without Ray ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [
        "photos --out=o",
        "photos --workers=2",
        "photos --engine=ray",
        "photos --engine=ray --out=o --csv",
        "- --engine=ray --out=o",
    ],
)
def test_flags_that_do_not_go_together(flags: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["model.onnx", *flags.split()])
    assert "--engine ray" in capsys.readouterr().err


def test_without_ray_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["model.onnx", "photos", "--engine", "ray", "--out", "o"]) == 2
    assert "pip install -r requirements-ray.txt" in capsys.readouterr().err


def test_a_part_has_the_columns_of_the_csv_and_what_it_is_of(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    top = (Prediction("rose", 1, 0.7), Prediction("tulip", 0, 0.3))
    results = [Result("a.jpg", top), Result(os.fsdecode(b"\xff.jpg"), error="no photo")]
    (tmp_path / "p.parquet").write_bytes(to_parquet(results, "CPU", JOB, classes=9))
    table = pq.read_table(tmp_path / "p.parquet")
    assert table.to_pylist() == [
        {"file": "a.jpg", "label": "rose", "probability": 0.7, "label_2": "tulip"}
        | {"probability_2": 0.3, "error": None, "provider": "CPU"},
        {"file": "\\udcff.jpg", "label": None, "probability": None, "label_2": None}
        | {"probability_2": None, "error": "no photo", "provider": "CPU"},
    ]
    assert json.loads(table.schema.metadata[b"thaw"])["model_sha256"] == "00ff"


def test_every_photo_is_in_one_part_and_the_plan_is_kept(tmp_path: Path) -> None:
    photos = (*(f"{n}.jpg" for n in range(1234)), os.fsdecode(b"\xff.jpg"))
    plan, out = Plan(JOB, photos), Folder(str(tmp_path / "out"))
    assert [name for number in plan.parts for name in plan.part(number)] == list(photos)
    assert out.plan() is None
    out.begin(plan)
    out.write(3, to_parquet([Result("a.jpg", error="no")] * 2, "CPU", JOB, 1))
    assert out.plan() == plan
    assert out.parts() == {3}
    assert out.counts() == (2, 2)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(PartsError, match="something else"):
        Folder(str(tmp_path)).plan()


def test_what_each_worker_gets() -> None:
    share = infer_ray._Share
    assert share.of({"CPU": 8.0}, "auto", None) == share(8, 1, 0)
    assert share.of({"CPU": 8.0, "GPU": 2.0}, "auto", None) == share(2, 4, 1)
    assert share.of({"CPU": 2.0, "GPU": 2.0}, "cpu", 1) == share(1, 1, 0)
    with pytest.raises(infer_ray.RayError, match="Ray has no GPU"):
        share.of({"CPU": 8.0}, "cuda", None)
    for resources in ({"CPU": 2.0}, {}):
        with pytest.raises(infer_ray.RayError, match="--workers 3"):
            share.of(resources, "auto", 3)


def test_photos_at_a_url() -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    for name in ("b.jpg", "a/c.PNG", "a/notes.txt"):
        store.pipe(f"/thaw-{os.getpid()}/{name}", b"not a photo")
    url = f"memory://thaw-{os.getpid()}"
    found = photos_at(url)
    assert [name.rpartition("thaw-")[2].partition("/")[2] for name in found] == ["a/c.PNG", "b.jpg"]
    first, second, third = fetched([*found, f"{url}/no.jpg"])
    assert first.read() == second.read() == b"not a photo"
    with pytest.raises(PhotoError, match=r"No such file|FileNotFoundError"):
        open_photo(third)
    with pytest.raises(PartsError, match="Cannot read nosuch://x"):
        photos_at("nosuch://x")


# --- with Ray ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.onnx, and photos/ with 300, every tenth of them bad."""
    folder = tmp_path_factory.mktemp("ray")
    export_run(make_run(folder), output=folder / "model.onnx")
    write_photos(folder / "photos", 300)
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A cluster of one node with two workers' places; yields its address."""
    ray = pytest.importorskip("ray", reason="needs requirements-ray.txt")
    environment = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    own = {"include_dashboard": False, "object_store_memory": 200_000_000}
    context = ray.init("local", num_cpus=2, runtime_env=environment, log_to_driver=False, **own)
    yield context.address_info["gcs_address"]
    ray.shutdown()


def rows(out: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    found: list[dict[str, Any]] = pq.read_table(out).to_pylist()
    return found


def expected(model: Path, photos: Path, capsys: Capture) -> list[dict[str, str]]:
    """What the default engine says."""
    capsys.readouterr()
    assert main([str(model), str(photos), "--csv"]) == 1
    return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))


@pytest.mark.slow
def test_the_same_as_the_default_engine_and_done_once(
    folder: Path, cluster: str, tmp_path: Path, capsys: Capture
) -> None:
    model, photos, out = folder / "model.onnx", folder / "photos", tmp_path / "out"
    command = [str(model), str(photos), "--engine", "ray", "--out", str(out)]
    assert main(command) == 1
    assert "300 photos, 30 failed" in capsys.readouterr().err
    known = expected(model, photos, capsys)
    assert [row["file"] for row in rows(out)] == [row["file"] for row in known]
    for ours, theirs in zip(rows(out), known, strict=True):
        assert list(ours) == list(theirs)
        assert [ours[name] or "" for name in ("label", "error", "provider")] == [
            theirs[name] for name in ("label", "error", "provider")
        ]
        assert f"{ours['probability'] or 0:.6f}" == (theirs["probability"] or "0.000000")
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert main(command) == 1
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    assert main([*command, "--top", "1"]) == 2
    assert "another top (3)" in capsys.readouterr().err


@pytest.mark.slow
def test_command_and_worker_are_killed_and_each_photo_is_there_once(
    folder: Path, cluster: str, tmp_path: Path, capsys: Capture
) -> None:
    model, photos, out = folder / "model.onnx", tmp_path / "photos", tmp_path / "out"
    write_photos(photos, 3000)
    command = [str(model), str(photos), "--engine", "ray", "--out", str(out)]
    elsewhere = [sys.executable, "-m", "export.infer", *command, "--ray-address", cluster]
    first = subprocess.Popen(elsewhere, cwd=ROOT, stderr=subprocess.DEVNULL)
    until(lambda: len(list(out.glob("part-*"))) >= 2)
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = len(list(out.glob("part-*")))
    second = subprocess.Popen(elsewhere, cwd=ROOT, stderr=subprocess.DEVNULL)
    until(lambda: len(workers()) == 2)
    os.kill(workers()[0], signal.SIGKILL)
    assert second.wait(120) == 1
    assert done < 33, "it was done before it could be killed"
    names = [row["file"] for row in rows(out)]
    assert len(names) == len(set(names)) == 3000
    assert set(names) == {str(path) for path in photos.rglob("*.jpg")}


@pytest.mark.slow
def test_a_photo_that_kills_its_worker_does_not_end_the_others(
    folder: Path, cluster: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    write_photos(photos, 160)
    command = [str(folder / "model.onnx"), str(photos), "--engine", "ray", "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(infer_ray, "_Worker", Dying)
        assert main(command) == 2
    assert "1 of 4 parts are missing" in capsys.readouterr().err
    assert main(command) == 1  # now nothing kills it
    assert len(rows(out)) == 160


class Dying(infer_ray._Worker):
    def _parquet(self, names: list[str]) -> bytes:
        if any(name.endswith("/0.jpg") for name in names):
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._parquet(names)


@pytest.mark.slow
def test_photos_and_results_on_s3(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    """On a cluster of its own, whose workers have the credentials in their environment."""
    pytest.importorskip("ray", reason="needs requirements-ray.txt")
    write_photos(tmp_path / "bucket" / "photos", 120)
    (tmp_path / "bucket" / "photos" / "49" / "empty.jpg").write_bytes(b"")
    command = [sys.executable, "-m", "export.infer", str(folder / "model.onnx")]
    command += ["s3://bucket/photos", "--engine", "ray", "--out", "s3://bucket/out"]
    with s3_server(tmp_path):
        done = subprocess.run(
            [*command, "--workers", "1"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 1, done.stderr
        again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert "parts are there already" in again.stderr
    found = rows(tmp_path / "bucket" / "out")
    known = expected(folder / "model.onnx", tmp_path / "bucket" / "photos", capsys)
    assert [row["file"].removeprefix("s3://bucket") for row in found] == [
        row["file"].removeprefix(str(tmp_path / "bucket")) for row in known
    ]
    assert [row["label"] or "" for row in found] == [row["label"] for row in known]
    assert [row["error"] or "" for row in found] == [row["error"] for row in known]


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 90
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def workers() -> list[int]:
    """Processes that classify for this test's cluster."""
    ours = {os.getpid()}
    found = []
    for path in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            name = (path / "cmdline").read_bytes()
        except OSError:
            continue
        if parent in ours:
            ours.add(int(path.name))
            found += [int(path.name)] if name.startswith(b"ray::MapWorker") else []
    return found


def test_parts_are_small_enough_for_many_workers_and_never_change() -> None:
    sizes = {n: len(Plan(JOB, tuple("a" * n)).part(0)) for n in (1, 60, 5000, 10**6)}
    assert sizes == {1: 1, 60: 50, 5000: 156, 10**6: 500}
    assert parts.Plan(JOB, ()).parts == range(0)
