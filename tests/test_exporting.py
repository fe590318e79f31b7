"""The export page and what is behind it: a process that is watched, and what a model is worth."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import pytest
from streamlit.testing.v1 import AppTest

from explorer.data import Library
from explorer.exporting import Job, Jobs, Report, command, runnable
from explorer.pages import exporting as export_page
from explorer.shipped import exported_table, model_path, shipped, snippet
from tests.explorer_runs import write_finetune, write_trunk
from tests.test_export import CLASSES, make_run
from trainer.runlog import Run, read_run

ROOT = Path(__file__).resolve().parents[1]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def ended(job: Job, seconds: float = 60) -> Report:
    end = time.monotonic() + seconds
    while job.report().state == "running":
        assert time.monotonic() < end, "the job does not end"
        time.sleep(0.02)
    return job.report()


# --- the process ------------------------------------------------------------------------------


def test_the_command_is_what_a_user_would_type(tmp_path: Path) -> None:
    run = read_run(tmp_path / write_trunk(tmp_path))
    assert command(run, "after", None, Path("runs")) == ["python", "-m", "export", run.run_id]
    assert command(run, "before", Path("/my photos"), tmp_path)[4:] == [
        *("--checkpoint", "before", "--data", "/my photos", "--runs-dir", str(tmp_path))
    ]


def test_the_comparison_can_be_watched() -> None:
    """The real bar's own output, as export.parity draws it."""
    bar = "tqdm(range(40), 'comparing with PyTorch', unit='photo', leave=False, disable=None)"
    job = Job(python(f"import time\nfrom tqdm import tqdm\nfor _ in {bar}: time.sleep(0.03)"))
    seen = set()
    while (report := job.report()).state == "running":
        seen.add(report.compared)
        time.sleep(0.02)
    counts = [each for each in seen if each]
    assert len(counts) > 2
    assert all(0 <= done <= total == 40 for done, total in counts)
    assert report.state == "done"
    assert report.seconds > 1


NO_PHOTOS = "The 8 photos of *run* are not in /gone. Name its new place with --data DIR."
FULL = "Cannot write /runs/model.onnx: No space left on device."


@pytest.mark.parametrize(
    ("code", "message", "remedy"),
    [
        (f"print('a\\nerror: {NO_PHOTOS}', file=sys.stderr); sys.exit(2)", NO_PHOTOS, "field"),
        (f"print('error: {FULL}'); sys.exit(2)", FULL, "Make room"),
        ("print('40%\\rerror: first\\nsecond'); sys.exit(2)", "first\nsecond", ""),
        ("raise MemoryError", "MemoryError", "in a terminal"),
        ("sys.exit(3)", "It said nothing.", "in a terminal"),
        ("os.kill(os.getpid(), 9)", "ended from outside (SIGKILL)", "memory is used up"),
        ("os.kill(os.getpid(), 15)", "ended from outside (SIGTERM)", ""),
        ("os.write(1, b'\\xff\\xfe' * 9); sys.exit(1)", "��", "in a terminal"),
    ],
)
def test_a_failure_is_told_in_words(code: str, message: str, remedy: str) -> None:
    report = ended(Job(python(f"import os, sys\n{code}")))
    assert report.state == "failed"
    assert message in report.message
    assert "Traceback" not in report.message
    assert remedy in report.remedy


def test_a_job_can_be_cancelled() -> None:
    job = Job(python("import time; time.sleep(60)"))
    job.cancel()
    assert ended(job).state == "cancelled"


def test_one_job_for_each_model_at_a_time(tmp_path: Path) -> None:
    jobs, model = Jobs(), tmp_path / "model.onnx"
    slow = python("import time; time.sleep(60)")
    first = jobs.start(model, slow)
    other = jobs.start(tmp_path / "model-before.onnx", slow)
    assert jobs.start(model, slow) is first is jobs.of(model)
    assert other is not first
    other.cancel()
    first.cancel()
    ended(first)
    assert jobs.start(model, python("")) is not first
    assert ended(jobs.start(model, python(""))).state == "done"


