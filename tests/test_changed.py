"""What unfreezing changed: the numbers, the charts, and the page."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.special import log_softmax, softmax
from scipy.stats import binomtest
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint
from streamlit.testing.v1 import AppTest

from explorer.calibration import calibration, calibration_lines, few_photos, reliability
from explorer.changed import (
    Change,
    Names,
    change_between,
    changed,
    class_headline,
    class_names,
    class_table,
    confused_pairs,
    confusion,
    headline,
    load_scored,
    ordered,
    per_class,
    scored,
)
from explorer.changed_charts import (
    CELL,
    CELL_COLOURS,
    CELL_TEXT,
    confidence_counts,
    dumbbell,
    matrix,
    reliability_chart,
)
from explorer.gallery import chosen_photos, photo_path, photo_table, small_jpeg
from tests.explorer_runs import write_run, write_trunk
from trainer.evidence import EvidenceError, Predictions, compare
from trainer.preprocess import PhotoError
from trainer.run_writer import RunWriter
from trainer.runlog import read_run

NAMES: Names = ("Before unfreezing", "After unfreezing")
CLASSES = ("daisy", "rose", "tulip")
LABELS = [0, 0, 0, 0, 1, 1]  # no tulips
FILES = tuple(f"{CLASSES[label]}/{n}.jpg" for n, label in enumerate(LABELS))
# Three daisies right, one is fixed and one broken; both roses are fixed, from tulip and daisy.
BEFORE = [0, 0, 0, 1, 2, 0]
AFTER = [0, 0, 1, 0, 1, 1]


def logits(predicted: list[int], sure: float = 2.0, classes: int = 3) -> Any:
    return sure * np.eye(classes, dtype=np.float32)[predicted]


def small_change(sure: float = 2.0) -> Change:
    labels = np.array(LABELS)
    before, after = (scored(FILES, labels, logits(each, sure)) for each in (BEFORE, AFTER))
    return changed(before, after, CLASSES)


def big_change(photos: int = 600, classes: int = 5) -> Change:
    """Random networks that are right in about half of the photos, the second one more often."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, photos)
    files = tuple(f"{n}.jpg" for n in range(photos))
    values = rng.normal(size=(2, photos, classes)).astype(np.float32)
    values[0][np.arange(photos), labels] += 1.0
    values[1][np.arange(photos), labels] += 1.6
    before, after = (scored(files, labels, each) for each in values)
    return changed(before, after, [f"class {n}" for n in range(classes)])


# --- reading ----------------------------------------------------------------------------------


def test_probabilities_are_the_softmax_of_the_logits() -> None:
    values = np.random.default_rng(1).normal(0, 5, (50, 7)).astype(np.float32)
    labels = np.arange(50) % 7
    found = scored(tuple(map(str, range(50))), labels, values)
    assert found.predicted.tolist() == values.argmax(axis=1).tolist()
    assert found.confidence == pytest.approx(softmax(values, axis=1).max(axis=1), rel=1e-5)
    expected = log_softmax(values.astype(float), axis=1)[np.arange(50), labels]
    assert found.true_log == pytest.approx(expected, rel=1e-5)


def test_huge_logits_do_not_overflow() -> None:
    found = scored(("a",), np.array([0]), np.array([[-1e4, 1e4]], dtype=np.float32))
    assert (found.confidence[0], found.true_log[0]) == (1.0, -2e4)


def test_photos_are_paired_by_name_whatever_their_order() -> None:
    before = scored(FILES, np.array(LABELS), logits(BEFORE))
    after = scored(FILES[::-1], np.array(LABELS[::-1]), logits(AFTER[::-1]))
    assert per_class(changed(before, after, CLASSES)).equals(per_class(small_change()))


def test_the_evidence_is_that_of_the_other_pages() -> None:
    labels = np.array(LABELS)
    before, after = (Predictions(FILES, labels, np.array(each)) for each in (BEFORE, AFTER))
    assert small_change().evidence == compare(before, after)


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    before, after = tmp_path / "before.npz", tmp_path / "after.npz"
    save(before, BEFORE)
    save(after, BEFORE)
    assert change_between(before, after, CLASSES).evidence.fixed == 0
    assert change_between(before, after, CLASSES) is change_between(before, after, CLASSES)
    save(after, AFTER, sure=30)
    os.utime(after, ns=(0, 0))
    assert change_between(before, after, CLASSES).evidence.fixed == 3


