"""Archiving and deleting: nothing is lost that was not meant to be."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from explorer.annotations import Annotation, load_annotation, save_annotation
from explorer.data import Library
from explorer.manage import archive, bytes_on_disk, delete, left_without_parent
from tests.explorer_runs import write_finetune, write_run, write_trunk
from trainer.runlog import read_run


def test_archiving_keeps_what_was_noted(tmp_path: Path) -> None:
    run = read_run(tmp_path / write_trunk(tmp_path))
    save_annotation(run.path, Annotation("mine", "a note", ("tag",)))
    archive(run, True)
    assert load_annotation(run.path) == Annotation("mine", "a note", ("tag",), True)
    archive(run, False)
    assert not load_annotation(run.path).archived


def test_a_deleted_run_is_gone_and_the_others_stay(tmp_path: Path) -> None:
    first, second = write_trunk(tmp_path, "a"), write_trunk(tmp_path, "b")
    assert delete(tmp_path, [first]) == []
    assert [path.name for path in tmp_path.iterdir()] == [second]


def test_several_at_once_and_each_that_fails_is_told(tmp_path: Path) -> None:
    first, second = write_trunk(tmp_path, "a"), write_trunk(tmp_path, "b")
    [problem] = delete(tmp_path, [first, "20200101-000000-gone", second])
    assert "There is no run 20200101-000000-gone" in problem
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["..", ".", "", "../other", "/", "notes", ".hidden", "sub/20260101-000000-run"]
)
def test_only_runs_of_the_folder_itself_are_deleted(tmp_path: Path, name: str) -> None:
    runs = tmp_path / "runs"
    write_trunk(runs)
    write_trunk(tmp_path / "other")
    (runs / "notes").mkdir()
    (runs / "notes" / "thesis.txt").touch()
    shutil.copytree(runs / write_trunk(runs, "x"), runs / "sub" / "20260101-000000-run")
    before = sorted(tmp_path.rglob("*"))
    [problem] = delete(runs, [name])
    assert "There is no run" in problem
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_behind_a_link_is_touched(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    outside = tmp_path / "elsewhere" / write_trunk(tmp_path / "elsewhere")
    own = runs / write_trunk(runs)
    (own / "checkpoints" / "there").symlink_to(outside)
    linked = runs / "20260101-000000-linked"
    linked.symlink_to(outside)
    [problem] = delete(runs, [linked.name])
    assert f"{linked} is a link to {outside}" in problem
    assert linked.exists()
    assert delete(runs, [own.name]) == []
    assert not own.exists()
    assert read_run(outside).epochs


def test_the_runs_folder_may_be_a_link(tmp_path: Path) -> None:
    real = tmp_path / "real"
    name = write_trunk(real)
    (tmp_path / "runs").symlink_to(real)
    assert delete(tmp_path / "runs", [name]) == []
    assert list(real.iterdir()) == []


def test_a_run_that_is_being_written_stays(tmp_path: Path) -> None:
    writer = write_run(tmp_path, "busy", [0.5], done=False)
    [problem] = delete(tmp_path, [writer.run_id])
    assert "is being written: stop the training first" in problem
    assert [path.name for path in tmp_path.iterdir()] == [writer.run_id]
    writer.close("interrupted")
    assert delete(tmp_path, [writer.run_id]) == []


def test_a_killed_training_does_not_keep_its_run(tmp_path: Path) -> None:
    writer = write_run(tmp_path, "killed", [0.5], done=False)
    writer._metrics.close()  # as the end of its process does
    assert read_run(writer.path).status == "interrupted"
    assert delete(tmp_path, [writer.run_id]) == []


def test_a_crash_while_deleting_leaves_no_half_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, kept = write_trunk(tmp_path, "a"), write_trunk(tmp_path, "b")

    def fail(path: Path) -> None:
        (path / "run.json").unlink()
        raise PermissionError(13, "Permission denied", str(path / "checkpoints"))

    with monkeypatch.context() as broken:
        broken.setattr(shutil, "rmtree", fail)
        [problem] = delete(tmp_path, [name])
    assert "Permission denied" in problem
    assert str(tmp_path / ".deleted-") in problem
    snapshot = Library(tmp_path).snapshot()
    assert (list(snapshot.runs), snapshot.broken) == ([kept], {})
    delete(tmp_path, [])  # the next time, what was left behind goes too
    assert [path.name for path in tmp_path.iterdir()] == [kept]


def test_a_folder_that_cannot_be_changed_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = write_trunk(tmp_path)

    def refuse(path: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)  # tests may run as root, whom nothing stops
    assert delete(tmp_path, [name]) == [f"Cannot delete {tmp_path / name}: Permission denied."]
    assert read_run(tmp_path / name).epochs


def test_runs_that_start_from_a_deleted_one(tmp_path: Path) -> None:
    trunk = write_trunk(tmp_path)
    first, second = (write_finetune(tmp_path, trunk, n, [0.7]).run_id for n in ("a", "b"))
    snapshot = Library(tmp_path).snapshot()
    assert left_without_parent(snapshot, [trunk]) == [first, second]
    assert left_without_parent(snapshot, [trunk, second]) == [first]
    assert left_without_parent(snapshot, [first]) == []


def test_the_size_counts_files_and_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_bytes(b"x" * 100)
    (tmp_path / "run" / "checkpoints" / "a.pt").write_bytes(b"x" * 1000)
    (tmp_path / "big").write_bytes(b"x" * 10**6)
    (tmp_path / "run" / "link").symlink_to(tmp_path / "big")
    assert 1100 <= bytes_on_disk(tmp_path / "run") < 2000
    assert bytes_on_disk(tmp_path / "gone") == 0
