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
from typing import Any

import onnx
import pytest
from streamlit.testing.v1 import AppTest

from explorer.data import Library
from explorer.exported import exported_table
from explorer.exporting import Job, Jobs, Report, command, runnable
from explorer.pages import exporting as export_page
from explorer.shipped import key_figures, model_path, parity_path, shipped, small, snippet
from export import to_onnx
from export.card import card_path
from export.parity import _refusal
from export.precision import LARGEST_LOSS, PRECISIONS, Parity, Precision
from export.seal import seal
from export.to_onnx import export_run
from tests.explorer_runs import write_finetune, write_trunk
from tests.test_quantize import copy_of, graph_of, make_fitted_run
from tests.tiny_run import CLASSES, make_run
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
    assert command(run, "after", None, Path("runs"), "int8")[4:] == ["--precision", "int8"]


def test_the_comparison_can_be_watched() -> None:
    """The real bar's own output, as export.parity draws it."""
    bar = "tqdm(range(40), 'comparing with PyTorch', unit='photo', leave=False, disable=None)"
    job = Job(python(f"import time\nfrom tqdm import tqdm\nfor _ in {bar}: time.sleep(0.03)"))
    seen = set()
    while (report := job.report()).state == "running":
        seen.add(report.step)
        time.sleep(0.02)
    steps = [each for each in seen if each]
    assert len(steps) > 2
    for step in steps:
        assert step.text == f"Comparing with PyTorch: {round(40 * step.done)} of 40 photos"
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
    assert labels[0].startswith("Model, ")
    assert labels[1:] == ["Model card, Markdown", "Figures, JSON"]


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
    del model.metadata_props[-1]  # the seal
    content = model.SerializeToString()
    path.write_bytes(content + seal(content))


def damaged_model(run: Run) -> None:
    path = model_path(run, "after")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


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
    (damaged_model, "its SHA-256 does not match"),
    (without_figure, "of an older Thaw: it has no tolerance"),
    (lambda run: (run.path / "parity.json").unlink(), "parity.json is not there"),
    (lambda run: (run.path / "parity.json").write_text("{"), "damaged or was changed by hand"),
    (lambda run: (run.path / "parity.json").write_text("[]"), "damaged or was changed by hand"),
    (lambda run: (run.path / "parity.json").write_bytes(b"\xff"), "damaged or was changed"),
    (lambda run: edit(run, tolerance=float("nan")), "damaged or was changed by hand"),
    (lambda run: edit(run, photos="12"), "damaged or was changed by hand"),
    (lambda run: edit(run, versions=["a"]), "damaged or was changed by hand"),
    (lambda run: edit(run, kept="all"), "damaged or was changed by hand"),
    (lambda run: edit(run, precision=["fp32"]), "damaged or was changed by hand"),
    (lambda run: edit(run, accuracy=0.5), "does not hold the figures"),
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
    assert found.doubts == (
        f"model.onnx was made from run {run.run_id}, after unfreezing, in fp32.",
    )


def test_a_checkpoint_that_changed_since_makes_it_out_of_date(run: Run) -> None:
    path = run.path / "checkpoints" / "transfer-best.pt"
    path.write_bytes(path.read_bytes() + b"\0")
    app = page(run.path.parent)
    assert "Proven, but out of date" in texts(app)
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


# --- precisions -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted(make_photos: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run in all precisions; the seconds of torch.onnx are spent once."""
    folder = tmp_path_factory.mktemp("fitted")
    run = make_fitted_run(folder / "runs", make_photos(folder / "data", photos=20), "resnet18")
    graph = graph_of(run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_onnx, "convert", lambda *_: copy_of(graph))
        for precision in PRECISIONS:
            export_run(run, precision=precision)
    return run


@pytest.fixture
def precise(fitted: Run, tmp_path: Path) -> Run:
    """The same exported run, in a folder of the test's own."""
    path = tmp_path / "runs" / fitted.run_id
    shutil.copytree(fitted.path, path)
    return read_run(path)


PROOFS: list[tuple[Precision, str, str]] = [
    ("fp32", "Proven equal", "rounding alone may reach"),
    ("fp16", "Proven: the same class for at least 99.9%", "Black, saturated and noise images"),
    ("int8", "Proven: costs at most 1 point of accuracy", "1 point is the most allowed"),
]


@pytest.mark.parametrize(("precision", "badge", "says"), PROOFS)
def test_each_precision_is_proven_by_its_own_rule(
    fitted: Run, precision: Precision, badge: str, says: str
) -> None:
    app = page(fitted.path.parent, precision=precision)
    shown = texts(app)
    assert badge in shown
    assert says in shown
    assert app.radio(key="precision").value == precision
    exporting = f"python -m export {fitted.run_id}"
    exporting += "" if precision == "fp32" else f" --precision {precision}"
    assert f"{exporting} --runs-dir" in shown
    assert f"export.infer {model_path(fitted, 'after', precision)} PHOTOS" in shown
    labels = [each.proto.label for each in app.get("download_button")]
    assert "Model card, Markdown" in labels