@pytest.mark.parametrize("handler", ["SIG_DFL", "SIG_IGN"])
def test_the_process_ends_with_the_app(handler: str, tmp_path: Path) -> None:
    """However the app ends, and also where it was started with nohup."""
    told = tmp_path / "pid"
    app = (
        "import os, signal, time\n"
        "from pathlib import Path\n"
        "from explorer.exporting import Job\n"
        f"signal.signal(signal.SIGHUP, signal.{handler})\n"
        f"told = Path({str(told)!r})\n"
        "Job(['/bin/sh', '-c', f'echo $$ > {told}; exec sleep 60'])\n"
        "while not (told.exists() and told.read_text()): time.sleep(0.01)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    status = subprocess.run(python(app), cwd=ROOT, timeout=60).returncode
    assert status == -signal.SIGKILL
    pid = int(told.read_text())
    end = time.monotonic() + 10
    while is_running(pid):
        assert time.monotonic() < end, "it outlived the app"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """A zombie that nobody has collected yet does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_it_is_thaws_own_export_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever the app was started, and whatever lies there."""
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "__main__.py").write_text("raise SystemExit(1)")
    (tmp_path / "export" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    assert ended(Job(runnable(["python", "-m", "export", "--help"]))).state == "done"


# --- the page ---------------------------------------------------------------------------------


def _page() -> None:
    from explorer.pages import exporting

    exporting.page()


def page(runs_dir: Path, **link: str) -> AppTest:
    os.environ["THAW_RUNS_DIR"] = str(runs_dir)
    app = AppTest.from_function(_page, default_timeout=30)
    for name, value in link.items():
        app.query_params[name] = value
    app.run()
    assert not app.exception
    return app


def texts(app: AppTest) -> str:
    """All that can be read as text on the page."""
    kinds = (app.text, app.code, app.error, app.info, app.caption, app.markdown, app.html)
    return "\n".join(str(block.value) for kind in kinds for block in kind)


def button(app: AppTest, label: str) -> bool:
    return label in [each.label for each in app.button]


def click(app: AppTest, label: str) -> None:
    next(each for each in app.button if each.label == label).click().run()
    assert not app.exception


@pytest.fixture(autouse=True)
def _arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["streamlit_app.py"])
    monkeypatch.setenv("THAW_RUNS_DIR", "set by each test, and restored")


@pytest.fixture(scope="module")
def clicked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Run, AppTest, list[str]]]:
    """A run exported by a click: the run, the page afterwards, and what it showed meanwhile."""
    run = make_run(tmp_path_factory.mktemp("clicked"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["streamlit_app.py"])
        patch.setenv("THAW_RUNS_DIR", "")
        app = page(run.path.parent)
        before = texts(app)
        click(app, "Export")
        shown = [before]
        end = time.monotonic() + 120
        while button(app, "Cancel"):
            shown.append(" ".join(each.proto.text for each in app.get("progress")))
            assert time.monotonic() < end
            time.sleep(0.2)
            app.run()
        yield run, app, shown


@pytest.fixture
def run(clicked: tuple[Run, AppTest, list[str]], tmp_path: Path) -> Run:
    """The same exported run, in a folder of the test's own."""
    path = tmp_path / "runs" / clicked[0].run_id
    shutil.copytree(clicked[0].path, path)
    return read_run(path)


def test_a_click_exports_and_proves(clicked: tuple[Run, AppTest, list[str]]) -> None:
    run, app, (before, *meanwhile) = clicked
    assert "Not exported yet" in before
    assert f"python -m export {run.run_id} --runs-dir {run.path.parent}" in before
    assert any(text.startswith("Making the ONNX file, ") for text in meanwhile)
    shown = texts(app)
    assert "Proven equal" in shown
    assert "same class as PyTorch on all 12 validation photos" in shown
    assert "computed by CPUExecutionProvider" in shown
    assert [each.value for each in app.metric][2:] == ["100%", "12"]
    assert button(app, "Export again")
    labels = [each.proto.label for each in app.get("download_button")]
    assert labels[1] == "Figures, JSON"
    assert labels[0].startswith("Model, ")


def test_the_commands_on_the_page_work(run: Run) -> None:
    app = page(run.path.parent)
    model = model_path(run, "after")
    shown = [block.value for block in app.code]
    assert f"python -m export.infer {model} PHOTOS" in shown
    assert snippet(model) in shown
    photos = Path(run.info["dataset"]["root"]) / "rose"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(snippet(model).replace("PHOTOS", str(photos)), {})
    assert len(out.getvalue().splitlines()) == 4
    assert "Prediction(label=" in out.getvalue()


def edit(run: Run, **changes: object) -> None:
    path = run.path / "parity.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut_model(run: Run) -> None:
    path = model_path(run, "after")
    path.write_bytes(path.read_bytes()[:5000])


def other_model(run: Run) -> None:
    path = model_path(run, "after")
    model = onnx.load(path)
    model.doc_string = "touched"
    onnx.save(model, path)


def foreign_model(run: Run) -> None:
    content = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [])).SerializeToString()
    model_path(run, "after").write_bytes(content)