def save(path: Path, predicted: list[int], sure: float = 2.0, files: Any = FILES) -> None:
    path.parent.mkdir(exist_ok=True)
    np.savez(path, logits=logits(predicted, sure), labels=np.array(LABELS), files=np.array(files))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"logits": np.zeros((3, 2), np.float32)}, "do not fit"),
        ({"logits": np.zeros((6, 0), np.float32)}, "do not fit"),
        ({"labels": np.zeros((6, 1), np.int64)}, "do not fit"),
        ({"labels": np.array([0, 0, 0, 0, 1, 9])}, "outside the classes"),
        ({"labels": np.array([0, 0, 0, 0, 1, -1])}, "outside the classes"),
        ({"labels": np.zeros(6)}, "wrong type"),
        ({"files": np.zeros(6)}, "wrong type"),
        ({"logits": np.full((6, 3), np.nan, np.float32)}, "diverged"),
        ({"logits": np.array([print] * 6, dtype=object)}, "cannot be read"),
    ],
)
def test_damaged_predictions_are_said(tmp_path: Path, changes: Any, reason: str) -> None:
    path = tmp_path / "after.npz"
    sound = {"logits": logits(AFTER), "labels": np.array(LABELS), "files": np.array(FILES)}
    np.savez(path, **(sound | changes))
    with pytest.raises(EvidenceError, match=reason):
        load_scored(path)


def test_what_is_no_archive_is_said(tmp_path: Path) -> None:
    path = tmp_path / "after.npz"
    for content in (b"", b"garbage", b"PK\x03\x04 cut short"):
        path.write_bytes(content)
        with pytest.raises(EvidenceError, match=r"after\.npz"):
            load_scored(path)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(EvidenceError, match=r"after\.npz"):
        load_scored(path)
    with pytest.raises(EvidenceError, match="cannot be read"):
        change_between(tmp_path / "gone.npz", path, CLASSES)


def test_every_output_has_a_name_of_its_own() -> None:
    assert class_names(("a", "b"), 2) == ("a", "b")
    assert class_names(("a", "a", "b"), 4) == ("a [0]", "a [1]", "b", "output 3")
    assert class_names(("a", "b", "c"), 2) == ("a", "b")
    assert class_names(("caf\udce9",), 1) == (r"caf\udce9",)  # a folder not named in UTF-8


# --- classes ------------------------------------------------------------------------------------


def test_per_class_by_hand() -> None:
    frame = per_class(small_change()).set_index("class")
    assert frame["n"].to_dict() == {"daisy": 4, "rose": 2, "tulip": 0}
    daisy, rose, tulip = (frame.loc[name] for name in CLASSES)
    assert (daisy["recall_before"], daisy["recall_after"], daisy["change"]) == (0.75, 0.75, 0)
    assert (daisy["fixed"], daisy["broken"]) == (1, 1)
    assert (rose["recall_before"], rose["recall_after"], rose["fixed"]) == (0, 1, 2)
    assert daisy["precision_before"] == pytest.approx(3 / 4)
    assert daisy["precision_after"] == 1
    assert rose["precision_before"] == 0
    assert rose["precision_after"] == pytest.approx(2 / 3)
    assert rose["f1_after"] == pytest.approx(2 * (2 / 3) / (1 + 2 / 3))
    assert math.isnan(tulip["recall_before"])
    assert math.isnan(tulip["p"])
    assert tulip["precision_before"] == 0  # predicted once, wrongly
    assert math.isnan(tulip["precision_after"])


def test_a_class_without_photos_or_answers_is_left_out() -> None:
    change = changed(
        scored(FILES, np.array(LABELS), logits(AFTER, classes=4)),
        scored(FILES, np.array(LABELS), logits(AFTER, classes=4)),
        (*CLASSES, "lily"),
    )
    assert per_class(change)["class"].tolist() == ["daisy", "rose"]


def test_p_of_each_class_is_adjusted_for_all_of_them() -> None:
    frame = per_class(big_change())
    exact = [binomtest(row.fixed, row.fixed + row.broken).pvalue for row in frame.itertuples()]
    assert frame["p"].tolist() == pytest.approx(multipletests(exact, method="holm")[1].tolist())


