"""Sweeps in the explorer: which runs belong together, what they show, and the page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import bootstrap, permutation_test
from streamlit.testing.v1 import AppTest

from explorer.annotations import Annotation, save_annotation
from explorer.data import Library, Snapshot
from explorer.pooled import pooled, sign_flip
from explorer.sweep import measure, section
from explorer.sweep_charts import CELL, heatmap, limit, parallel, schedule_curves, schedule_dots
from explorer.sweep_members import groups, rate_text
from tests.explorer_runs import record, write_run, write_trunk
from tests.test_evidence import PHOTOS, predictions, save
from trainer.config import Config
from trainer.evidence import compare, holm, load_predictions
from trainer.grid import Plan, plan
from trainer.loop import diverged
from trainer.ranking import standings
from trainer.recipe import parse
from trainer.run_writer import RunWriter
from trainer.runlog import Run, read_run
from trainer.schema import PhaseRecord

Results = Callable[[Config], "float | str"]

BEFORE = set(range(60))  # what is wrong at the boundary: 70% of 200 photos are right
GRID = ["--lr", "1e-5", "1e-4", "1e-3", "--unfreeze", "10", "20", "--seed", "0", "1"]


def write_member(config: Config, result: float | str, parent: str | None, **info: Any) -> Run:
    """A run of two epochs whose best has this accuracy; a text is the reason of a failure."""
    info |= {"config": config.to_dict(), "parent_run_id": parent}
    info |= {"dataset": {"name": "flowers", "fingerprint": "f", "counts": {"val": PHOTOS}}}
    writer = RunWriter.create(config.runs_dir, config.run_name or "run", info)
    freed = 1000 if config.unfreeze == "all" else len(config.unfreeze)
    writer.start_phase(PhaseRecord(config.phase, 3, None, ("head",), freed))
    known = result if isinstance(result, float) else 0.5
    for phase_epoch, accuracy in enumerate([0.7, known - 0.1, known]):
        writer.epoch(record(config.phase, 3 + phase_epoch, phase_epoch, accuracy))
    save(writer.predictions("before"), predictions(BEFORE))
    save(writer.predictions("after"), predictions(set(range(round(PHOTOS * (1 - known))))))
    if isinstance(result, str):
        writer.close("failed", result)
    else:
        writer.close("done")
    return read_run(writer.path)


def write_sweep(
    runs_dir: Path, results: Results, *flags: str, trunk: str | None = None
) -> tuple[Plan, dict[int, Run]]:
    """A sweep of finetunes from a new trunk, with its controls, as the trainer plans it."""
    parent = trunk or write_trunk(runs_dir)
    request = parse([*flags, "--data", "photos", "--runs-dir", str(runs_dir)])
    whole = plan(request, read_run(runs_dir / parent))
    runs = {
        index: write_member(config, results(config), parent, sweep=whole.info.entry(index))
        for index, config in enumerate(whole.configs)
    }
    return whole, runs


def growing(config: Config) -> float:
    """The larger rate and the more layers, the better; the control gains two points."""
    if config.phase == "transfer":
        return 0.72
    better = {1e-5: 0.0, 1e-4: 0.05, 1e-3: 0.10}[config.learning_rate]
    return 0.7 + better + (0.02 if config.unfreeze == "20" else 0.0) + 0.01 * config.seed


def snapshot(runs_dir: Path) -> Snapshot:
    return Library(runs_dir).snapshot()


# --- evidence over several runs ---------------------------------------------------------------


def pair(folder: Path, number: int, before: set[int], after: set[int]) -> tuple[Path, Path]:
    paths = folder / f"{number}-before.npz", folder / f"{number}-after.npz"
    save(paths[0], predictions(before))
    save(paths[1], predictions(after, reverse=True))
    return paths


def test_one_pair_is_compared_as_everywhere(tmp_path: Path) -> None:
    one = pooled([pair(tmp_path, 1, BEFORE, set(range(20, 75)))])
    known = compare(predictions(BEFORE), predictions(set(range(20, 75))))
    assert one is not None
    assert (one.photos, one.fixed, one.broken) == (known.photos, known.fixed, known.broken)
    assert (one.low, one.high, one.p) == pytest.approx((known.low, known.high, known.p))


def test_the_interval_of_several_runs_is_a_bootstrap_over_photos(tmp_path: Path) -> None:
    wrong = [set(range(20, 75)), set(range(10, 70))]
    found = pooled([pair(tmp_path, n, BEFORE, after) for n, after in enumerate(wrong)])
    assert found is not None
    photos = range(PHOTOS)
    means = [sum((p in BEFORE) - (p in after) for after in wrong) / 2 for p in photos]
    assert found.change == pytest.approx(np.mean(means))
    drawn = bootstrap((means,), np.mean, method="percentile", rng=np.random.default_rng(0))
    interval = drawn.confidence_interval
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=0.005)
    assert (found.fixed, found.broken) == (30, 25)


@pytest.mark.parametrize("differences", [[2, 2, 1, -1, 1, 2, 0, -2, 1, 1, 2], [1, -1], [3, 1, 1]])
def test_the_p_is_that_of_all_sign_flips(differences: list[int]) -> None:
    exact = permutation_test((differences,), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip(np.array(differences)) == pytest.approx(exact.pvalue)


def test_without_comparable_predictions_there_is_no_evidence(tmp_path: Path) -> None:
    good = pair(tmp_path, 1, BEFORE, set())
    assert pooled([]) is None
    assert pooled([good, (tmp_path / "none.npz", good[1])]) is None
    save(tmp_path / "other.npz", predictions(set(), photos=100))
    assert pooled([good, (good[0], tmp_path / "other.npz")]) is None
    (tmp_path / "bad.npz").write_bytes(b"garbage")
    assert pooled([(good[0], tmp_path / "bad.npz")]) is None


# --- groups -----------------------------------------------------------------------------------


def test_a_sweep_and_all_finetunes_of_its_trunk_are_groups(tmp_path: Path) -> None:
    whole, _ = write_sweep(tmp_path, growing, *GRID)
    sweep, trunk = groups(snapshot(tmp_path))
    assert (sweep.id, sweep.missing) == (whole.id, 0)
    assert sweep.title.startswith(f"{whole.name}, 20")
    assert trunk.title == "All finetunes of trunk, 12 runs"
    assert sweep.members == trunk.members
    assert not any("control" in name for name in sweep.members)


def test_a_widened_sweep_is_found_whole_under_its_trunk(tmp_path: Path) -> None:
    trunk = write_trunk(tmp_path)
    write_sweep(tmp_path, growing, "--lr", "1e-5", "1e-4", trunk=trunk)
    request = ["--lr", "1e-5", "1e-4", "1e-3", "--data", "photos", "--runs-dir", str(tmp_path)]
    whole = plan(parse(request), read_run(tmp_path / trunk))
    config = whole.configs[2]
    write_member(config, 0.8, trunk, sweep=whole.info.entry(2))  # the others are there already
    first, second = groups(snapshot(tmp_path))
    assert first.title == "All finetunes of trunk, 3 runs"
    assert len(second.members) == 2


def test_runs_that_cannot_be_compared_are_no_group(tmp_path: Path) -> None:
    trunk = write_trunk(tmp_path)
    config = Config("finetune", runs_dir=tmp_path)
    write_member(config, 0.8, trunk)
    assert groups(snapshot(tmp_path)) == []
    other = write_member(config, 0.8, trunk)
    found = groups(snapshot(tmp_path))
    assert [len(group.members) for group in found] == [2]
    save_annotation(other.path, Annotation(archived=True))
    assert groups(snapshot(tmp_path)) == []


@pytest.mark.parametrize("entry", ["text", 3, {"id": None}, {"id": "x", "of": "many"}, {"name": 1}])
def test_damaged_sweep_entries_are_no_error(tmp_path: Path, entry: object) -> None:
    trunk = write_trunk(tmp_path)
    for seed in (0, 1):
        config = Config("finetune", runs_dir=tmp_path, seed=seed)
        write_member(config, 0.8, trunk, sweep=entry)
    found = groups(snapshot(tmp_path))
    assert all(len(group.members) == 2 for group in found)
    assert section(snapshot(tmp_path), found[0].members).headline


# --- numbers ----------------------------------------------------------------------------------


def test_cells_are_means_over_their_runs(tmp_path: Path) -> None:
    write_sweep(tmp_path, growing, *GRID)
    found = snapshot(tmp_path)
    shown = section(found, groups(found)[0].members)
    assert (shown.against, shown.row) == ("boundary", "Layers")
    cells = shown.cells.set_index("cell")
    assert list(shown.cells["rate"].unique()) == ["1e-5", "1e-4", "1e-3"]
    best = cells.loc["lr 1e-3, 20 layers"]
    assert best["value"] == pytest.approx(12.5)  # seeds 0 and 1: +12 and +13
    assert (best["text"], best["runs"], best["range"]) == ("+12.5*", 2, "+12.0 to +13.0")
    assert cells.loc["lr 1e-5, 10 layers", "text"] == "+0.5"
    against = section(found, groups(found)[0].members, "control").cells.set_index("cell")
    assert against.loc["lr 1e-3, 20 layers", "value"] == pytest.approx(10.5)
    assert against.loc["lr 1e-5, 10 layers", "value"] == pytest.approx(-1.5)


def test_the_p_of_cells_is_adjusted_for_their_number(tmp_path: Path) -> None:
    _, runs = write_sweep(tmp_path, growing, *GRID)
    found = snapshot(tmp_path)
    shown = section(found, groups(found)[0].members)
    single = []
    for names in shown.cells["run_ids"]:
        paths = [tmp_path / name / "predictions" for name in names]
        evidence = pooled([(path / "before.npz", path / "after.npz") for path in paths])
        assert evidence is not None
        single.append(evidence.p)
    expected = ["< 0.001" if p < 0.001 else f"{p:.2g}" for p in holm(single)]
    assert list(shown.cells["p"]) == expected
    assert len(runs) == 14


def test_each_schedule_or_seed_can_have_a_map_of_its_own(tmp_path: Path) -> None:
    write_sweep(tmp_path, growing, *GRID, "--schedule", "constant", "cosine")
    found = snapshot(tmp_path)
    members = groups(found)[0].members
    schedules = section(found, members, split="Schedule").cells
    assert list(schedules["map"].unique()) == ["constant", "cosine"]
    assert "lr 1e-3, 20 layers, cosine" in set(schedules["cell"])
    assert set(schedules["runs"]) == {2}
    seeds = section(found, members, split="Seed").cells
    assert list(seeds["map"].unique()) == ["seed 0", "seed 1"]


def test_layers_are_in_the_order_of_what_they_free(tmp_path: Path) -> None:
    flags = ["--unfreeze", "all", "20", "features.7", "100", "--lr", "1e-5"]
    write_sweep(tmp_path, lambda config: 0.7, *flags)
    found = snapshot(tmp_path)
    cells = section(found, groups(found)[0].members).cells
    # The stand-ins free one parameter for each letter: "20" < "100" < "features.7" < "all".
    assert list(cells.sort_values("y")["row"]) == ["20", "100", "features.7", "all"]


def test_what_failed_is_a_word_and_no_number(tmp_path: Path) -> None:
    def results(config: Config) -> float | str:
        if config.lr == 1e-3 and config.unfreeze == "20":
            return str(diverged(float("nan"), "epoch 1"))
        if config.lr == 1e-4 and config.seed == 1:
            return "CUDA out of memory"
        return growing(config)

    write_sweep(tmp_path, results, *GRID)
    found = snapshot(tmp_path)
    shown = section(found, groups(found)[0].members)
    cells = shown.cells.set_index("cell")
    assert cells.loc["lr 1e-3, 20 layers", "state"] == "diverged"
    assert np.isnan(cells.loc["lr 1e-3, 20 layers", "value"])
    assert cells.loc["lr 1e-4, 10 layers", "state"] == "1 of 2 failed"
    assert cells.loc["lr 1e-4, 10 layers", "text"] == "+5.0*"
    done = shown.ranking.set_index("Setting")["Done"]
    assert done["lr 1e-4, 10 layers"] == "1 of 2"
    assert "lr 1e-3, 20 layers" not in done


def test_what_still_runs_counts_so_far_but_is_not_ranked(tmp_path: Path) -> None:
    trunk = write_trunk(tmp_path)
    for rate in (1e-5, 1e-4):
        write_member(Config("finetune", runs_dir=tmp_path, lr=rate), 0.9, trunk)
    info = {"config": Config("finetune", lr=1e-3).to_dict(), "parent_run_id": trunk}
    info["dataset"] = {"fingerprint": "f"}
    write_run(tmp_path, "running", [0.7, 0.8], "finetune", 3, done=False, **info)
    found = snapshot(tmp_path)
    shown = section(found, groups(found)[0].members)
    cell = shown.cells.set_index("rate").loc["1e-3"]
    assert (cell["text"], cell["state"], cell["p"]) == ("+10.0", "running", "")
    assert len(shown.ranking) == 2


def test_the_ranking_is_that_of_the_trainer(tmp_path: Path) -> None:
    def results(config: Config) -> float:
        known = {1e-5: 0.74, 1e-4: 0.78, 1e-3: 0.61}[config.learning_rate]
        return 0.76 if config.phase == "transfer" else known - 0.005 * config.seed

    whole, runs = write_sweep(tmp_path, results, "--lr", "1e-5", "1e-4", "1e-3", "--seed", "0", "1")
    found = snapshot(tmp_path)
    shown = section(found, groups(found)[0].members, "control").ranking
    expected = standings(whole, runs)
    assert len(shown) == len(expected) == 4
    for (_, row), standing in zip(shown.iterrows(), expected, strict=True):
        assert row["Best accuracy"] == pytest.approx(100 * standing.rank[0])
        assert row["Spread"] == pytest.approx(standing.spread)
        assert ("control" in row["Setting"]) == standing.control
        if not standing.control:
            assert row["Change"] == pytest.approx(np.mean(standing.over_control))


def test_settings_are_told_apart_by_what_their_schedule_uses(tmp_path: Path) -> None:
    flags = ["--schedule", "exponential", "step", "--decay", "0.1", "0.3", "--lr", "1e-5"]
    write_sweep(tmp_path, growing, *flags)
    found = snapshot(tmp_path)
    shown = section(found, groups(found)[0].members)
    names = ["exponential, decay 0.1", "exponential, decay 0.3", "step"]
    assert list(shown.schedule_means["schedule"]) == names
    assert sorted(shown.ranking["Setting"]) == ["control: the head alone", *names]
    assert shown.balanced


def test_schedules_tried_with_different_settings_are_said(tmp_path: Path) -> None:
    trunk = write_trunk(tmp_path)
    for name, rate in (("constant", "1e-5"), ("cosine", "1e-4")):
        write_sweep(tmp_path, growing, "--schedule", name, "--lr", rate, trunk=trunk)
    found = snapshot(tmp_path)
    assert not section(found, groups(found)[0].members).balanced


def test_curves_are_means_over_the_runs_of_a_schedule(tmp_path: Path) -> None:
    write_sweep(tmp_path, growing, *GRID)
    found = snapshot(tmp_path)
    curves = section(found, groups(found)[0].members).curves
    assert list(curves["epoch"]) == [0, 1, 2]
    assert curves["accuracy"].tolist() == pytest.approx([0.7, 0.665, 0.765])
    assert set(curves["runs"]) == {12}


def test_lines_cross_the_settings_that_vary_and_end_in_the_result(tmp_path: Path) -> None:
    write_sweep(tmp_path, growing, *GRID)
    found = snapshot(tmp_path)
    lines = section(found, groups(found)[0].members).lines
    axes = ["Learning rate", "Layers", "Seed", "Change against the boundary (points)"]
    assert list(lines["axis"].unique()) == axes
    assert lines.groupby("run_id").size().eq(4).all()
    assert lines["place"].between(0, 1).all()
    rates = lines[lines["number"] == 0].groupby("tick")["place"]
    assert rates.max()["1e-5"] < rates.min()["1e-4"] < rates.max()["1e-4"] < rates.min()["1e-3"]
    last = lines[lines["number"] == 3]
    assert last.loc[last["place"].idxmax(), "value"] == pytest.approx(13)


@pytest.mark.parametrize(
    ("rate", "text"), [(1e-4, "1e-4"), (0.001, "1e-3"), (2.5e-5, "2.5e-5"), (1.0, "1e+0")]
)
def test_rates_are_short_and_exact(rate: float, text: str) -> None:
    assert rate_text(rate) == text
    assert float(text) == rate


# --- in words ---------------------------------------------------------------------------------


def said(runs_dir: Path, **choice: Any) -> tuple[str, str]:
    found = snapshot(runs_dir)
    shown = section(found, groups(found)[0].members, **choice)
    return shown.headline.replace("\N{WORD JOINER}", ""), " ".join(shown.details)


def test_a_best_beyond_chance_is_said(tmp_path: Path) -> None:
    write_sweep(tmp_path, growing, *GRID)
    headline, details = said(tmp_path)
    assert headline == (
        "lr 1e-3, 20 layers (+12.5 points) is better than the boundary beyond chance, even as the "
        "best of 6."
    )
    assert "Against the boundary, over 2 runs: +12.5 points, 95% interval" in details
    assert "Against its control, the head alone, over 2 runs: +10.5 points" in details


def test_the_best_of_many_looks_good_by_chance(tmp_path: Path) -> None:
    write_sweep(tmp_path, lambda config: 0.72 if config.lr == 1e-3 else 0.7, *GRID)
    headline, _ = said(tmp_path)
    assert headline.startswith("The best of 6 looks good by chance: lr 1e-3, 10 layers (+2.0 ")
    assert headline.endswith("there is no evidence that it is better than the boundary.")
    assert said(tmp_path, against="control")[0].startswith("The best of 6 looks good by chance")


def test_no_gain_is_said(tmp_path: Path) -> None:
    write_sweep(tmp_path, lambda config: 0.7, *GRID)
    assert said(tmp_path)[0].startswith("None of 6 settings is better than the boundary: the best ")


def test_without_predictions_or_control_that_is_said(tmp_path: Path) -> None:
    trunk = write_trunk(tmp_path)
    for rate in (1e-5, 1e-4):
        config = Config("finetune", runs_dir=tmp_path, lr=rate)
        run = write_member(config, growing(config), trunk)
        run.predictions("after").unlink()
    headline, details = said(tmp_path)
    assert headline.startswith("Best of 2: lr 1e-4 (+7.0 points). Without the predictions")
    assert "It has no control" in details


def test_nothing_done_is_nothing_to_rank(tmp_path: Path) -> None:
    write_sweep(tmp_path, lambda config: "no space left", *GRID)
    found = snapshot(tmp_path)
    shown = section(found, groups(found)[0].members)
    assert shown.headline == "No run of this group is done: there is nothing to rank yet."
    assert shown.ranking.empty
    assert shown.lines.empty
    assert set(shown.cells["state"]) == {"failed"}


def write_transfers(runs_dir: Path, results: Results) -> None:
    flags = ["--phase", "transfer", "--lr", "1e-4", "1e-3", "1e-2", "--seed", "0", "1"]
    whole = plan(parse([*flags, "--data", "photos", "--runs-dir", str(runs_dir)]), None)
    for index, config in enumerate(whole.configs):
        write_member(config, results(config), None, sweep=whole.info.entry(index))


def growing_head(config: Config) -> float:
    return {1e-4: 0.6, 1e-3: 0.9, 1e-2: 0.7}[config.learning_rate]


def test_a_transfer_sweep_ranks_by_accuracy(tmp_path: Path) -> None:
    write_transfers(
        tmp_path, lambda config: {1e-4: 0.6, 1e-3: 0.9, 1e-2: 0.7}[config.learning_rate]
    )
    found = snapshot(tmp_path)
    [group] = groups(found)
    shown = section(found, group.members)
    assert (shown.against, shown.row) == (None, "")
    assert list(shown.cells["text"]) == ["60.0%", "90.0%", "70.0%"]
    assert shown.ranking["Setting"].tolist() == ["lr 1e-3", "lr 1e-2", "lr 1e-4"]
    assert shown.ranking["Change"].isna().all()
    assert said(tmp_path) == (
        "Best of 3: lr 1e-3 with 90.0%, 20.0 points above the next: better beyond chance "
        "(p < 0.001).",
        "",
    )


def test_the_best_of_a_transfer_sweep_may_be_chance(tmp_path: Path) -> None:
    write_transfers(tmp_path, lambda config: 0.71 if config.learning_rate == 1e-3 else 0.7)
    assert said(tmp_path)[0].endswith(
        "no evidence of a difference (p = 1). The best of 3 looks good by chance."
    )


def test_predictions_of_many_runs_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--lr", *(f"{n}e-5" for n in range(1, 26)), "--unfreeze", "10", "20", "--seed", "0"]
    results = {"10": 0.72, "20": 0.75}
    write_sweep(tmp_path, lambda config: results[config.unfreeze], *flags, "1", "2", "3")
    found = snapshot(tmp_path)
    members = groups(found)[0].members
    assert len(members) == 200
    read: list[Path] = []

    def counted(path: Path) -> Any:
        read.append(path)
        return load_predictions(path)

    for module in ("evidence", "pooled"):
        monkeypatch.setattr(f"explorer.{module}.load_predictions", counted)
    section(found, members)
    assert read
    read.clear()
    section(found, members)
    assert read == []


# --- charts -----------------------------------------------------------------------------------


def test_the_heatmap_has_zero_in_the_middle_of_its_colours(tmp_path: Path) -> None:
    write_sweep(tmp_path, growing, *GRID)
    found = snapshot(tmp_path)
    shown = section(found, groups(found)[0].members)
    drawn = heatmap(shown.cells, measure(shown.against), shown.row, chosen="lr 1e-4, 10 layers")
    spec = drawn.to_dict()
    scale = spec["layer"][0]["encoding"]["color"]["scale"]
    assert scale["domain"] == [-15, 0, 15]
    [param] = [each for each in spec["params"] if each["name"] == CELL]
    assert param["select"]["fields"] == ["cell"]
    [data] = spec["datasets"].values()
    assert [row["cell"] for row in data if row["chosen"]] == ["lr 1e-4, 10 layers"]
    assert not any("run_ids" in row for row in data)


def test_maps_share_one_colour_scale_and_legend(tmp_path: Path) -> None:
    write_sweep(tmp_path, growing, *GRID)
    found = snapshot(tmp_path)
    shown = section(found, groups(found)[0].members, split="Seed")
    colours = [
        heatmap(shown.cells, measure("boundary"), shown.row, name).to_dict()["layer"][0]["encoding"]
        for name in ("seed 0", "seed 1")
    ]
    first, second = (each["color"] for each in colours)
    assert first["scale"] == second["scale"]
    assert first["legend"]["title"] == "Change against the boundary (points)"
    assert second["legend"] is None


@pytest.mark.parametrize(
    ("values", "end"), [([0.4, -0.2], 1), ([3.7], 4), ([-60.0], 100), ([float("nan")], 1)]
)
def test_colour_scales_end_at_round_numbers(values: list[float], end: float) -> None:
    assert limit(pd.Series(values)) == end


def test_schedules_differ_in_more_than_colour(tmp_path: Path) -> None:
    write_sweep(tmp_path, growing, *GRID, "--schedule", "constant", "cosine")
    found = snapshot(tmp_path)
    shown = section(found, groups(found)[0].members)
    dots = schedule_dots(shown.schedules, shown.schedule_means, measure("boundary")).to_dict()
    [shape] = [each["encoding"]["shape"] for each in dots["layer"] if "shape" in each["encoding"]]
    assert shape["scale"] == {"domain": ["constant", "cosine"], "range": ["circle", "square"]}
    curves = schedule_curves(shown.curves, "Epochs since unfreezing").to_dict()
    assert curves["layer"][0]["encoding"]["strokeDash"]["scale"]["range"] == [[1, 0], [6, 3]]


def test_lines_leave_room_for_what_an_axis_says(tmp_path: Path) -> None:
    _, runs = write_sweep(tmp_path, growing, *GRID)
    found = snapshot(tmp_path)
    shown = section(found, groups(found)[0].members)
    chosen = [runs[0].run_id]
    spec = parallel(shown.lines, measure("boundary"), chosen).to_dict()
    data = spec["datasets"][spec["layer"][0]["data"]["name"]]
    assert len(data) == 12 * 3 * 2  # from each axis to the next: two ends
    assert {row["run_id"] for row in data if row["chosen"]} == set(chosen)
    assert any(param["name"] == "hover" for param in spec["params"])


# --- the page ---------------------------------------------------------------------------------


def _page() -> None:
    from explorer.pages import sweep

    sweep.page()


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("THAW_RUNS_DIR", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["streamlit_app.py"])
    return tmp_path


def page(**link: str) -> AppTest:
    app = AppTest.from_function(_page, default_timeout=30)
    for name, value in link.items():
        app.query_params[name] = value
    return app.run()


def shown_text(app: AppTest) -> str:
    return "".join(block.value for block in app.html).replace("\N{WORD JOINER}", "")


def test_without_a_group_the_page_says_what_to_type(runs: Path) -> None:
    assert "No runs yet" in page().subheader[0].value
    write_trunk(runs)
    app = page()
    assert not app.exception
    assert "python -m trainer sweep --lr" in app.code[0].value


def test_the_page_shows_the_newest_sweep(runs: Path) -> None:
    whole, _ = write_sweep(runs, growing, *GRID, "--schedule", "constant", "cosine")
    app = page()
    assert not app.exception
    assert app.query_params["group"] == whole.id
    assert "is better than the boundary beyond chance" in shown_text(app)
    assert len(app.get("vega_lite_chart")) == 4
    assert "adjusted for 6 cells" in "".join(block.value for block in app.caption)
    ranking = app.dataframe[0].value
    assert len(ranking) == 13
    assert "run_ids" not in ranking


def test_the_link_decides_what_the_page_shows(runs: Path) -> None:
    write_sweep(runs, growing, *GRID)
    trunk = next(group.id for group in groups(snapshot(runs)) if "trunk" in group.title)
    link = {"group": trunk, "against": "Control", "maps": "Each seed"}
    app = page(**link, cell="lr 1e-3, 20 layers, seed 1")
    assert not app.exception
    assert app.selectbox(key="group").value == trunk
    assert app.segmented_control(key="against").value == "Control"
    assert app.selectbox(key="cell").value == "lr 1e-3, 20 layers, seed 1"
    assert len(app.dataframe[0].value) == 1
    assert app.button(key="open-cell").label == "Compare this run"
    assert app.query_params["cell"] == "lr 1e-3, 20 layers, seed 1"


def test_bad_links_are_no_error(runs: Path) -> None:
    write_sweep(runs, growing, *GRID)
    app = page(group="gone", against="Nothing", maps="Each moon", cell="<b>lr</b>")
    assert not app.exception
    assert any("not in the runs folder" in block.value for block in app.caption)
    assert app.selectbox(key="cell").value == ""
    assert "cell" not in app.query_params


def test_a_cell_leads_to_its_runs(runs: Path) -> None:
    write_sweep(runs, growing, *GRID)
    app = page()
    app.selectbox(key="cell").set_value("lr 1e-4, 10 layers").run()
    assert not app.exception
    assert len(app.dataframe[0].value) == 2
    assert app.dataframe[0].value["Change"].tolist() == pytest.approx([5, 6])
    assert app.button(key="open-cell").label == "Compare these 2 runs"
    assert app.query_params["cell"] == "lr 1e-4, 10 layers"


def test_another_group_forgets_the_cell_and_what_it_does_not_offer(runs: Path) -> None:
    write_transfers(runs, lambda config: 0.7)
    write_sweep(runs, growing, *GRID)
    found = groups(snapshot(runs))
    app = page(maps="Each seed", against="Control", cell="lr 1e-4, 10 layers, seed 0")
    app.selectbox(key="group").set_value(found[-1].id).run()
    assert not app.exception
    assert app.selectbox(key="cell").value == ""
    assert "Change against" not in [each.label for each in app.segmented_control]


def test_a_sweep_without_any_result_is_no_error(runs: Path) -> None:
    write_sweep(runs, lambda config: "no space left", *GRID)
    app = page()
    assert not app.exception
    assert "nothing to rank" in shown_text(app)


def test_a_transfer_sweep_shows_accuracies(runs: Path) -> None:
    write_transfers(runs, growing_head)
    app = page(cell="lr 1e-3")
    assert not app.exception
    assert "above the next" in shown_text(app)
    for table in app.dataframe:
        assert not {"Change", "p", "Fixed"} & set(table.value.columns)
    assert "one schedule" in "".join(block.value for block in app.caption)


def test_hostile_names_stay_text(runs: Path) -> None:
    flags = ["--run-name", "x", "--unfreeze", "**<b>x</b>**", "20"]
    write_sweep(runs, lambda config: 0.9, *flags)
    app = page()
    assert not app.exception
    assert "<b>" not in shown_text(app)
    assert not any("<b>" in block.value for block in [*app.caption, *app.info])