def without_figure(run: Run) -> None:
    path = run.path / "parity.json"
    figures = json.loads(path.read_text())
    del figures["tolerance"]
    path.write_text(json.dumps(figures))


HARMS: list[tuple[Callable[[Run], object], str]] = [
    (cut_model, "model.onnx is damaged: it is not an ONNX file, or only a part of one."),
    (foreign_model, "it was not written by Thaw"),
    (other_model, "not the file that was measured"),
    (without_figure, "it has no tolerance"),
    (lambda run: (run.path / "parity.json").unlink(), "parity.json is not there"),
    (lambda run: (run.path / "parity.json").write_text("{"), "damaged or was changed by hand"),
    (lambda run: (run.path / "parity.json").write_text("[]"), "damaged or was changed by hand"),
    (lambda run: (run.path / "parity.json").write_bytes(b"\xff"), "damaged or was changed"),
    (lambda run: edit(run, tolerance=float("nan")), "damaged or was changed by hand"),
    (lambda run: edit(run, photos="12"), "damaged or was changed by hand"),
    (lambda run: edit(run, versions=["a"]), "damaged or was changed by hand"),
    (lambda run: edit(run, max_abs_logit_difference=1e-9), "does not hold the figures"),
    (lambda run: edit(run, provider="<img src=x>"), "does not hold the figures"),
    (lambda run: edit(run, top1_agreement=0.5), "not within what is allowed"),
]


@pytest.mark.parametrize(("harm", "says"), HARMS)
def test_what_is_not_as_it_was_measured_is_not_called_equal(
    run: Run, harm: Callable[[Run], object], says: str
) -> None:
    harm(run)
    app = page(run.path.parent)
    shown = texts(app)
    assert says in shown
    assert "Not proven" in shown
    assert "Proven equal" not in shown
    assert "<img" not in shown
    assert not app.metric
    assert button(app, "Export again")


def test_the_model_of_another_run_is_told(run: Run) -> None:
    other = run.path.with_name("20260101-000000-other")
    shutil.copytree(run.path, other)
    found = shipped(read_run(other), "after")
    assert found is not None
    assert found.doubts == (f"model.onnx was made from run {run.run_id}, after unfreezing.",)


def test_a_checkpoint_that_changed_since_makes_it_out_of_date(run: Run) -> None:
    path = run.path / "checkpoints" / "transfer-best.pt"
    path.write_bytes(path.read_bytes() + b"\0")
    app = page(run.path.parent)
    assert "Equal, but out of date" in texts(app)
    assert "The checkpoint has changed since." in texts(app)


def test_a_checkpoint_that_is_gone_leaves_the_proof(run: Run) -> None:
    (run.path / "checkpoints" / "transfer-best.pt").unlink()
    app = page(run.path.parent)
    assert "Proven equal" in texts(app)
    assert "transfer-best.pt is not there" in texts(app)
    assert not button(app, "Export again")


