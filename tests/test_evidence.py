"""Whether a change of accuracy is more than chance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from explorer.data import Library
from explorer.evidence import evidence_lines, findings
from tests.explorer_runs import write_run, write_trunk
from trainer.controls import control_of, controls_by_parent
from trainer.evidence import (
    Evidence,
    EvidenceError,
    Predictions,
    compare,
    holm,
    interval,
    load_predictions,
    mcnemar,
    sentence,
)

PHOTOS = 200


def predictions(wrong: set[int], photos: int = PHOTOS, reverse: bool = False) -> Predictions:
    """Two classes in turn; the photos in `wrong` are predicted as the other one."""
    order = range(photos)[::-1] if reverse else range(photos)
    labels = np.array([i % 2 for i in order])
    predicted = np.array([(i + (i in wrong)) % 2 for i in order])
    return Predictions(tuple(f"{i}.jpg" for i in order), labels, predicted)


def save(path: Path, found: Predictions) -> None:
    logits = np.eye(2, dtype=np.float32)[found.predicted]
    np.savez(path, logits=logits, labels=found.labels, files=np.array(found.files))


# --- the numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fixed", "broken", "p"),
    [(0, 0, 1.0), (5, 5, 1.0), (9, 1, 22 / 1024), (1, 9, 22 / 1024), (10, 0, 2 / 1024)],
)
def test_mcnemars_exact_test(fixed: int, broken: int, p: float) -> None:
    assert mcnemar(fixed, broken) == pytest.approx(p)


def test_mcnemar_with_many_photos() -> None:
    assert 0 < mcnemar(6000, 4000) < 1e-80
    assert mcnemar(41, 33) == pytest.approx(0.416, abs=0.001)  # scipy.stats.binomtest(33, 74)


def test_photos_are_paired_by_name_whatever_their_order() -> None:
    before, after = predictions({0, 1, 2, 3}), predictions({3, 4}, reverse=True)
    found = compare(before, after)
    assert (found.photos, found.fixed, found.broken) == (PHOTOS, 3, 1)
    assert found.change == pytest.approx(2 / PHOTOS)
    assert found.low < 0 < found.high


@pytest.mark.parametrize(("fixed", "broken"), [(12, 4), (40, 25), (140, 90), (600, 3), (0, 1)])
def test_mcnemar_is_the_binomial_test_of_other_packages(fixed: int, broken: int) -> None:
    from scipy.stats import binomtest
    from statsmodels.stats.contingency_tables import mcnemar as theirs

    p = mcnemar(fixed, broken)
    assert p == pytest.approx(binomtest(fixed, fixed + broken).pvalue, rel=1e-9)
    assert p == pytest.approx(theirs([[50, broken], [fixed, 20]], exact=True).pvalue, rel=1e-9)


@pytest.mark.parametrize("many", [1, 2, 7, 300])
def test_holm_is_that_of_statsmodels(many: int) -> None:
    from statsmodels.stats.multitest import multipletests

    p = np.random.default_rng(many).random(many) ** 4
    assert holm(p.tolist()) == pytest.approx(multipletests(p, method="holm")[1].tolist())


@pytest.mark.parametrize(
    ("photos", "fixed", "broken"),
    [(200, 40, 15), (200, 1, 0), (300, 3, 6), (600, 150, 160), (600, 590, 0)],
)
def test_the_interval_is_that_of_a_paired_bootstrap(photos: int, fixed: int, broken: int) -> None:
    from scipy.stats import bootstrap

    before = predictions(set(range(fixed)), photos)
    after = predictions(set(range(fixed, fixed + broken)), photos)
    found = compare(before, after)
    theirs = bootstrap(
        [after.predicted == after.labels, before.predicted == before.labels],
        lambda after, before, axis: after.mean(axis) - before.mean(axis),
        paired=True,
        method="percentile",
        n_resamples=20_000,
        batch=2000,
        rng=np.random.default_rng(1),
    )
    # Theirs is drawn: a quantile's standard error is 0.02 deviations, and it falls on whole photos.
    tolerance = 0.08 * theirs.standard_error + 1 / photos + 1e-9
    assert (found.low, found.high) == pytest.approx(theirs.confidence_interval, abs=tolerance)
    assert found == compare(before, after)  # the same numbers at every look


@pytest.mark.parametrize("values", [[1, -1, 0], [3, 2, 1, 0, -1, -2, -3], [5], [0], [-7, 0]])
@pytest.mark.parametrize("photos", [1, 10, 250])
def test_the_interval_is_exact(values: list[int], photos: int) -> None:
    counts = np.random.default_rng(photos).multinomial(photos, [1 / len(values)] * len(values))
    one = np.zeros(15)
    one[np.array(values) + 7] = counts / photos
    chances = np.ones(1)  # of each sum, from -7 * photos on
    for _ in range(photos):
        chances = np.convolve(chances, one)
    low, high = np.searchsorted(np.cumsum(chances), [0.025, 0.975]) - 7 * photos
    assert interval(np.array(values), counts) == pytest.approx((low / photos, high / photos))


def test_equal_networks_show_nothing() -> None:
    found = compare(predictions({1}), predictions({1}))
    assert (found.low, found.high, found.p, found.change) == (0, 0, 1, 0)


@pytest.mark.parametrize("other", [predictions(set(), 100), predictions(set(), 201)])
def test_other_photos_are_not_compared(other: Predictions) -> None:
    with pytest.raises(EvidenceError, match="different photos"):
        compare(predictions(set()), other)


def test_other_labels_are_not_compared() -> None:
    after = predictions(set())
    shifted = Predictions(after.files, after.labels + 1, after.predicted)
    with pytest.raises(EvidenceError, match="different classes"):
        compare(predictions(set()), shifted)


def test_many_tries_are_adjusted_for() -> None:
    assert holm([0.04]) == [0.04]
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 cut short"])
def test_damaged_predictions_are_said(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "after.npz"
    path.write_bytes(content)
    with pytest.raises(EvidenceError, match=r"after\.npz"):
        load_predictions(path)


def test_predictions_that_do_not_fit_are_said(tmp_path: Path) -> None:
    path = tmp_path / "after.npz"
    np.savez(path, logits=np.zeros((3, 2)), labels=np.zeros(2), files=np.array(["a", "b", "c"]))
    with pytest.raises(EvidenceError, match="do not fit"):
        load_predictions(path)
    np.savez(path, logits=np.zeros((3, 2)))
    with pytest.raises(EvidenceError, match="labels"):
        load_predictions(path)


@pytest.mark.parametrize(
    "arrays",
    [
        {"logits": np.zeros(()), "labels": np.zeros(1), "files": np.zeros(1)},
        {"logits": np.zeros((1, 2)), "labels": np.zeros(()), "files": np.zeros(1)},
        {"logits": np.zeros((1, 2)), "labels": np.array(["a"]), "files": np.zeros(1)},
        {"logits": np.zeros((1, 2)), "labels": np.zeros((1, 2)), "files": np.zeros(1)},
        {"logits": np.array([["a", "b"]]), "labels": np.array(["a"]), "files": np.zeros(1)},
        {"logits": np.zeros((1, 2)), "labels": np.zeros(1), "files": np.zeros(())},
    ],
)
def test_arrays_of_another_kind_are_said(tmp_path: Path, arrays: dict[str, Any]) -> None:
    path = tmp_path / "after.npz"
    np.savez(path, **arrays)
    with pytest.raises(EvidenceError, match=r"after\.npz"):
        load_predictions(path)


def test_a_spoiled_byte_is_said_also_of_a_compressed_file(tmp_path: Path) -> None:
    path = tmp_path / "after.npz"
    np.savez_compressed(path, logits=np.random.default_rng(0).random((99, 9)))
    content = bytearray(path.read_bytes())
    content[300:310] = bytes(10)
    path.write_bytes(content)
    with pytest.raises(EvidenceError, match=r"after\.npz"):
        load_predictions(path)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    path = tmp_path / "after.npz"
    np.savez(path, logits=np.array([print], dtype=object), labels=np.zeros(1), files=np.zeros(1))
    with pytest.raises(EvidenceError, match="pickle"):
        load_predictions(path)


# --- runs ---------------------------------------------------------------------------------------


def write_pair(runs_dir: Path, parent: str, name: str, wrong: set[int], **info: Any) -> str:
    writer = write_run(
        runs_dir, name, (0.7, 0.8), "finetune", 3, parent_run_id=parent, config=info or {"seed": 0}
    )
    save(writer.predictions("before"), predictions(set(range(60))))
    save(writer.predictions("after"), predictions(wrong))
    return writer.run_id


def test_runs_are_held_against_boundary_and_control(tmp_path: Path) -> None:
    parent = write_trunk(tmp_path)
    run = write_pair(tmp_path, parent, "good", set(range(20)))
    weak = write_pair(tmp_path, parent, "weak", set(range(1, 61)))
    alone = write_pair(tmp_path, parent, "other-seed", set(range(20)), seed=1)
    config = {"config": {"seed": 0}}
    control = write_run(tmp_path, "control", (0.7, 0.8), parent_run_id=parent, **config)
    save(control.predictions("after"), predictions(set(range(21))))
    snapshot = Library(tmp_path).snapshot()
    found = findings(snapshot, [parent, run, weak, alone])
    assert set(found) == {run, weak, alone}
    lines = evidence_lines(found)
    boundary, against = lines[run]
    assert boundary.startswith("Against its boundary: +20.0 points, 95% interval +14.5 to +25.5; ")
    assert boundary.endswith("fixed 40, broke 0: better, beyond chance (p < 0.001).")
    assert against.startswith("Against its control, the head alone: +0.5 points, ")
    assert against.endswith("fixed 1, broke 0: no evidence of a difference (p = 1).")
    assert "fixed 1, broke 1: no evidence" in lines[weak][0]
    assert len(lines[alone]) == 1
    assert control_of(snapshot.runs[alone], controls_by_parent(snapshot.runs.values())) is None


def test_the_newest_control_of_the_same_parent_and_settings_counts(tmp_path: Path) -> None:
    parent, other = write_trunk(tmp_path), write_trunk(tmp_path)
    run = write_pair(tmp_path, parent, "run", set(range(20)))

    def control(name: str, parent: str, seed: int = 0, done: bool = True) -> str:
        config = {"config": {"seed": seed}}
        return write_run(tmp_path, name, (0.7,), done=done, parent_run_id=parent, **config).run_id

    older, newer = control("older", parent), control("newer", parent)
    control("elsewhere", other)
    control("other-seed", parent, seed=1)
    control("unfinished", parent, done=False)
    snapshot = Library(tmp_path).snapshot()
    found = control_of(snapshot.runs[run], controls_by_parent(snapshot.runs.values()))
    assert found is not None
    assert found.run_id == newer != older


def test_predictions_are_read_again_only_where_they_have_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = write_trunk(tmp_path)
    one, two = (write_pair(tmp_path, parent, name, set(range(20))) for name in ("one", "two"))
    snapshot = Library(tmp_path).snapshot()
    first = findings(snapshot, [one, two])
    save(snapshot.runs[two].predictions("after"), predictions(set(range(30))))
    read: list[Path] = []

    def spy(path: Path) -> Predictions:
        read.append(path)
        return load_predictions(path)

    monkeypatch.setattr("explorer.evidence.load_predictions", spy)
    second = findings(snapshot, [one, two])
    assert {path.parts[-3] for path in read} == {two}
    assert second[one] == first[one]
    assert (first[two].boundary.fixed, second[two].boundary.fixed) == (40, 30)  # type: ignore[union-attr]


def test_without_predictions_nothing_is_said(tmp_path: Path) -> None:
    name = write_run(tmp_path, "bare", (0.7, 0.8), "finetune", 3, parent_run_id="none").run_id
    assert evidence_lines(findings(Library(tmp_path).snapshot(), [name])) == {name: []}


def test_a_loss_beyond_chance_is_worse() -> None:
    evidence = Evidence(photos=1000, fixed=3, broken=40, low=-0.05, high=-0.02, p=1e-9)
    assert "worse, beyond chance (p < 0.001)" in sentence(evidence, 1e-9)
