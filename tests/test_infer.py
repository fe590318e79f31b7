"""Classifying photos with an exported model: the command line, the library, and no torch."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from export import classifier as classifiers
from export import session as sessions
from export.classifier import InferenceError
from export.infer import Classifier, Result, find_photos, main
from export.seal import seal
from export.session import Session
from tests.test_hostile_images import BOMBS
from tests.tiny_run import CLASSES, PREPROCESS
from trainer.cli import inert, inert_cell
from trainer.preprocess import load_photo
from trainer.process import usable_cores
from trainer.runlog import Run
from trainer.schema import ThawError

REPOSITORY = Path(__file__).resolve().parents[1]

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def folder(exported: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.onnx, and data/ with 12 photos in 3 folders."""
    folder = tmp_path_factory.mktemp("infer")
    shutil.copy(exported.path / "model.onnx", folder)
    shutil.copytree(exported.path.parents[1] / "data", folder / "data")
    return folder


@pytest.fixture
def model(folder: Path) -> Path:
    return folder / "model.onnx"


@pytest.fixture
def data(folder: Path) -> Path:
    return folder / "data"


def refused(argv: list[str], capsys: Capture) -> str:
    """Run a command line that must end with status 2 and an empty standard output."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    return err


# --- output -----------------------------------------------------------------------------------


def test_table(model: Path, data: Path, capsys: Capture) -> None:
    assert main([str(model), str(data), "--top", "2", "--batch", "5"]) == 0
    out, err = capsys.readouterr()
    first, head, *rows = out.splitlines()
    assert first.endswith(" on CPUExecutionProvider")
    assert head.split() == ["file", "label", "probability", "2."]
    assert [row.split()[0] for row in rows] == [str(f) for f in sorted(data.rglob("*.jpg"))]
    assert all(row.split()[1] in CLASSES and row.split()[2].endswith("%") for row in rows)
    assert err.startswith("12 photos, 0 failed, ")
    assert err.endswith("images/s, CPUExecutionProvider\n")


def test_json(model: Path, data: Path, capsys: Capture) -> None:
    assert main([str(model), str(data), "--json", "--top", "9"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["provider"] == "CPUExecutionProvider"
    assert document["photos"] == 12
    for result in document["results"]:
        assert [p["label"] for p in result["top"]] == [CLASSES[p["index"]] for p in result["top"]]
        assert sum(p["probability"] for p in result["top"]) == pytest.approx(1, abs=1e-5)
        assert result["probability"] == max(p["probability"] for p in result["top"])


def test_csv_and_the_library_say_the_same(model: Path, data: Path, capsys: Capture) -> None:
    assert main([str(model), str(data), "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    results = Classifier.load(model).classify(find_photos([data]))
    assert len(rows) == 12
    for row, result in zip(rows, results, strict=True):
        assert row["file"] == result.photo
        assert row["label_2"] == result.top[1].label
        assert float(row["probability"]) == pytest.approx(result.top[0].probability, abs=1e-6)
        assert row["error"] == ""
        assert row["provider"] == "CPUExecutionProvider"


@pytest.mark.parametrize("flag", ["--csv", "--json", "--top=1"])
def test_a_bad_photo_is_listed_and_does_not_stop(
    model: Path, data: Path, tmp_path: Path, flag: str, capsys: Capture
) -> None:
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"not a photo")
    assert main([str(model), str(bad), str(data / "rose"), flag]) == 1
    out, err = capsys.readouterr()
    assert f"failed: {bad}: not an image" in err
    assert "5 photos, 1 failed" in err
    assert str(data / "rose" / "3.jpg") in out
    if flag == "--json":
        assert json.loads(out)["results"][0]["error"].startswith("not an image")


def test_files_that_ask_for_too_much_are_listed_and_do_not_stop(
    model: Path, data: Path, tmp_path: Path, capsys: Capture
) -> None:
    for name, (make, _) in list(BOMBS.items())[:5]:
        (tmp_path / f"{name}.jpg").write_bytes(make())
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "endless.jpg").symlink_to("/dev/zero")
    assert main([str(model), str(tmp_path), str(data / "rose"), "--json"]) == 1
    out, err = capsys.readouterr()
    results = json.loads(out)["results"]
    assert ["error" in result for result in results] == [True] * 7 + [False] * 4
    assert err.count("failed: ") == 7


def test_only_bad_photos(model: Path, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"")
    assert main([str(model), str(tmp_path)]) == 1
    assert "1 photos, 1 failed" in capsys.readouterr().err


def test_names_cannot_act(model: Path, data: Path, tmp_path: Path, capsys: Capture) -> None:
    photo = (data / "rose" / "0.jpg").read_bytes()
    for name in ("\x1b[2J.jpg", "two\nlines.jpg", os.fsdecode(b"\xff.jpg"), "\u202egpj.jpg"):
        (tmp_path / name).write_bytes(photo)
    for flag in ("--top=1", "--csv", "--json"):
        assert main([str(model), str(tmp_path), flag]) == 0
        out, err = capsys.readouterr()
        assert "\x1b" not in out + err
        assert "\u202e" not in out + err
        out.encode("utf-8")
    assert len(json.loads(out)["results"]) == 4


def test_csv_from_a_hostile_folder(
    model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (tmp_path / "=1+1.jpg").write_bytes((data / "rose" / "0.jpg").read_bytes())
    monkeypatch.chdir(tmp_path)
    assert main([str(model), "=1+1.jpg", "--csv"]) == 0
    assert capsys.readouterr().out.splitlines()[1].startswith("'=1+1.jpg,")


@pytest.mark.parametrize("text", ["=1", "+1", "-1", "@a", "\ta"])
def test_no_cell_starts_a_formula(text: str) -> None:
    assert inert_cell(text) == f"'{inert(text)}"
    assert inert_cell(f"a{text}") == inert(f"a{text}")


# --- user errors ------------------------------------------------------------------------------


def test_missing_model(tmp_path: Path, data: Path, capsys: Capture) -> None:
    assert "Cannot read the model" in refused([str(tmp_path / "no.onnx"), str(data)], capsys)


def test_not_onnx(tmp_path: Path, data: Path, capsys: Capture) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"anything but a model")
    assert "ONNX Runtime" in refused([str(path), str(data)], capsys)


def test_onnx_of_others(model: Path, tmp_path: Path, data: Path, capsys: Capture) -> None:
    foreign = onnx.load(model)
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "m.onnx")
    err = refused([str(tmp_path / "m.onnx"), str(data)], capsys)
    assert "not written by Thaw" in err
    assert "python -m export RUN" in err


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("classes", '["one"]', "do not fit"),
        ("classes", "[1, 2, 3]", "damaged"),
        ("preprocess", "{}", "damaged"),
        ("preprocess", "[" * 100_000, "damaged"),
        ("thaw_format", "99", "newer Thaw"),
    ],
)
def test_damaged_metadata(
    model: Path, tmp_path: Path, data: Path, key: str, value: str, message: str, capsys: Capture
) -> None:
    changed = onnx.load(model)
    del changed.metadata_props[-1]  # the seal
    for entry in changed.metadata_props:
        entry.value = value if entry.key == key else entry.value
    content = changed.SerializeToString()
    (tmp_path / "m.onnx").write_bytes(content + seal(content))
    assert message in refused([str(tmp_path / "m.onnx"), str(data)], capsys)


def test_external_data(
    model: Path, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    path = tmp_path / "m.onnx"
    outside = onnx.load(model)
    del outside.metadata_props[-1]  # the seal
    onnx.save(outside, path, save_as_external_data=True, location="w", size_threshold=0)
    path.write_bytes(path.read_bytes() + seal(path.read_bytes()))
    monkeypatch.chdir(tmp_path)  # where ONNX Runtime would look for it
    assert "another file" in refused([str(path), str(data)], capsys)


def test_paths_without_photos(model: Path, tmp_path: Path, capsys: Capture) -> None:
    assert "No photos in" in refused([str(model), str(tmp_path)], capsys)
    assert "no photo or folder" in refused([str(model), str(tmp_path / "no")], capsys)
    assert "needs --engine ray" in refused([str(model), "s3://bucket/photos"], capsys)


@pytest.mark.parametrize("flag", ["--top=0", "--batch=x", "--device=tpu"])
def test_wrong_flags(model: Path, data: Path, flag: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([str(model), str(data), flag])


# --- devices ----------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_gpu_that_is_not_there(
    model: Path, data: Path, device: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(sessions, "_gpu_answers", lambda: False)
    err = refused([str(model), str(data), "--device", device], capsys)
    assert "no NVIDIA GPU answers" in err
    assert "pip install" in err
    assert "--device cpu" in err


# --- paths on standard input ------------------------------------------------------------------


def from_stdin(text: bytes, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    return main(argv)


def test_paths_from_stdin_beside_others(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    lines = f"{data / 'rose' / '1.jpg'}\r\n\n{data / 'tulip'}\n{data / 'rose' / '0.jpg'}"
    argv = [str(model), str(data / "daisy" / "2.jpg"), "-", str(data / "daisy"), "--csv"]
    assert from_stdin(lines.encode(), argv, monkeypatch) == 0
    files = [row["file"] for row in csv.DictReader(io.StringIO(capsys.readouterr().out))]
    names = ["daisy/2", "rose/1", *(f"tulip/{n}" for n in range(4)), "rose/0"]
    names += [f"daisy/{n}" for n in range(4)]
    assert files == [str(data / f"{name}.jpg") for name in names]


@pytest.mark.parametrize("name", ["no.jpg", "x" * 5000, "a\0b.jpg"])
def test_a_missing_path_on_stdin_is_one_photo_that_failed(
    name: str, model: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    lines = f"{data / 'rose' / '0.jpg'}\n{name}\n{data / 'rose' / '1.jpg'}\n"
    assert from_stdin(lines.encode(), [str(model), "-", "--json"], monkeypatch) == 1
    out, err = capsys.readouterr()
    results = json.loads(out)["results"]
    assert ["error" in result for result in results] == [False, True, False]
    assert results[1]["file"] == name
    assert "3 photos, 1 failed" in err


def test_no_paths_on_stdin(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    for text in (b"", b"\n\r\n"):
        assert from_stdin(text, [str(model), "-"], monkeypatch) == 2
        out, err = capsys.readouterr()
        assert (out, err) == ("", "error: No photos in -.\n")


def test_a_folder_that_cannot_be_read(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def walk(folder: Path, onerror: Callable[[OSError], None]) -> None:
        onerror(PermissionError(13, "Permission denied", str(folder)))

    monkeypatch.setattr(os, "walk", walk)
    assert "Cannot read the folder" in refused([str(model), str(data)], capsys)
    lines = f"{data}\n{data / 'rose' / '0.jpg'}\n".encode()
    assert from_stdin(lines, [str(model), "-"], monkeypatch) == 1
    assert "failed: " + str(data) in capsys.readouterr().err


def test_whoever_writes_slowly_is_answered_at_once(model: Path, data: Path) -> None:
    """The next path is written only after the answer to the one before."""
    command = [sys.executable, "-m", "export.infer", str(model), "-", "--csv", "--top=1"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for number in range(3):
            path = os.fsencode(data / "rose" / f"{number}.jpg")
            process.stdin.write(path + b"\n")
            process.stdin.flush()
            if number == 0:
                assert process.stdout.readline().startswith(b"file,label,")
            assert process.stdout.readline().startswith(path + b",")
        process.stdin.close()
        assert process.wait(60) == 0


# --- the library ------------------------------------------------------------------------------


def test_every_kind_of_source_gives_the_same_as_preprocess(model: Path, tmp_path: Path) -> None:
    """A photo that EXIF turns upright, as a path, an upload, and an open image."""
    pixels = np.random.default_rng(1).integers(0, 256, (9, 16, 3), np.uint8)
    turned = Image.fromarray(pixels).resize((160, 90))
    exif = turned.getexif()
    exif[0x0112] = 6
    path = tmp_path / "turned.jpg"
    turned.save(path, exif=exif)

    classifier = Classifier.load(model, "cpu")
    with Image.open(path) as image:
        sources = [path, io.BytesIO(path.read_bytes()), image]
        results = classifier.classify(sources, top=3)
    photos = load_photo(path, PREPROCESS)[None]
    (expected,) = classifier._session.probabilities(photos)
    for result in results:
        np.testing.assert_allclose(probabilities(result), expected, atol=1e-6)
    assert [result.photo for result in results] == [str(path), "photo 2", "photo 3"]


def probabilities(result: Result) -> list[float]:
    return [one.probability for one in sorted(result.top, key=lambda one: one.index)]


def test_the_way_photos_take_makes_no_difference(model: Path, data: Path) -> None:
    """Alone, on all cores; one on each core; in batches, also with a last one that is not full."""
    classifier = Classifier.load(model, "cpu")
    photos = find_photos([data])
    ways = [
        [classifier.classify([photo])[0] for photo in photos],
        classifier.classify(photos),
        classifier.classify(iter(photos)),
        classifier.classify(photos, batch=5),
        Classifier.load(model, "cpu", batch=12).classify(photos),
    ]
    expected = [probabilities(result) for result in ways[0]]
    for results in ways:
        assert [result.photo for result in results] == [str(photo) for photo in photos]
        np.testing.assert_allclose([probabilities(r) for r in results], expected, atol=1e-6)


def test_photos_are_decoded_and_run_by_several_threads_one_by_one(
    model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classifiers, "usable_cores", lambda: 3)
    classifier = Classifier.load(model, "cpu")
    seen: list[tuple[int, int]] = []
    run = Session.probabilities

    def spy(session: Session, photos: np.ndarray) -> np.ndarray:
        seen.append((threading.get_ident(), len(photos)))
        time.sleep(0.01)  # so that no thread can take all photos
        return run(session, photos)

    monkeypatch.setattr(Session, "probabilities", spy)
    assert len(classifier.classify(find_photos([data]))) == 12
    assert [size for _, size in seen] == [1] * 12
    assert len({thread for thread, _ in seen} - {threading.get_ident()}) == 3
    seen.clear()
    classifier.classify(find_photos([data])[:2])
    assert [size for _, size in seen] == [2], "fewer photos than cores run together"


def test_only_a_few_photos_are_taken_ahead(model: Path, data: Path) -> None:
    """However long the list: it may be endless, or too large for the memory."""
    taken = 0

    def endless() -> Iterator[Path]:
        nonlocal taken
        for photo in cycle(find_photos([data])):
            taken += 1
            yield photo

    stream = Classifier.load(model, "cpu").stream(endless())
    assert [next(stream).error for _ in range(5)] == [None] * 5
    assert taken <= 8 * usable_cores() + 5
    stream = Classifier.load(model, "cpu", batch=4).stream(endless())
    taken = 0
    assert next(stream).error is None
    assert taken <= 3 * 4


@pytest.mark.parametrize("batch", [None, 3])
def test_a_model_that_fails_ends_it(
    model: Path, data: Path, batch: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no memory")

    classifier = Classifier.load(model, "cpu")
    monkeypatch.setattr(Session, "probabilities", fail)
    with pytest.raises(InferenceError, match=r"CPUExecutionProvider failed on \d photos"):
        classifier.classify(find_photos([data]), batch=batch)


def test_damaged_sources_get_an_error(model: Path, data: Path, tmp_path: Path) -> None:
    truncated = (data / "rose" / "0.jpg").read_bytes()[:-200]
    sources = [tmp_path / "no.jpg", io.BytesIO(b""), Image.open(io.BytesIO(truncated))]
    results = Classifier.load(model).classify(sources)
    assert all(result.error and not result.top for result in results)


def test_many_threads_may_share_one(model: Path, data: Path) -> None:
    classifier = Classifier.load(model)
    photos = find_photos([data])
    sizes = [None, 2, 5, None]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda size: classifier.classify(photos, batch=size), sizes))
    labels = [[result.top[0].label for result in answer] for answer in answers]
    assert labels == [labels[0]] * 4


@pytest.mark.parametrize("batch", [None, 1])
def test_a_stream_may_be_left(model: Path, data: Path, batch: int | None) -> None:
    stream = Classifier.load(model).stream(find_photos([data]), batch=batch)
    assert next(iter(stream)).error is None


def test_folders_are_read_recursively_and_sorted(data: Path, tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("z.PNG", "a/b/x.jpg", "a/notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert find_photos([tmp_path]) == [tmp_path / "z.PNG", tmp_path / "a" / "b" / "x.jpg"]
    with pytest.raises(ThawError):
        find_photos([tmp_path / "a" / "missing"])


# --- processes --------------------------------------------------------------------------------


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_no_torch(model: Path, data: Path) -> None:
    code = (
        "import sys; from export.infer import main; status = main(sys.argv[1:]);"
        "heavy = {'torch', 'torchvision', 'timm', 'onnx'} & sys.modules.keys();"
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    done = run("-c", code, str(model), str(data))
    assert done.returncode == 0, done.stderr


def requirements(file: str) -> dict[str, str]:
    """Name of each package, without extras -> versions."""
    lines = (REPOSITORY / file).read_text().splitlines()
    found = (re.match(r"([\w-]+)(?:\[.*\])?([<>=][^;#]*)", line) for line in lines)
    return {match[1]: match[2].strip() for match in found if match}


def test_requirements_are_those_of_the_whole_of_thaw() -> None:
    everything = requirements("requirements.txt")
    small = requirements("requirements-inference.txt")
    assert small.keys() == {"numpy", "pillow", "tqdm", "onnxruntime"}
    gpu = requirements("requirements-inference-gpu.txt")
    assert gpu.keys() == small.keys() - {"onnxruntime"} | {"onnxruntime-gpu"}
    assert small.items() | gpu.items() <= everything.items()


def test_a_clean_environment_is_enough(model: Path, data: Path, tmp_path: Path) -> None:
    """Made from requirements-inference.txt, with `export` and what it imports of `trainer`."""
    venv.create(tmp_path / "venv")
    python = venv.EnvBuilder().ensure_directories(tmp_path / "venv").env_exe
    asked = ["-r", str(REPOSITORY / "requirements-inference.txt")]
    pip = ["-m", "pip", "--python", python, "install", "--quiet", "--no-compile", *asked]
    installed = run(*pip)
    if "NewConnectionError" in installed.stderr:
        pytest.skip("no package index can be reached")
    assert installed.returncode == 0, installed.stderr
    shutil.copytree(REPOSITORY / "export", tmp_path / "export")
    (tmp_path / "trainer").mkdir()
    for name in ("__init__", "cli", "config", "files", "intake", "preprocess", "process", "schema"):
        shutil.copy(REPOSITORY / "trainer" / f"{name}.py", tmp_path / "trainer")

    def alone(*command: str) -> subprocess.CompletedProcess[str]:
        given = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 120}
        return subprocess.run([python, "-I", "-c", _ALONE, *command], check=False, **given)

    done = alone(str(model), str(data), "--json")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["results"]
    here = Classifier.load(model, "cpu").classify(find_photos([data]))
    assert [result["label"] for result in results] == [result.top[0].label for result in here]


# Isolated, Python looks for modules neither here nor where the tests' own environment has them.
_ALONE = """
import importlib.util, sys
sys.path.insert(0, "")
assert not importlib.util.find_spec("torch")
from export.infer import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell's pipes")
def test_a_reader_that_leaves(model: Path, data: Path) -> None:
    command = f"{sys.executable} -m export.infer {model} {data} --csv"
    done = subprocess.run(
        ["bash", "-c", f"{command} | true; exit ${{PIPESTATUS[0]}}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 141
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