def test_the_table_holds_every_model(run: Run) -> None:
    (run.path / "model-before.onnx").write_bytes(b"x" * 2_000_000)
    table = exported_table(Library(run.path.parent).snapshot())
    assert set(table["Checkpoint"]) == {"after transfer", "before unfreezing"}
    before = table[table["Checkpoint"] == "before unfreezing"].iloc[0]
    after = table[table["Checkpoint"] == "after transfer"].iloc[0]
    assert (before["Size"], after["Same class"]) == (2.0, 100.0)
    assert before.isna()["Same class"]
    app = page(run.path.parent)
    assert app.expander[-1].label == "Exported so far: 2 models"


def test_classes_are_listed_in_the_order_of_the_outputs(run: Run) -> None:
    app = page(run.path.parent)
    assert app.dataframe[0].value["Class"].tolist() == list(CLASSES)


def test_without_runs_it_says_what_to_type(tmp_path: Path) -> None:
    app = page(tmp_path)
    assert f"python -m trainer --phase finetune --runs-dir {tmp_path}" in texts(app)


def with_checkpoints(runs_dir: Path) -> tuple[Run, Run]:
    """A trunk and a finetune of it whose checkpoints are there, though nothing could load them."""
    trunk = read_run(runs_dir / write_trunk(runs_dir))
    tuned = write_finetune(runs_dir, trunk.run_id, "tuned", [0.70, 0.74])
    tuned.update(parent_checkpoint={"file": "transfer-best.pt"})
    (trunk.path / "checkpoints" / "transfer-best.pt").touch()
    (tuned.path / "checkpoints" / "finetune-best.pt").touch()
    return trunk, read_run(tuned.path)


def test_a_run_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    write_trunk(tmp_path)
    app = page(tmp_path)
    assert "transfer-best.pt is not there" in texts(app)
    assert not button(app, "Export")


def test_the_link_chooses_run_and_checkpoint(tmp_path: Path) -> None:
    trunk, tuned = with_checkpoints(tmp_path)
    app = page(tmp_path, checkpoint="Before unfreezing")
    assert app.selectbox(key="run").value == tuned.run_id
    assert f"{tuned.run_id} --checkpoint before --runs-dir" in texts(app)
    app = page(tmp_path, run=trunk.run_id, checkpoint="Before unfreezing")
    assert not app.segmented_control, "a run that was not unfrozen has no before"
    assert "--checkpoint" not in texts(app)


def test_photos_that_moved(tmp_path: Path) -> None:
    with_checkpoints(tmp_path)
    (tmp_path / "new place").mkdir()
    app = page(tmp_path, data=str(tmp_path / "new place"))
    assert f"--data '{tmp_path / 'new place'}'" in texts(app)
    for wrong in (str(tmp_path / "nowhere"), "~nobody/x", "a\0b", "x" * 5000):
        app.text_input(key="data").set_value(wrong).run()
        assert not app.exception
        assert "There is no folder" in texts(app)
        assert next(each for each in app.button if each.label == "Export").disabled


def test_a_failed_and_a_cancelled_export(tmp_path: Path) -> None:
    _, tuned = with_checkpoints(tmp_path)
    model = model_path(tuned, "after")
    failing = "import sys; print('error: <b>no</b> **photos**, --data DIR'); sys.exit(2)"
    ended(export_page._jobs().start(model, python(failing)))
    app = page(tmp_path)
    assert app.error[0].value == "The export failed."
    assert "<b>no</b> **photos**, --data DIR" in [block.value for block in app.code]
    assert any("photos that have moved" in block.value for block in app.caption)
    job = export_page._jobs().start(model, python("import time; time.sleep(60)"))
    app = page(tmp_path)
    assert button(app, "Cancel")
    assert not button(app, "Export")
    click(app, "Cancel")
    ended(job)
    app.run()
    assert "cancelled" in app.info[0].value
    assert button(app, "Export")
