"""The range test: what it suggests, and that it leaves nothing behind but its numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from streamlit.testing.v1 import AppTest

from explorer.lr_charts import rate_curve, rate_tests, suggestion
from tests.conftest import TINY, Train
from tests.explorer_runs import write_trunk
from tests.test_resume import weights
from trainer.__main__ import main
from trainer.config import ConfigError
from trainer.lr_find import _until_diverged, rising, steep, valley
from trainer.lr_find_command import parse
from trainer.runlog import list_runs

RATES = rising(1e-6, 1.0, 61)  # ten to a factor of ten


def curve(start: float, low: float) -> list[float]:
    """Flat up to `start`, falling to `low`, then rising; rates as powers of ten."""
    powers = np.log10(RATES)
    return [
        float(3 - 2 * np.clip((p - start) / (low - start), 0, 1) + 4 * max(0, p - low))
        for p in powers
    ]


def test_rates_rise_by_the_same_factor() -> None:
    assert rising(1e-3, 1.0, 4) == pytest.approx((1e-3, 1e-2, 1e-1, 1.0))


def test_the_suggestions_are_where_the_loss_falls() -> None:
    losses = curve(-4, -2)
    losses[25] -= 0.05  # the one step that falls more than the others
    found = steep(RATES, losses)
    assert found == pytest.approx(RATES[24])
    middle = valley(RATES, losses)
    assert middle is not None
    assert 10**-3.4 <= middle <= 10**-2.6


def test_a_loss_that_never_falls_suggests_nothing() -> None:
    rising_loss = [1 + i / 10 for i in range(len(RATES))]
    assert steep(RATES, rising_loss) is None
    assert valley(RATES, rising_loss) is None
    assert steep(RATES[:6], curve(-4, -2)[:6]) is None


def test_a_valley_is_the_longest_fall_whatever_rises_in_between() -> None:
    """Against the definition: of all falling subsequences the longest."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        losses = rng.normal(size=len(RATES)).tolist()
        kept = losses[6:-5]
        best = [1] * len(kept)
        for i in range(len(kept)):
            best[i] = 1 + max((best[j] for j in range(i) if kept[j] > kept[i]), default=0)
        end, longest = best.index(max(best)), max(best)
        third = (longest - 1) / 3
        expected = RATES[6:-5][end - longest + 1 + int(third) + int(third / 2)]
        assert valley(RATES, losses) == pytest.approx(expected)


def test_it_stops_when_the_loss_diverges() -> None:
    seen: list[float] = []
    found = _until_diverged(RATES, iter([1.0, 1.0, 400.0, 1.0]), seen.append)
    assert (len(found.losses), found.diverged, seen) == (3, True, [1.0, 1.0, 400.0])
    past = 0.98
    expected = (1 - past) * (400 + past + past**2) / (1 - past**3)
    assert found.smoothed[-1] == pytest.approx(expected)
    found = _until_diverged(RATES, iter([1.0, math.nan, 1.0]), seen.append)
    assert (found.rates, found.losses, found.diverged) == (RATES[:1], (1.0,), True)
    assert _until_diverged(RATES, iter([math.inf]), seen.append).rates == ()


def test_a_finetune_is_tested_and_nothing_else_changes(
    train_awake: Train, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parent = train_awake("--phase", "transfer", "--epochs", "1", "--lr", "0.01")
    runs = parent.path.parent
    before = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}
    flags = ["lr-find", "--from", parent.run_id, "--runs-dir", str(runs), "--unfreeze", "20"]
    flags += ["--lr-max", "100", "--steps", "40", "--batch-size", "8", "--layer-decay", "0.5"]
    flags += ["--label-smoothing", "0.1", "--rotation", "0.05"]
    assert main(flags) == 0
    said = capsys.readouterr().out
    assert "Suggested: steepest fall --lr " in said
    (file,) = (runs / "lr-find").iterdir()
    assert file.name.endswith("-finetune-20.json")
    assert f"Written to {file}" in said
    found = json.loads(file.read_text())
    assert found["rates"] == pytest.approx(list(rising(1e-8, 100, 40))[: len(found["rates"])])
    assert len(found["rates"]) == len(found["losses"]) == len(found["smoothed"])
    assert found["parent_run_id"] == parent.run_id
    assert found["config"]["unfreeze"] == "20"
    assert 1e-8 < found["steep"] < 100
    after = {path: path.read_bytes() for path in runs.rglob("*") if path.is_file()}
    assert {path: after[path] for path in before} == before
    assert set(after) - set(before) == {file}
    assert [run.run_id for run in list_runs(runs)] == [parent.run_id]
    assert weights(parent, "last")
    assert main(flags) == 0
    _, again = sorted((runs / "lr-find").iterdir(), key=lambda path: path.stat().st_mtime)
    assert json.loads(again.read_text())["losses"] == found["losses"]


