"""Runs folders with hostile content: every reader refuses it or shows it, and no page fails."""

from __future__ import annotations

import json
import os
import random
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from explorer.annotations import load_annotation
from explorer.figures import figures_or_reason
from explorer.lr_charts import rate_tests
from explorer.settings import settings
from tests.benchmarks import fuzz_logs
from tests.explorer_runs import write_finetune, write_run, write_trunk
from trainer.runlog import RunError, checkpoint_path, list_runs, read_run
from trainer.tested import read_tested

ODD: tuple[Any, ...] = (
    *(None, True, -1, 0.5, 10**400, float("nan"), float("inf"), "", "x", "\ud800", "a\0b"),
    *("../../etc/passwd", "<script>", [], {}, [None], [{}], {"a": 1}, {"name": []}),
)
FIELDS = (
    *(
        "schema_version",
        "run_id",
        "status",
        "pid",
        "started",
        "ended",
        "phases",
        "recipe",
        "config",
    ),
    *("model", "classes", "dataset", "preprocess", "environment", "parent_run_id", "weights"),
    *("parent_checkpoint", "sweep", "engine", "imported"),
)
PAGES = ("compare", "runs", "sweep", "results", "changed", "classify", "exporting", "importing")


def odd_runs(runs_dir: Path, values: tuple[Any, ...] = ODD) -> list[str]:
    """A finetune run for each value, with it in every field that may hold it and in all settings;
    returns those that can be read."""
    trunk = write_trunk(runs_dir)
    for number, value in enumerate(values):
        path = write_finetune(runs_dir, trunk, f"odd{number}", [0.7, 0.75]).path
        info = json.loads((path / "run.json").read_text())
        config = dict.fromkeys(("lr", "unfreeze", "schedule", "augmentation", "seed"), value)
        info |= {"config": config, "dataset": {"name": value, "root": value, "counts": value}}
        info |= dict.fromkeys(("status", "ended", "recipe", "model", "weights", "engine"), value)
        info |= dict.fromkeys(("parent_checkpoint", "sweep", "imported", "environment"), value)
        (path / "run.json").write_text(json.dumps(info))
        for name in ("test.json", "annotations.json", "parity.json"):
            (path / name).write_text(json.dumps(value))
    return [run.run_id for run in list_runs(runs_dir) if run.info]


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_of_any_content_is_refused_or_read(field: str, tmp_path: Path) -> None:
    path = write_finetune(tmp_path, write_trunk(tmp_path), "odd", [0.7, 0.75]).path
    info = json.loads((path / "run.json").read_text())
    for value in ODD:
        (path / "run.json").write_text(json.dumps(info | {field: value}))
        try:
            run = read_run(path)
        except RunError as error:
            assert str(path) in str(error)
            continue
        assert run.status in ("running", "done", "interrupted", "failed")
        assert all(text.encode().isascii() for text in settings(run).values())
        for which in ("before", "after"):
            with pytest.raises(RunError):
                checkpoint_path(run, which)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[" * 100_000,
        b'{"schema_version": ' + b"9" * 5000 + b"}",
        b"\xff\xfe",
        b'{"schema_version": 1, "phases": [[]]}',
        b'{"schema_version": 1, "parent_run_id": "../../etc"}',
        b'{"schema_version": 1, "classes": [1]}',
        None,
    ],
)
def test_a_run_json_of_any_content_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = write_run(tmp_path, "odd", [0.5]).path
    (path / "run.json").unlink()
    if content is None:
        with (path / "run.json").open("wb") as file:
            file.truncate(1 << 40)  # a hole of a terabyte
    else:
        (path / "run.json").write_bytes(content)
    [run] = list_runs(tmp_path)
    assert run.problem


