"""What the explorer says in plain words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from explorer.compare import group_table, summaries
from explorer.conclusions import best_by_chance, flags, headline, warning
from explorer.data import Library
from explorer.evidence import Findings
from tests.explorer_runs import write_finetune, write_trunk
from trainer.evidence import Evidence
from trainer.runlog import read_run


def flags_of(runs_dir: Path, *accuracies: float) -> str:
    writer = write_finetune(runs_dir, "gone", "run", accuracies)
    return " ".join(flags(read_run(writer.path)))


def test_a_drop_in_the_first_unfrozen_epoch_is_flagged(tmp_path: Path) -> None:
    assert "Dropped 10.0 points in the first unfrozen epoch" in flags_of(tmp_path, 0.7, 0.6, 0.72)
    assert "Dropped" not in flags_of(tmp_path, 0.7, 0.698, 0.72)


def test_the_best_epoch_at_the_edge_is_flagged(tmp_path: Path) -> None:
    assert "Best at the last epoch" in flags_of(tmp_path, 0.7, 0.71, 0.72, 0.73)
    assert "Best at the first epoch" in flags_of(tmp_path, 0.7, 0.73, 0.72, 0.71)
    assert flags_of(tmp_path, 0.7, 0.71, 0.73, 0.72) == ""


def test_a_widening_gap_is_flagged(tmp_path: Path) -> None:
    """Training accuracy rises by a point an epoch while validation accuracy stays."""
    writer = write_finetune(tmp_path, "gone", "run", [0.7] * 7)
    log = writer.path / "metrics.jsonl"
    lines = log.read_text().splitlines()
    for number, line in enumerate(lines):
        if '"phase_epoch": ' in line and '"train_acc": 0.75' in line:
            lines[number] = line.replace('"train_acc": 0.75', f'"train_acc": {0.75 + number / 100}')
    log.write_text("\n".join(lines) + "\n")
    said = " ".join(flags(read_run(writer.path)))
    assert "widened by 4.0 points" in said


def test_frozen_runs_have_no_flags(tmp_path: Path) -> None:
    assert flags(read_run(tmp_path / write_trunk(tmp_path))) == []


def evidence(fixed: int, broken: int, photos: int = 1000) -> Evidence:
    return Evidence(photos, fixed, broken, 0.0, 0.0, 1.0)


def test_the_best_of_one_is_even_odds() -> None:
    """One fair coin tossed 100 times: median 0, 95% below 8 heads too many, so 16 photos."""
    usual, rarely = best_by_chance([evidence(60, 40)])
    assert usual == pytest.approx(0, abs=0.002)
    assert rarely == pytest.approx(0.016, abs=0.002)


def test_the_best_of_many_looks_better_by_chance() -> None:
    usual, rarely = best_by_chance([evidence(60, 40)] * 40)
    expected = np.random.default_rng(1).binomial(100, 0.5, (20_000, 40)).max(1) * 2 - 100
    assert usual == pytest.approx(np.median(expected) / 1000, abs=0.002)
    assert rarely == pytest.approx(np.quantile(expected, 0.95) / 1000, abs=0.002)
    assert usual > 0.018


def test_a_warning_only_for_many() -> None:
    few = {str(n): Findings(evidence(5, 4), None) for n in range(4)}
    assert warning(few) == ""
    many = {str(n): Findings(evidence(5, 4), None) for n in range(8)}
    assert warning(many).startswith("The best of 8 runs looks good by chance")
    assert warning({str(n): Findings(None, None) for n in range(8)}) == ""


def test_the_headline_counts_what_is_beyond_chance(tmp_path: Path) -> None:
    trunk = write_trunk(tmp_path)
    ids = [
        write_finetune(tmp_path, trunk, n, [0.70, v]).run_id for n, v in (("a", 0.8), ("b", 0.6))
    ]
    snapshot = Library(tmp_path).snapshot()
    rows = summaries(snapshot, ids)
    assert headline(rows[:1], {}) == ""
    assert headline(rows, {}) == "Highest: +10.0 points for a."
    p = {ids[0]: 1e-6, ids[1]: 1e-6}
    found = {n: Findings(Evidence(200, 20, 0, 0.05, 0.15, p[n]), None) for n in ids}
    assert headline(rows, found).startswith(
        "Of 2 runs, unfreezing made 1 better and 1 worse beyond chance."
    )
    chance = {n: Findings(Evidence(200, 2, 1, 0, 0, 1.0), None) for n in ids}
    assert headline(rows, chance).startswith("None of 2 runs changed beyond chance")


def test_groups_have_a_mean_and_a_range(tmp_path: Path) -> None:
    trunk = write_trunk(tmp_path)
    ids = [
        write_finetune(tmp_path, trunk, n, [0.70, v]).run_id for n, v in (("a", 0.8), ("b", 0.6))
    ]
    rows = summaries(Library(tmp_path).snapshot(), ids)
    [one] = group_table(rows, dict.fromkeys(ids, "lr 1")).to_dict("records")
    assert one["Settings"] == "lr 1"
    assert one["Runs"] == 2
    assert [one[n] for n in ("Change", "Lowest change", "Highest change")] == pytest.approx(
        [0.0, -10.0, 10.0]
    )