def test_a_head_is_tested_too(tmp_path: Path, photos: Path, awake: str) -> None:
    flags = ["lr-find", "--phase", "transfer", *TINY, "--weights", awake, "--data", str(photos)]
    assert main([*flags, "--runs-dir", str(tmp_path), "--steps", "30"]) == 0
    (file,) = (tmp_path / "lr-find").iterdir()
    assert json.loads(file.read_text())["model"]["arch"] == "mobilenet_v3_small"
    assert list_runs(tmp_path) == []


def test_without_a_run_to_start_from_it_says_what_to_do(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["lr-find", *TINY, "--data", str(photos), "--runs-dir", str(tmp_path)]
    assert main(flags) == 2
    assert "Train one with --phase transfer, or name a run with --from" in capsys.readouterr().err
    assert list_runs(tmp_path) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--lr 1e-3", "--lr: lr-find tries rates"),
        ("--gradual all@3", "leave --gradual away"),
        ("--schedule step", "leave --schedule away"),
        ("--lr-min 1 --lr-max 0.1", "--lr-min 1 --lr-max 0.1: must rise from above 0"),
        ("--lr-min 0", "must rise from above 0"),
        ("--steps 3", "--steps 3: must be 20 or more"),
        ("--phase direct", "trains nothing"),
        ("--phase transfer --layer-decay 0.5", "belongs to --phase finetune"),
    ],
)
def test_mistakes_name_the_flag(flags: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(flags.split())


# --- in the explorer ----------------------------------------------------------------------------


def write_test(runs_dir: Path, name: str = "20260101-120000-finetune-20", **change: object) -> None:
    losses = curve(-4, -2)
    content = {
        "config": {"phase": "finetune", "unfreeze": "20", "optimizer": "adam", "batch_size": 32},
        "model": {"arch": "efficientnet_b0"},
        "parent_run_id": "trunk",
        "rates": list(RATES),
        "losses": losses,
        "smoothed": losses,
        "diverged": False,
        "steep": 1e-3,
        "valley": 1.234e-3,
    }
    (runs_dir / "lr-find").mkdir(exist_ok=True)
    (runs_dir / "lr-find" / f"{name}.json").write_text(json.dumps(content | change))


@pytest.mark.parametrize(
    "change",
    [
        {"rates": None},
        {"rates": [1, 2]},
        {"rates": [], "losses": [], "smoothed": []},
        {"losses": ["x"] * len(RATES)},
        {"smoothed": [math.nan] * len(RATES)},
        {"rates": [0.0, *RATES[1:]]},
        {"steep": -1.0},
        {"config": 3},
        {"model": None},
    ],
)
def test_a_damaged_test_is_left_out(tmp_path: Path, change: dict[str, object]) -> None:
    write_test(tmp_path)
    write_test(tmp_path, "damaged", **change)
    (tmp_path / "lr-find" / "torn.json").write_text("{")
    assert list(rate_tests(tmp_path)) == ["20260101-120000-finetune-20"]
    assert rate_tests(tmp_path / "nowhere") == {}


def test_the_chart_has_a_rule_at_each_suggestion(tmp_path: Path) -> None:
    write_test(tmp_path)
    (test,) = rate_tests(tmp_path).values()
    assert suggestion(test) == "Suggested: steepest fall 1e-3, valley 1.2e-3."
    assert test.about == (
        "efficientnet_b0, finetune with 20 layers free, adam, batches of 32, from run trunk"
    )
    drawn = rate_curve(test).to_dict()
    rules = [layer for layer in drawn["layer"] if layer["mark"]["type"] == "rule"]
    places = [drawn["datasets"][layer["data"]["name"]][0]["rate"] for layer in rules]
    assert places == [1e-3, 1.234e-3]
    assert len({str(layer["mark"]["strokeDash"]) for layer in rules}) == 2
    write_test(tmp_path, steep=None, valley=None)
    (test,) = rate_tests(tmp_path).values()
    assert suggestion(test).startswith("The loss never fell")
    assert rate_curve(test).to_dict()


def test_the_sweep_page_shows_the_newest_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THAW_RUNS_DIR", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["streamlit_app.py"])
    write_trunk(tmp_path)

    def page() -> None:
        from explorer.pages import sweep

        sweep.page()

    app = AppTest.from_function(page, default_timeout=30).run()
    assert not app.exception
    assert not [head for head in app.subheader if head.value == "Learning-rate finder"]
    write_test(tmp_path)
    write_test(tmp_path, "20260102-120000-<b>", steep=1e-2, valley=None)
    app = AppTest.from_function(page, default_timeout=30).run()
    assert not app.exception
    assert app.selectbox(key="rates").value == "20260102-120000-<b>"
    assert any("Suggested: steepest fall 1e-2." in note.value for note in app.caption)
    app = AppTest.from_function(page, default_timeout=30)
    app.query_params["rates"] = "20260101-120000-finetune-20"
    app.run()
    assert any("valley 1.2e-3" in note.value for note in app.caption)
    assert not app.exception
