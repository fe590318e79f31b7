"""The pages, run by Streamlit's own AppTest."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image
from streamlit.testing.v1 import AppTest

from explorer import classify
from explorer.classify import Guess, Prediction, Slot, agreement, slots, thumbnail
from tests.explorer_runs import write_finetune, write_run, write_trunk
from tests.test_evidence import predictions, save
from trainer.runlog import read_run
from trainer.schema import Preprocess

APP = str(Path(__file__).resolve().parents[1] / "explorer/pages/app.py")


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("THAW_RUNS_DIR", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["streamlit_app.py"])
    return tmp_path


def compare_page(**link: str | list[str]) -> AppTest:
    app = AppTest.from_file(APP, default_timeout=30)
    for name, value in link.items():
        app.query_params[name] = value
    return app.run()


def _classify() -> None:
    from explorer.pages import classify

    classify.page()


def classify_page() -> AppTest:
    return AppTest.from_function(_classify, default_timeout=30).run()


def verdicts(app: AppTest) -> str:
    return "".join(block.value for block in app.html if 'role="list"' in block.value)


def test_without_runs_each_page_says_what_to_type(runs: Path) -> None:
    for app in (compare_page(), classify_page(), AppTest.from_function(_runs).run()):
        assert not app.exception
        typed = [block.value for block in app.code]
        assert f"python -m trainer --phase finetune --runs-dir {runs}" in typed
        assert any("--data" in line for line in typed)


def test_compare_shows_the_newest_family(runs: Path) -> None:
    trunk = write_trunk(runs)
    ids = [write_finetune(runs, trunk, n, [0.70, 0.74]).run_id for n in ("a", "b")]
    app = compare_page()
    assert not app.exception
    assert app.multiselect(key="runs").value == ids
    assert "+4.0 points at epoch 1 of 1" in verdicts(app)
    assert len(app.get("vega_lite_chart")) == 2
    assert app.dataframe[0].value["Run"].tolist() == ["a", "b"]
    assert app.query_params["runs"] == ids


def test_the_link_decides_what_is_shown(runs: Path) -> None:
    trunk = write_trunk(runs)
    first, second = (write_finetune(runs, trunk, n, [0.70, 0.74]).run_id for n in ("a", "b"))
    app = compare_page(runs=[first, "gone"], axis="Since unfreeze")
    assert app.multiselect(key="runs").value == [first]
    assert app.segmented_control(key="axis").value == "Since unfreeze"
    assert any("not every run" in note.value.lower() for note in app.caption)
    app.multiselect(key="runs").set_value([first, second]).run()
    assert not app.exception
    assert app.query_params["runs"] == [first, second]


def test_compare_says_whether_a_change_is_more_than_chance(runs: Path) -> None:
    trunk = write_trunk(runs)
    for name, wrong in (("good", set[int]()), ("same", {0, 1, 2})):
        writer = write_finetune(runs, trunk, name, [0.70, 0.74])
        save(writer.predictions("before"), predictions({0, 1, 3, *range(40, 60)}))
        save(writer.predictions("after"), predictions(wrong))
    app = compare_page()
    assert not app.exception
    assert "fixed 23, broke 0: better, beyond chance (p &lt; 0.001)" in verdicts(app)
    assert any("adjusted for the 2 runs shown" in note.value for note in app.caption)


def _runs() -> None:
    from explorer.pages import runs

    runs.page()


def test_the_table_of_runs_can_be_searched(runs: Path) -> None:
    trunk = write_trunk(runs)
    write_finetune(runs, trunk, "child", [0.70, 0.74])
    app = AppTest.from_function(_runs, default_timeout=30).run()
    assert not app.exception
    assert app.dataframe[0].value["Run"].tolist() == ["child", "trunk"]
    assert "Data" not in app.dataframe[0].value.columns
    assert "data flowers" in app.text[0].value
    app.text_input(key="search").set_value("finetune").run()
    assert app.dataframe[0].value["Run"].tolist() == ["child"]
    assert app.text[0].value.startswith("1 of 2 runs.")
    app.text_input(key="search").set_value("nothing such").run()
    assert "No run has all" in app.info[0].value


def test_nothing_chosen_is_not_an_error(runs: Path) -> None:
    write_trunk(runs)
    app = compare_page()
    app.segmented_control(key="photos").set_value([]).run()
    assert "training or validation" in app.info[0].value
    app.multiselect(key="runs").set_value([]).run()
    assert not app.exception
    assert "Choose one run" in app.info[0].value


def test_a_run_that_has_only_begun(runs: Path) -> None:
    write_run(runs, "new", [], done=False)
    app = compare_page()
    assert not app.exception
    assert "No epoch has been evaluated yet" in app.info[0].value


def test_broken_runs_are_listed_and_the_others_load(runs: Path) -> None:
    good = write_trunk(runs)
    broken = write_run(runs, "broken", [0.1]).path
    (broken / "run.json").write_text("{")
    torn = write_run(runs, "torn", [0.1])
    with (torn.path / "metrics.jsonl").open("a") as file:
        file.write("nonsense\n")
    for app in (compare_page(), classify_page()):
        assert not app.exception
        assert app.expander[0].label == "2 runs have a problem"
        assert set(app.expander[0].dataframe[0].value["Run"]) == {broken.name, torn.run_id}
    assert good in compare_page().multiselect(key="runs").value


def test_a_missing_parent_is_told(runs: Path) -> None:
    write_finetune(runs, "20260101-000000-gone", "child", [0.70, 0.74])
    app = compare_page()
    assert not app.exception
    assert any("drawn alone" in line.value for line in app.text)


def test_names_are_shown_as_they_are(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run ids cannot hold markup, but a label must not depend on that."""
    write_trunk(runs)
    monkeypatch.setattr("explorer.data._labels", lambda noted: dict.fromkeys(noted, "<b>x</b>"))
    assert "&lt;b&gt;x&lt;/b&gt;" in verdicts(compare_page())


