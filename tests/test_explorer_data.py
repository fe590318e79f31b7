"""The explorer's reading, lineages and numbers."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest

from explorer import data
from explorer.annotations import Annotation, save_annotation
from explorer.charts import long_frame
from explorer.compare import resolution, summaries, table, verdict
from explorer.data import Library, epochs_frame, lineage, runs_dir_from
from tests.explorer_runs import record, write_finetune, write_run, write_trunk
from trainer.evidence import points


def snapshot(runs_dir: Path) -> data.Snapshot:
    return Library(runs_dir).snapshot()


# --- where and what ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        ([], {}, "runs"),
        ([], {"THAW_RUNS_DIR": "/a"}, "/a"),
        (["--runs-dir", "/b"], {"THAW_RUNS_DIR": "/a"}, "/b"),
        (["--runs-dir=/b", "--unknown", "x"], {}, "/b"),
        (["--runs-dir"], {"THAW_RUNS_DIR": "/a"}, "/a"),
    ],
)
def test_runs_folder(arguments: list[str], environment: dict[str, str], expected: str) -> None:
    assert runs_dir_from(arguments, environment) == Path(expected)


def test_no_folder_is_an_empty_snapshot(tmp_path: Path) -> None:
    assert snapshot(tmp_path / "none").runs == {}


# --- reading ----------------------------------------------------------------------------------


def test_only_changed_runs_are_read_again(tmp_path: Path) -> None:
    parent = write_trunk(tmp_path)
    live = write_finetune(tmp_path, parent, "live", [0.70], done=False)
    library = Library(tmp_path)
    first = library.snapshot()
    live.epoch(record("finetune", 4, 1, 0.72))
    second = library.snapshot()
    assert len(second.runs[live.run_id].epochs) == 2
    assert second.runs[parent] is first.runs[parent]
    assert second.runs[live.run_id].epochs[0] is first.runs[live.run_id].epochs[0]
    live.close("done")
    assert not library.snapshot().running
    shutil.rmtree(live.path)
    assert list(library.snapshot().runs) == [parent]


def test_a_name_that_a_user_gives_is_seen(tmp_path: Path) -> None:
    run = write_trunk(tmp_path)
    library = Library(tmp_path)
    assert library.snapshot().labels[run] == "trunk"
    save_annotation(tmp_path / run, Annotation(name="The first"))
    assert library.snapshot().labels[run] == "The first"
    (tmp_path / run / "annotations.json").unlink()
    assert library.snapshot().labels[run] == "trunk"


def test_broken_runs_do_not_hide_the_others(tmp_path: Path) -> None:
    good = write_trunk(tmp_path)
    torn = write_run(tmp_path, "torn", [0.1, 0.2])
    with (torn.path / "metrics.jsonl").open("a") as file:
        file.write('nonsense\n{"event": "epoch", "pha')
    newer = write_run(tmp_path, "newer", [0.1])
    info = json.loads((newer.path / "run.json").read_text()) | {"schema_version": 99}
    (newer.path / "run.json").write_text(json.dumps(info))
    (tmp_path / "empty").mkdir()
    found = snapshot(tmp_path)
    assert list(found.runs) == [good, torn.run_id]
    assert len(found.runs[torn.run_id].epochs) == 2
    assert "unreadable lines [5]" in (found.runs[torn.run_id].problem or "")
    assert "newer Thaw" in found.broken[newer.run_id]


def test_labels_are_short_until_they_would_be_the_same(tmp_path: Path) -> None:
    one, two = write_trunk(tmp_path, "same"), write_trunk(tmp_path, "same")
    other = write_trunk(tmp_path, "other")
    labels = snapshot(tmp_path).labels
    assert labels[other] == "other"
    assert {labels[one], labels[two]} in ({one, two}, {"same", "same-2"})
    assert len(set(labels.values())) == 3


def test_default_is_the_newest_family(tmp_path: Path) -> None:
    assert snapshot(tmp_path).default_selection() == []
    first = write_trunk(tmp_path, "first")
    assert snapshot(tmp_path).default_selection() == [first]
    write_finetune(tmp_path, first, "old", [0.7, 0.71])
    second = write_trunk(tmp_path, "second")
    new = [write_finetune(tmp_path, second, f"new{i}", [0.7]).run_id for i in range(14)]
    assert snapshot(tmp_path).default_selection() == new[-12:]


# --- lineages ---------------------------------------------------------------------------------


def test_a_shared_trunk_is_drawn_once_and_first(tmp_path: Path) -> None:
    parent = write_trunk(tmp_path)
    children = [write_finetune(tmp_path, parent, n, [0.70, 0.72]).run_id for n in "ab"]
    for selected in (children, [*children, parent]):
        curves, missing = lineage(snapshot(tmp_path), selected)
        assert [(curve.run.run_id, curve.role) for curve in curves] == [
            (parent, "trunk"),
            (children[0], "run"),
            (children[1], "run"),
        ]
        assert missing == []


def test_the_last_frozen_evaluation_is_point_zero(tmp_path: Path) -> None:
    parent = write_trunk(tmp_path)
    child = write_finetune(tmp_path, parent, "child", [0.70, 0.72]).run_id
    found = snapshot(tmp_path)
    frame = epochs_frame(found, lineage(found, [child])[0])
    by_run = frame.groupby("run_id")["since_unfreeze"].apply(list)
    assert by_run[parent] == [-3, -2, -1, 0]
    assert by_run[child] == [0, 1]
    assert frame["train_acc"].isna().sum() == 2  # one epoch 0 for each phase


def test_a_control_starts_where_its_siblings_were_unfrozen(tmp_path: Path) -> None:
    parent = write_trunk(tmp_path)
    child = write_finetune(tmp_path, parent, "child", [0.70, 0.72]).run_id
    control = write_run(
        tmp_path, "control", [0.70, 0.71, 0.705], "transfer", 3, parent_run_id=parent
    ).run_id
    found = snapshot(tmp_path)
    assert found.default_selection() == [child, control]
    curves, _ = lineage(found, [child, control])
    assert [(curve.run.run_id, curve.role) for curve in curves] == [
        (parent, "trunk"),
        (child, "run"),
        (control, "run"),
    ]
    frame = epochs_frame(found, curves)
    assert frame[frame["run_id"] == control]["since_unfreeze"].tolist() == [0, 1, 2]
    points = long_frame(frame, "accuracy", "since", ["Validation"])
    marks = points[points["run"] == "control"]["mark"].tolist()
    assert marks == ["start", "best", ""]
    [row] = summaries(found, [control])
    said = "+1.0 points at epoch 1 of 2 with the head alone (control) (70.0% → 71.0%)."
    assert verdict(row).replace("\u00a0", " ") == said


def test_frozen_runs_end_at_zero_and_scratch_has_no_place(tmp_path: Path) -> None:
    frozen = write_trunk(tmp_path)
    scratch = write_run(tmp_path, "scratch", [0.1, 0.2], "scratch").run_id
    found = snapshot(tmp_path)
    frame = epochs_frame(found, lineage(found, [frozen, scratch])[0])
    by_run = frame.groupby("run_id")["since_unfreeze"].apply(list)
    assert by_run[frozen] == [-3, -2, -1, 0]
    assert frame[frame["run_id"] == scratch]["since_unfreeze"].isna().all()


def test_a_finetune_without_its_parent_is_drawn_alone_and_says_so(tmp_path: Path) -> None:
    parent = write_trunk(tmp_path)
    child = write_finetune(tmp_path, parent, "child", [0.70, 0.72]).run_id
    (tmp_path / parent / "run.json").write_text("{")
    curves, missing = lineage(snapshot(tmp_path), [child])
    assert [curve.run.run_id for curve in curves] == [child]
    assert "cannot be read" in missing[0]
    shutil.rmtree(tmp_path / parent)
    assert "not in this folder" in lineage(snapshot(tmp_path), [child])[1][0]


def test_a_run_that_names_itself_its_parent_ends(tmp_path: Path) -> None:
    run = write_run(tmp_path, "loop", [0.7, 0.8], "finetune", 3)
    run.update(parent_run_id=run.run_id)
    curves, _ = lineage(snapshot(tmp_path), [run.run_id])
    assert [curve.run.run_id for curve in curves] == [run.run_id]


def test_an_unknown_selection_and_an_empty_run_draw_nothing(tmp_path: Path) -> None:
    empty = write_run(tmp_path, "empty", [], done=False)
    found = snapshot(tmp_path)
    curves, _ = lineage(found, ["gone", empty.run_id])
    assert epochs_frame(found, curves).empty


# --- numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accuracies", "done", "expected"),
    [
        ([0.7, 0.71, 0.74, 0.73], True, "+4.0 points at epoch 2 of 3 {} (70.0% → 74.0%)."),
        ([0.7, 0.7004], True, "+0.04 points at epoch 1 of 1 {} (70.00% → 70.04%)."),
        ([0.7, 0.69, 0.6], True, "−1.0 points even at its best, epoch 1 of 2 {} (70.0% → 69.0%)."),
        ([0.7, 0.6, 0.7], True, "No gain: epoch 2 of 2 {} only equals the boundary, 70.0%."),
        ([0.7, 0.8], False, "+10.0 points at epoch 1 of 1 {} (70.0% → 80.0%), so far."),
        ([0.7], False, "No epoch {} yet (still running); it starts from 70.0%."),
    ],
)
def test_verdicts(tmp_path: Path, accuracies: list[float], done: bool, expected: str) -> None:
    run = write_finetune(tmp_path, "gone", "run", accuracies, done)
    [row] = summaries(snapshot(tmp_path), [run.run_id])
    assert verdict(row).replace("\u00a0", " ") == expected.format("after unfreezing")


def test_the_best_epoch_is_one_that_trained(tmp_path: Path) -> None:
    run = write_finetune(tmp_path, "gone", "worse", [0.9, 0.5, 0.8, 0.8])
    [row] = summaries(snapshot(tmp_path), [run.run_id])
    assert (row.best_acc, row.best_epoch, row.best_phase_epoch) == (0.8, 5, 2)
    assert row.boundary_acc == 0.9
    assert row.change == pytest.approx(-0.1)
    assert row.best_loss == pytest.approx(0.2)
    assert row.seconds == 8.0


def test_of_equally_accurate_epochs_the_one_with_the_kept_checkpoint_is_best(
    tmp_path: Path,
) -> None:
    writer = write_finetune(tmp_path, "gone", "tie", [0.7, 0.8], done=False)
    better = dataclasses.replace(record("finetune", 5, 2, 0.8), val_loss=0.1)
    writer.epoch(better)
    writer.close("done")
    found = snapshot(tmp_path)
    [row] = summaries(found, [writer.run_id])
    assert row.best_epoch == 5
    curves, _ = lineage(found, [writer.run_id])
    rows = long_frame(epochs_frame(found, curves), "accuracy", "total", ["Validation"])
    assert rows[rows["mark"] == "best"]["epoch"].tolist() == [5]


def test_a_direct_run_has_its_one_evaluation(tmp_path: Path) -> None:
    run = write_run(tmp_path, "direct", [0.4], "direct")
    [row] = summaries(snapshot(tmp_path), [run.run_id])
    assert (row.best_acc, row.best_epoch, row.change, verdict(row)) == (0.4, 0, None, "")


def test_table_holds_one_row_per_run_also_without_epochs(tmp_path: Path) -> None:
    parent = write_trunk(tmp_path)
    ids = [
        parent,
        write_finetune(tmp_path, parent, "child", [0.70, 0.75]).run_id,
        write_run(tmp_path, "empty", [], done=False).run_id,
    ]
    numbers = table(summaries(snapshot(tmp_path), ids)).set_index("Run")
    assert numbers.loc["child", "Change"] == pytest.approx(5.0)
    assert numbers.loc["trunk", "Best accuracy"] == pytest.approx(70.0)
    assert numbers.loc["empty"].isna().sum() == 6
    assert table([]).empty


@pytest.mark.parametrize(
    ("fraction", "text"),
    [(0.004, "+0.4"), (-0.0123, "−1.2"), (0.0, "0.0"), (0.0008, "+0.08"), (-1e-9, "0.0")],
)
def test_points(fraction: float, text: str) -> None:
    assert points(fraction) == text


def test_what_one_photo_weighs(tmp_path: Path) -> None:
    run = write_trunk(tmp_path)
    [row] = summaries(snapshot(tmp_path), [run])
    assert resolution([row, row]) == "200 validation photos, so one photo is 0.5 points."
    other = write_run(tmp_path, "other", [0.5], dataset={"counts": {"val": 10}}).run_id
    assert "different numbers" in resolution(summaries(snapshot(tmp_path), [run, other]))
    bare = write_run(tmp_path, "bare", [0.5], dataset={"counts": "many"}).run_id
    assert resolution(summaries(snapshot(tmp_path), [bare])) == ""


def test_a_file_of_the_same_size_but_another_time_is_read_again(tmp_path: Path) -> None:
    run = write_run(tmp_path, "run", [0.5])
    library = Library(tmp_path)
    library.snapshot()
    metrics = run.path / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"val_acc": 0.5', '"val_acc": 0.6'))
    os.utime(metrics, ns=(1, 1))
    assert library.snapshot().runs[run.run_id].epochs[0].val_acc == 0.6