def test_int8_shows_both_accuracies_and_what_was_kept(fitted: Run) -> None:
    parity = json.loads(parity_path(fitted, "after", "int8").read_text())
    app = page(fitted.path.parent, precision="int8")
    accuracies = [each.value for each in app.metric][:2]
    for shown, key in zip(accuracies, ("accuracy", "accuracy_pytorch"), strict=True):
        assert float(shown.removesuffix("%")) == pytest.approx(100 * parity[key], abs=0.005)
    kept = f"Kept in float32, {len(parity['kept_layers'])} layers: {', '.join(parity['kept'])}."
    assert kept in texts(app)
    assert app.dataframe[1].value["Layer"].tolist() == parity["kept_layers"]


def figures(**changes: Any) -> Parity:
    measured: dict[str, Any] = {
        "photos": 2000,
        "photos_missing": 0,
        "max_abs_logit": 16.0,
        "tolerance": 0.8,
    }
    differences = ("logit_difference", "probability_difference", "batch_difference")
    measured |= {f"max_abs_{each}": 0.02 for each in differences}
    measured |= {"top1_agreement": 0.9995, "ties": 0, "accuracy": 0.915, "accuracy_pytorch": 0.92}
    return Parity(**(measured | {"provider": "CPUExecutionProvider"} | changes))


def test_figures_are_not_rounded_to_a_better_verdict() -> None:
    shown = key_figures(figures(precision="fp16", top1_agreement=0.99996))
    assert shown["Same class"] == ("99.99%", "needed 99.9%")
    assert shown["Largest |Δlogit|"] == ("0.02", "allowed 0.8")
    shown = key_figures(figures(precision="int8"))
    assert shown["Accuracy in int8"] == ("91.50%", "−0.50 points")
    shown = key_figures(figures(precision="int8", accuracy=0.93))
    assert shown["Accuracy in int8"] == ("93.00%", "+1.00 points")
    assert (small(3.14e-6), small(0.0543), small(2.109), small(0)) == (
        *("3.1e-06", "0.054", "2.1", "0"),
    )


def test_a_model_under_the_name_of_another_precision_is_told(precise: Run) -> None:
    shutil.copy(model_path(precise, "after"), model_path(precise, "after", "int8"))
    shutil.copy(parity_path(precise, "after"), parity_path(precise, "after", "int8"))
    app = page(precise.path.parent, precision="int8")
    assert "Not proven" in texts(app)
    assert f"made from run {precise.run_id}, after unfreezing, in fp32." in texts(app)


def test_an_int8_that_costs_more_than_is_allowed_is_not_proven(precise: Run) -> None:
    path = parity_path(precise, "after", "int8")
    found = json.loads(path.read_text())
    lower = found["accuracy_pytorch"] - LARGEST_LOSS - 0.001
    path.write_text(json.dumps(found | {"accuracy": lower}))
    app = page(precise.path.parent, precision="int8")
    assert "The figures in parity-int8.json are not within what is allowed." in texts(app)
    assert "Proven" not in texts(app).replace("Not proven", "")


def test_a_card_that_is_missing_or_of_another_file_is_told(precise: Run) -> None:
    card = card_path(model_path(precise, "after", "fp16"))
    harms: list[tuple[Callable[[], object], str]] = [
        (lambda: shutil.copy(precise.path / "model-card.md", card), "is about another file"),
        (card.unlink, "There is no model card beside this model."),
    ]
    for harm, says in harms:
        harm()
        app = page(precise.path.parent, precision="fp16")
        assert says in texts(app)
        labels = [each.proto.label for each in app.get("download_button")]
        assert "Model card, Markdown" not in labels
        assert "Proven" in texts(app), "the card proves nothing"


def test_the_table_holds_every_precision(fitted: Run) -> None:
    table = exported_table(Library(fitted.path.parent).snapshot())
    assert sorted(table["Precision"]) == sorted(PRECISIONS)
    int8 = table[table["Precision"] == "int8"].iloc[0]
    assert int8["Against PyTorch"] >= -100 * LARGEST_LOSS - 1e-6
    assert int8["Size"] < table["Size"].max() / 3


def test_a_refused_int8_shows_its_figures_calmly(precise: Run) -> None:
    """In the export's own words, which are also how a refusal is told from a failure."""
    said = _refusal(figures(precision="int8", accuracy=0.9, kept=("the head (1)",)))
    assert "90.00%" in said
    model = model_path(precise, "after", "int8")
    model.unlink()
    refused = f"import sys; print('error:', {said!r}, file=sys.stderr); sys.exit(2)"
    ended(export_page._jobs().start(model, python(refused)))
    app = page(precise.path.parent, precision="int8")
    assert not app.error
    assert "Refused" in texts(app)
    assert app.info[0].value == "The model was refused and not written."
    assert said in texts(app)
    assert "the precision is chosen above" in texts(app)
    assert button(app, "Export")
    app = page(precise.path.parent)
    assert not app.info, "the other precisions are as they were"


def test_an_unknown_precision_in_the_link_is_fp32(fitted: Run) -> None:
    app = page(fitted.path.parent, precision="fp64")
    assert app.radio(key="precision").value == "fp32"
    assert "Proven equal" in texts(app)


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