def test_classes_add_up_to_the_whole() -> None:
    change = big_change()
    frame = per_class(change)
    assert frame["fixed"].sum() == change.evidence.fixed
    assert frame["broken"].sum() == change.evidence.broken
    mean = np.average(frame["recall_after"], weights=frame["n"])
    assert mean == pytest.approx(change.after.accuracy)


def test_the_classes_that_changed_most_either_way_are_drawn() -> None:
    frame = pd.DataFrame(
        {"class": list("bAcd"), "n": [5, 7, 6, 0], "change": [0.1, -0.3, 0.2, math.nan]}
    )
    assert ordered(frame, "change")["class"].tolist() == ["c", "b", "A"]
    assert ordered(frame, "name")["class"].tolist() == ["A", "b", "c"]
    assert ordered(frame, "photos")["class"].tolist() == ["A", "c", "b"]
    assert ordered(frame, "change", limit=2)["class"].tolist() == ["c", "A"]


def test_the_table_is_in_percent_and_points() -> None:
    table = class_table(per_class(small_change()), ("Control", "After unfreezing"))
    assert table["Class"].tolist() == ["rose", "daisy", "tulip"]
    assert table.loc[0, ["Recall control", "Recall after", "Change"]].tolist() == [0, 100, 100]


# --- in words -----------------------------------------------------------------------------------


def test_the_headline_says_how_sure_it_is() -> None:
    text = headline(small_change(), NAMES)
    assert text.startswith(
        "Accuracy 50.0% (before unfreezing), 83.3% (after unfreezing) on 6 validation photos: "
        "+33.3 points, 95% interval "
    )
    assert text.endswith("fixed 3, broke 1: no evidence of a difference (p = 0.62).")


def test_few_photos_of_a_class_are_said() -> None:
    assert class_headline(per_class(small_change())) == (
        "Gained most: rose, +100.0 points (2 photos: fixed 2, broke 0). No class lost. "
        "No single class changed beyond chance, adjusted for 2 classes (Holm). "
        "The smallest class has 2 photos, so there one photo is 50 points."
    )


def test_classes_beyond_chance_are_named() -> None:
    text = class_headline(per_class(big_change(6000)))
    assert "5 of 5 classes changed beyond chance, adjusted for 5 classes (Holm): class" in text
    assert "smallest" not in text


def test_equal_networks_changed_no_class() -> None:
    same = scored(FILES, np.array(LABELS), logits(BEFORE))
    assert class_headline(per_class(changed(same, same, CLASSES))) == "No class changed."


# --- confusions ---------------------------------------------------------------------------------


def test_confusions_by_hand() -> None:
    cells = confusion(small_change()).set_index(["true", "predicted"])
    assert cells.loc[("daisy", "rose"), ["before", "after", "n"]].tolist() == [1, 1, 4]
    assert cells.loc[("rose", "rose"), ["before", "after", "n"]].tolist() == [0, 2, 2]
    assert cells.loc[("rose", "tulip"), ["before", "after", "n"]].tolist() == [1, 0, 2]
    assert cells["before"].sum() == cells["after"].sum() == 6
    assert ("tulip", "tulip") not in cells.index


def test_the_pairs_confused_most_come_first() -> None:
    pairs = confused_pairs(confusion(big_change()), NAMES, limit=4)
    assert pairs.columns.tolist() == [
        "True class",
        "Predicted",
        "Before",
        "After",
        "Change",
        "Photos",
    ]
    assert len(pairs) == 4
    assert (pairs["True class"] != pairs["Predicted"]).all()
    worst = pairs[["Before", "After"]].max(axis=1)
    assert worst.is_monotonic_decreasing


# --- single photos ------------------------------------------------------------------------------


def test_photos_are_told_apart_by_what_happened_to_them() -> None:
    photos = photo_table(small_change())
    outcomes = photos.set_index("file")["outcome"].to_dict()
    assert [outcomes[file] for file in FILES] == [
        *("right", "right", "broken", "fixed", "fixed", "fixed"),
    ]
    chance = math.exp(2) / (math.exp(2) + 2)
    fixed = chosen_photos(photos, "fixed", true="daisy")
    assert fixed[["file", "before", "after"]].to_numpy().tolist() == [
        ["daisy/3.jpg", "rose", "daisy"]
    ]
    assert fixed["confidence_before"].tolist() == pytest.approx([chance])
    assert fixed["gain"].tolist() == pytest.approx([chance - 1 / (math.exp(2) + 2)])
    assert chosen_photos(photos, before="tulip")["file"].tolist() == ["rose/4.jpg"]
    assert len(chosen_photos(photos)) == 6
    assert chosen_photos(photos, "wrong").empty