def test_a_log_of_any_content_is_read_as_far_as_it_makes_sense(tmp_path: Path) -> None:
    path = write_run(tmp_path, "odd", [0.5, 0.6]).path
    good = (path / "metrics.jsonl").read_text().splitlines()
    odd = ["[" * 100_000, '{"event": "epoch"}', "1" * 5000, '{"event": ' + "[" * 900, "\0", '""']
    odd += [json.dumps(json.loads(good[1]) | {"val_acc": value}) for value in ODD if value != 0.5]
    (path / "metrics.jsonl").write_bytes("\n".join([*good, *odd, ""]).encode("utf-8", "replace"))
    run = read_run(path)
    assert [epoch.val_acc for epoch in run.epochs][:2] == [0.5, 0.6]
    assert "unreadable lines" in str(run.problem)


def test_pipes_and_holes_in_place_of_files(tmp_path: Path) -> None:
    """Whoever reads them would wait for ever, or run out of memory."""
    for name in ("run.json", "metrics.jsonl"):
        path = write_run(tmp_path, name.partition(".")[0], [0.5], done=False).path
        (path / name).unlink()
        os.mkfifo(path / name)
    hole = write_run(tmp_path, "hole", [0.5]).path / "metrics.jsonl"
    os.truncate(hole, 1 << 40)
    problems = {run.run_id[16:]: str(run.problem) for run in list_runs(tmp_path)}
    assert "a pipe" in problems["run"]
    assert "a pipe" in problems["metrics"]
    assert "MB are new in it" in problems["hole"]
    path = write_run(tmp_path, "beside", [0.5]).path
    for name in ("test.json", "parity.json", "annotations.json"):
        os.mkfifo(path / name)
    with pytest.raises(RunError, match="a pipe"):
        read_tested(read_run(path))
    assert "a pipe" in str(figures_or_reason(path / "parity.json"))
    assert load_annotation(path).name == ""


def test_range_tests_of_any_content_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "lr-find"
    folder.mkdir()
    for number, value in enumerate(ODD):
        content = {"rates": [value], "losses": [1], "smoothed": [1], "config": {}, "model": {}}
        (folder / f"{number}.json").write_text(json.dumps(content))
    os.mkfifo(folder / "pipe.json")
    assert set(rate_tests(tmp_path)) <= {"1", "3"}  # true and 0.5 are numbers


# --- pages --------------------------------------------------------------------------------------


def _page(name: str) -> None:
    from importlib import import_module

    import_module(f"explorer.pages.{name}").page()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    path = tmp_path_factory.mktemp("hostile")
    return path, odd_runs(path)


@pytest.mark.parametrize("name", PAGES)
def test_every_page_renders(
    name: str, folder: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(import_module(f"explorer.pages.{name}").page)
    path, ids = folder
    monkeypatch.setenv("THAW_RUNS_DIR", str(path))
    monkeypatch.setattr("sys.argv", ["streamlit_app.py"])
    links: list[dict[str, Any]] = [{}]
    if name == "compare":
        links = [{"runs": ids}]
    elif name in ("changed", "classify", "exporting"):
        links = [{"run": one} for one in random.Random(0).sample(ids, 3)]
    for link in links:
        app = AppTest.from_function(_page, args=(name,), default_timeout=60)
        for key, value in link.items():
            app.query_params[key] = value
        app.run()
        assert not app.exception, (link, app.exception)


def test_the_fuzzer_finds_nothing_in_a_few_cases(tmp_path: Path) -> None:
    pristine, damaged = tmp_path / "pristine", tmp_path / "damaged"
    fuzz_logs.write_logs(pristine / "logs")
    fuzz_logs.write_runs(pristine / "runs")
    shutil.copytree(pristine, damaged)
    found = [path.relative_to(pristine) for path in sorted(pristine.rglob("*")) if path.is_file()]
    files = [path for path in found if path.suffix != ".jpg"]
    for number in range(10):
        case = fuzz_logs.make(random.Random(number), pristine, files)
        assert fuzz_logs.read(case, damaged / "logs", damaged / "runs", pristine)