# --- classify ---------------------------------------------------------------------------------


def test_classify_prefers_the_newest_unfrozen_run(runs: Path) -> None:
    trunk = write_trunk(runs)
    child = write_finetune(runs, trunk, "child", [0.70, 0.74]).run_id
    write_trunk(runs, "later")
    app = classify_page()
    assert not app.exception
    assert app.selectbox(key="run").value == child
    # No checkpoint was written: the reason is told, not raised.
    assert any("Before unfreezing:" in line.value for line in app.text)
    assert any("After unfreezing:" in line.value for line in app.text)


class Stub:
    """A network that sees what its checkpoint's name says."""

    def __init__(self, path: Path) -> None:
        self.label = path.stem
        self.preprocess = Preprocess()

    def predict(self, image: Image.Image) -> Prediction:
        return Prediction((Guess(self.label, 0.75), Guess("<i>other</i>", 0.25)), 0.012)


def photo_bytes() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(buffer, "PNG")
    return buffer.getvalue()


def test_before_and_after_side_by_side(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trunk = write_trunk(runs)
    write_finetune(runs, trunk, "child", [0.70, 0.74])
    for name in ("**rose**", "daisy"):
        (runs / name).touch()
    networks = [Slot("before", "Before", runs / "**rose**"), Slot("after", "After", runs / "daisy")]
    monkeypatch.setattr("explorer.pages.classify.slots", lambda run: networks)
    monkeypatch.setattr("explorer.pages.classify.Classifier", Stub)
    app = classify_page()
    files = [("*a*.png", photo_bytes(), "image/png"), ("bad.png", b"no photo", "image/png")]
    app.file_uploader(key="files").set_value(files).run()
    assert not app.exception
    shown = "".join(block.value for block in app.html)
    assert ">**rose**</div>" in shown
    assert ">daisy</div>" in shown
    assert "&lt;i&gt;other&lt;/i&gt;" in shown
    assert "answers differ" in shown
    assert "12 ms" in shown
    texts = [line.value for line in app.text]
    assert "*a*.png" in texts
    assert any(line.startswith("bad.png could not be read: ") for line in texts)


def test_slots(runs: Path) -> None:
    trunk = write_trunk(runs)
    [only] = slots(read_run(runs / trunk))
    assert (only.which, only.path) == ("after", None)
    assert "is not there" in only.reason
    (runs / trunk / "checkpoints" / "transfer-best.pt").touch()
    assert slots(read_run(runs / trunk))[0].path is not None
    child = write_finetune(runs, trunk, "child", [0.7, 0.8])
    assert [slot.which for slot in slots(read_run(child.path))] == ["before", "after"]


def test_agreement() -> None:
    rose, daisy = (Prediction((Guess(name, 1.0),), 0.0) for name in ("rose", "daisy"))
    assert agreement([rose]) == ""
    assert agreement([rose, rose]) == "same answer"
    assert agreement([rose, daisy]) == "answers differ"


@pytest.mark.parametrize("size", [(1, 1), (3000, 1), (1, 3000), (4000, 3000)])
def test_thumbnails_are_small_and_never_too_thin(size: tuple[int, int]) -> None:
    small = thumbnail(Image.new("RGB", size))
    assert max(small.size) <= 440
    assert min(small.size) >= 22


def test_a_checkpoint_classifies(runs: Path) -> None:
    """The real thing, with random weights: probabilities of the classes, best first."""
    from trainer.checkpoint import Checkpoint, save_checkpoint
    from trainer.model import ModelSpec, build_model
    from trainer.schema import Preprocess

    spec = ModelSpec("mobilenet_v3_small", 7, (), "avg")
    path = runs / "transfer-best.pt"
    names = tuple(f"class {n}" for n in range(7))
    weights = build_model(spec).state_dict()
    small = Preprocess(resize=64, crop=48)
    save_checkpoint(path, Checkpoint(spec, names, small, "transfer", 1, weights))
    result = classify.Classifier(path).predict(Image.new("RGB", (100, 60), "green"))
    chances = [guess.probability for guess in result.guesses]
    assert len(chances) == 5
    assert chances == sorted(chances, reverse=True)
    assert {guess.label for guess in result.guesses} <= set(names)
    assert result.seconds > 0