def test_the_largest_change_comes_first() -> None:
    photos = photo_table(big_change())
    assert photos["gain"].abs().is_monotonic_decreasing
    assert (photos["true_after"] - photos["true_before"]).equals(photos["gain"])


def draw(path: Path, size: tuple[int, int] = (400, 300)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)
    return path


def test_only_photos_inside_the_folder_are_found(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    inside = draw(root / "daisy" / "0.jpg")
    outside = draw(tmp_path / "secret" / "0.jpg")
    (root / "link.jpg").symlink_to(inside)
    (root / "out.jpg").symlink_to(outside)
    (root / "folder").symlink_to(outside.parent)
    (root / "notes.txt").write_text("secret")
    (root / "notes.jpg").symlink_to(root / "notes.txt")
    (root / "folder.jpg").mkdir()
    (root / "loop.jpg").symlink_to(root / "loop.jpg")
    os.mkfifo(root / "pipe.jpg")
    assert photo_path(root, "daisy/0.jpg") == inside
    assert photo_path(root, "link.jpg") == inside
    refused = ["../secret/0.jpg", "daisy/../../secret/0.jpg", str(outside), "out.jpg"]
    refused += ["folder/0.jpg", "notes.txt", "notes.jpg", "folder.jpg", "pipe.jpg", "gone.jpg"]
    for name in [*refused, "loop.jpg", "nul\0.jpg", "", ".", "x" * 5000 + ".jpg"]:
        with pytest.raises(PhotoError):
            photo_path(root, name)


def test_a_thumbnail_is_a_small_jpeg(tmp_path: Path) -> None:
    content = small_jpeg(draw(tmp_path / "a.png", (3000, 1000)))
    (tmp_path / "small.jpg").write_bytes(content)
    with Image.open(tmp_path / "small.jpg") as small:
        assert (small.format, small.size) == ("JPEG", (280, 93))
    (tmp_path / "bad.jpg").write_bytes(b"no photo")
    with pytest.raises(PhotoError):
        small_jpeg(tmp_path / "bad.jpg")


# --- confidence ---------------------------------------------------------------------------------


def test_reliability_by_hand() -> None:
    change = small_change()
    change.before.confidence[:] = [0.05, 0.1, 0.11, 0.95, 1.0, 0.3]
    rows = reliability(change.before)
    assert rows["n"].tolist() == [2, 1, 1, 0, 0, 0, 0, 0, 0, 2]  # 0.1 and 0.3 end their steps
    assert rows["confidence"].dropna().tolist() == pytest.approx([0.075, 0.11, 0.3, 0.975])
    assert rows["accuracy"].dropna().tolist() == [1, 1, 0, 0]
    ece = (2 * 0.925 + 1 * 0.89 + 1 * 0.3 + 2 * 0.975) / 6
    assert calibration(change.before).ece == pytest.approx(ece)


def test_intervals_are_wilsons() -> None:
    rows = reliability(big_change().after).query("n > 0")
    low, high = proportion_confint(rows["accuracy"] * rows["n"], rows["n"], method="wilson")
    assert rows["lower"].tolist() == pytest.approx(low.tolist(), abs=1e-6)
    assert rows["upper"].tolist() == pytest.approx(high.tolist(), abs=1e-6)


def test_the_likelihood_is_that_of_the_true_classes() -> None:
    chance = math.exp(2) / (math.exp(2) + 2)
    expected = -(3 * math.log(chance) + 3 * math.log((1 - chance) / 2)) / 6
    found = calibration(small_change().before)
    assert found.nll == pytest.approx(expected)
    assert (found.accuracy, found.confidence) == pytest.approx((0.5, chance))


def test_confidence_in_words() -> None:
    before, after = calibration_lines(small_change(), NAMES)
    assert before == (
        "Before unfreezing: mean confidence 78.7% for an accuracy of 50.0% (over-confident by "
        "28.7 points); expected calibration error 28.7%, negative log-likelihood 1.240."
    )
    assert "(under-confident by 4.6 points)" in after
    assert few_photos(small_change()).startswith("2 of 2 points stand for fewer than 30 photos")
    assert few_photos(big_change(100_000)) == ""


# --- charts -------------------------------------------------------------------------------------


def layers(chart: Any) -> list[dict[str, Any]]:
    return list(chart.to_dict()["layer"])


def test_the_dumbbell_names_class_and_photos_and_has_two_codes() -> None:
    frame = ordered(per_class(small_change()), "change")
    chart = dumbbell(frame, NAMES)
    _, after, *_ = layers(chart)
    assert after["encoding"]["y"]["sort"] == ["rose (2)", "daisy (4)"]
    kinds = ["Before unfreezing", "After: gained", "After: lost", "After: the same"]
    assert after["encoding"]["color"]["scale"]["domain"] == kinds
    assert after["encoding"]["shape"]["scale"]["domain"] == kinds
    assert len(set(after["encoding"]["shape"]["scale"]["range"])) == 4
    taller = dumbbell(ordered(per_class(big_change()), "change"), NAMES)
    assert taller.to_dict()["height"] > chart.to_dict()["height"]


def test_a_matrix_has_numbers_while_there_is_room() -> None:
    change = small_change()
    drawn = matrix(confusion(change), change.classes, "before", shares=False, names=NAMES)
    squares, text = layers(drawn)
    assert squares["encoding"]["x"]["scale"]["domain"] == list(CLASSES)
    [click] = drawn.to_dict()["params"]
    assert (click["name"], click["select"]["fields"]) == (CELL, ["true", "predicted", "value"])
    assert text["encoding"]["text"]["field"] == "text"
    many = big_change(classes=40)
    assert len(layers(matrix(confusion(many), many.classes, "after", False, NAMES))) == 1


def cell_rows(which: Any, shares: bool) -> dict[tuple[str, str], str]:
    change = small_change()
    spec = matrix(confusion(change), change.classes, which, shares, NAMES).to_dict()
    [rows] = spec["datasets"].values()
    return {(row["true"], row["predicted"]): row["text"] for row in rows}


def test_cells_show_photos_or_percent_and_nothing_where_there_is_none() -> None:
    assert cell_rows("before", False)["daisy", "daisy"] == "3"
    assert cell_rows("before", True)["daisy", "daisy"] == "75"
    assert cell_rows("difference", False) == {
        ("rose", "daisy"): "\u22121",
        ("rose", "rose"): "+2",
        ("rose", "tulip"): "\u22121",
    }
    assert cell_rows("difference", True)["rose", "rose"] == "+100"


def test_the_difference_is_centred_at_zero() -> None:
    change = small_change()
    drawn = matrix(confusion(change), change.classes, "difference", False, NAMES)
    assert layers(drawn)[0]["encoding"]["color"]["scale"]["domain"] == [-2, 0, 2]
    assert drawn.to_dict()["title"]["text"] == "Difference: after minus before"


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def test_numbers_are_legible_on_every_cell() -> None:
    dark = luminance(CELL_TEXT) + 0.05
    assert all((luminance(colour) + 0.05) / dark >= 4.5 for colour in CELL_COLOURS.values())


def test_equal_networks_have_an_empty_difference() -> None:
    same = scored(FILES, np.array(LABELS), logits(BEFORE))
    change = changed(same, same, CLASSES)
    drawn = matrix(confusion(change), change.classes, "difference", False, NAMES)
    assert layers(drawn)[0]["encoding"]["x"]["scale"]["domain"] == list(CLASSES)
    assert dumbbell(ordered(per_class(change), "change"), NAMES).to_dict()


def test_the_reliability_diagram_has_a_diagonal_and_three_codes() -> None:
    diagonal, _, lines, dots = layers(reliability_chart(big_change(), NAMES))
    assert diagonal["encoding"]["x"]["field"] == "confidence"
    assert diagonal["encoding"]["y"]["field"] == "accuracy"
    assert lines["encoding"]["strokeDash"]["scale"]["domain"] == list(NAMES)
    assert dots["encoding"]["shape"]["scale"]["range"] == ["circle", "diamond"]
    [rows] = confidence_counts(big_change(), NAMES).to_dict()["datasets"].values()
    assert sum(row["n"] for row in rows) == 1200
    assert all(row["left"] < row["right"] for row in rows)


# --- the page -----------------------------------------------------------------------------------


def _changed() -> None:
    from explorer.pages import changed

    changed.page()


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "runs"
    folder.mkdir()
    monkeypatch.setenv("THAW_RUNS_DIR", str(folder))
    monkeypatch.setattr("sys.argv", ["streamlit_app.py"])
    return folder


def page(**link: str) -> AppTest:
    app = AppTest.from_function(_changed, default_timeout=30)
    for name, value in link.items():
        app.query_params[name] = value
    return app.run()


def write(runs: Path, name: str = "child", files: Any = FILES, **info: Any) -> str:
    """A finetune run with BEFORE and AFTER; returns its id."""
    values: dict[str, Any] = {
        "classes": list(CLASSES),
        "config": {"seed": 0},
        "parent_run_id": "20260101-000000-trunk",
    }
    writer = write_run(runs, name, (0.5, 0.8), "finetune", 3, **(values | info))
    save(writer.predictions("before"), BEFORE, files=files)
    save(writer.predictions("after"), AFTER, files=files)
    return writer.run_id


def html(app: AppTest) -> str:
    return "".join(block.value for block in app.html)


def texts(app: AppTest) -> str:
    return "\n".join(block.value for block in (*app.text, *app.info))


def test_without_runs_it_says_what_to_type(runs: Path) -> None:
    app = page()
    assert not app.exception
    assert any("--phase finetune" in block.value for block in app.code)


def test_it_begins_with_the_answer(runs: Path) -> None:
    run = write(runs)
    write_trunk(runs)
    app = page()
    assert not app.exception
    assert app.selectbox(key="run").value == run
    assert "fixed 3, broke 1: no evidence of a difference" in html(app)
    assert "Gained most: rose, +100.0 points (2 photos" in texts(app)
    assert app.dataframe[0].value["Class"].tolist() == ["rose", "daisy", "tulip"]
    assert len(app.get("vega_lite_chart")) == 1


@pytest.mark.parametrize(("part", "charts"), [("Confusions", 3), ("Photos", 0), ("Confidence", 2)])
def test_the_link_decides_what_is_shown(runs: Path, part: str, charts: int) -> None:
    write(runs)
    app = page(part=part, cells="Percent of true class", outcome="All", true_class="rose")
    assert not app.exception
    assert app.segmented_control(key="part").value == part
    assert len(app.get("vega_lite_chart")) == charts
    assert app.query_params["part"] in (part, [part])


def test_the_gallery_shows_the_photos_of_the_link(runs: Path, tmp_path: Path) -> None:
    draw(tmp_path / "photos" / "rose" / "4.jpg")
    (tmp_path / "photos" / "rose" / "5.jpg").write_bytes(b"no photo")
    write(runs, dataset={"name": "flowers", "root": str(tmp_path / "photos"), "counts": {}})
    app = page(part="Photos", true_class="rose")
    assert not app.exception
    shown = html(app)
    assert shown.count("<figure") == 2
    assert '<img alt="rose/4.jpg" src="data:image/jpeg;base64,' in shown
    assert "rose/5.jpg: not an image" in shown
    assert "11% → 79%" in shown
    app.segmented_control(key="outcome").set_value("Broken").run()
    assert "No photo is like this" in texts(app)
    app.selectbox(key="true_class").set_value("Any class").run()
    assert html(app).count("<figure") == 1
    assert "daisy/2.jpg: it is not in the photo folder any more" in html(app)
    assert "true_class" not in app.query_params


def test_a_gallery_of_many_photos_has_pages(runs: Path) -> None:
    writer = write_run(
        runs, "many", (0.5, 0.8), "finetune", 3, classes=["a", "b"], parent_run_id="x"
    )
    labels, files = np.zeros(30, np.int64), np.array([f"{n:02d}.jpg" for n in range(30)])
    for name, right in (("before", 1), ("after", 0)):
        path = writer.predictions(name)
        path.parent.mkdir(exist_ok=True)
        values = np.eye(2, dtype=np.float32)[[right] * 30]
        np.savez(path, logits=values, labels=labels, files=files)
    app = page(part="Photos", sheet="3")
    assert not app.exception
    assert html(app).count("<figure") == 6
    assert "29.jpg" in html(app)
    for nonsense in ("4", "0", "-1", "x", "9" * 5000):
        app = page(part="Photos", sheet=nonsense)
        assert not app.exception
        assert html(app).count("<figure") == 12


def test_names_of_photos_and_classes_are_text(runs: Path) -> None:
    hostile = ["<img src=x onerror=alert(1)>", "../../etc/passwd", "**bold**.jpg", "\udce9.jpg"]
    names = ["<b>rose</b>", "# heading", "[caf\udce9](http://x)"]
    photos = runs.parent / "photos"
    draw(photos / os.fsdecode(b"caf\xe9.jpg"))  # not named in UTF-8
    dataset = {"name": "flowers", "root": str(photos), "counts": {}}
    write(runs, files=[*hostile, "caf\udce9.jpg", "b"], classes=names, dataset=dataset)
    for part in ("Classes", "Confusions", "Photos", "Confidence"):
        app = page(part=part, outcome="All")
        assert not app.exception
        assert "<b>rose" not in html(app)
        assert "<img src=x" not in html(app)
        assert r'<img alt="caf\udce9.jpg" src' in html(app) or part != "Photos"
        assert not any("heading" in block.value for block in (*app.markdown, *app.caption))


def test_a_folder_that_is_gone_costs_only_the_pictures(runs: Path) -> None:
    write(runs, dataset={"name": "flowers", "root": "/nowhere/at all", "counts": {}})
    app = page(part="Photos")
    assert not app.exception
    assert "their folder /nowhere/at all is not there any more" in texts(app)
    assert html(app).count("<figure") == 3
    for root in (["x"], "x" * 5000, "nul\0", ""):
        write(runs, "odd", dataset={"name": "flowers", "root": root, "counts": {}})
        app = page(part="Photos")
        assert not app.exception
        assert "The photos cannot be shown" in texts(app)


def test_a_choice_of_another_run_does_not_stick(runs: Path) -> None:
    run = write(runs)
    other = write(runs, "other", classes=["x", "y", "z"])
    app = page(part="Photos", run=run, true_class="daisy")
    assert app.selectbox(key="true_class").value == "daisy"
    app.selectbox(key="run").set_value(other).run()
    assert not app.exception
    assert app.selectbox(key="true_class").value == "Any class"


def test_against_the_control(runs: Path) -> None:
    write(runs)
    app = page(compare_with="Control")
    assert not app.exception
    assert "This run has no control" in texts(app)
    control = write_run(
        runs,
        "control",
        (0.5, 0.6),
        parent_run_id="20260101-000000-trunk",
        config={"seed": 0},
        classes=list(CLASSES),
    )
    save(control.predictions("after"), AFTER)
    app = page(compare_with="Control")
    assert not app.exception
    assert "Accuracy 83.3% (control), 83.3% (after unfreezing)" in html(app)
    assert "No class changed" in texts(app)
    assert "Recall control" in app.dataframe[0].value.columns


def test_runs_without_a_change_say_why(runs: Path) -> None:
    trunk = write_trunk(runs)
    assert "never unfrozen" in texts(page(run=trunk))
    bare = write_run(runs, "bare", (0.5, 0.8), "finetune", 3, parent_run_id=trunk)
    assert "were not saved" in texts(page(run=bare.run_id))
    begun = write_run(runs, "begun", [], "finetune", 3, done=False, parent_run_id=trunk)
    assert "has not saved its answers yet" in texts(page(run=begun.run_id))
    run = write(runs)
    (runs / run / "predictions" / "after.npz").write_bytes(b"garbage")
    app = page(run=run)
    assert not app.exception
    assert "cannot be read" in texts(app)
    save(runs / run / "predictions" / "after.npz", AFTER, files=[f"{n}.jpg" for n in range(6)])
    assert "validated on different photos" in texts(page(run=run))


def test_a_run_that_goes_on_is_said(runs: Path) -> None:
    run = write(runs)
    writer = RunWriter.reopen(read_run(runs / run), 4)
    app = page()
    assert not app.exception
    assert any("best epoch so far" in block.value for block in app.caption)
    writer.close("done")
