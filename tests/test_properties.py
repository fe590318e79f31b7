"""What must hold for any input, tried by Hypothesis: the same few examples in every run of the
suite, and many more, drawn anew each time, with `pytest -m slow`."""

from __future__ import annotations

import json
import math
import struct
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from explorer.compare import summaries, table
from explorer.curves import SPLITS, Look, _smoothed, _thinned, long_frame
from explorer.data import Library, epochs_frame, lineage
from trainer.__main__ import parse
from trainer.cache import Key, format_size, parse_size
from trainer.cli import inert, inert_cell
from trainer.config import Config, ConfigError, Schedule
from trainer.imports.read import read_all
from trainer.listing import _split_class, excluded_line, read_excluded
from trainer.recipe import _pair
from trainer.run_writer import _end_of_epoch
from trainer.runlog import find_run, list_runs
from trainer.schedule import learning_rate
from trainer.schema import EPOCH_FIELDS, PHASES, ThawError

Check = TypeVar("Check", bound=Callable[..., None])

_COMMON: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}
FEW = settings(max_examples=40, derandomize=True, **_COMMON)
MANY = settings(max_examples=1000, **_COMMON)
thorough: list[Any] = []


def holds(**strategies: st.SearchStrategy[Any]) -> Callable[[Check], Check]:
    """A test that this holds for whatever the strategies draw, once with few examples and once,
    among the slow tests, with many."""

    def decorate(check: Check) -> Check:
        thorough.append(pytest.param(MANY(given(**strategies)(check)), id=check.__name__))
        return FEW(given(**strategies)(check))

    return decorate


@pytest.mark.slow
@pytest.mark.parametrize("check", thorough)
def test_thoroughly(check: Callable[[], None]) -> None:
    check()


numbers = st.one_of(
    st.floats(), st.integers(), st.sampled_from([10**400, -(10**400), 1e308, -0.0, 2**63])
)
anything = st.characters(exclude_categories=())  # halves of characters too
texts = st.text(anything) | st.sampled_from(["", "\ud800", "=1+1", "x" * 300])
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)

# --- run logs -----------------------------------------------------------------------------------

INFO: dict[str, Any] = {
    "schema_version": 1,
    "run_id": "a",
    "status": "done",
    "classes": ["a", "b"],
    "started": 1.0,
    "phases": [{"name": "transfer", "first_epoch": 0, "last_epoch": 2}],
}
EPOCH: dict[str, Any] = {"event": "epoch"} | dict.fromkeys(EPOCH_FIELDS, 1) | {"phase": "transfer"}
KNOWN = [
    *INFO,
    *("parent_run_id", "config", "dataset", "model", "weights", "sweep", "preprocess", "recipe"),
    *("environment", "ended", "engine", "imported", "parent_checkpoint", "pid", "layer_rates"),
]


def log_of(*epochs: Mapping[str, Any]) -> bytes:
    return b"".join(json.dumps(epoch).encode() + b"\n" for epoch in epochs)


def read_folder(info: bytes, log: bytes) -> None:
    """As trainer and app read it; nothing may be raised, whatever it holds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "a"
        folder.mkdir()
        (folder / "run.json").write_bytes(info)
        (folder / "metrics.jsonl").write_bytes(log)
        (run,) = list_runs(Path(name))
        assert (run.problem is None) or (run.problem.startswith(str(folder)))
        try:
            assert find_run(Path(name), "a").epochs == run.epochs
        except ThawError as error:
            assert run.problem == str(error)
        show(Library(Path(name)))


def show(library: Library) -> None:
    snapshot = library.snapshot()
    chosen = list(snapshot.runs)
    frame = epochs_frame(snapshot, lineage(snapshot, chosen)[0])
    long_frame(frame, "accuracy", "total", SPLITS, Look(smoothing=0.5))
    long_frame(frame, "loss", "since", SPLITS)
    table(summaries(snapshot, chosen))


@holds(info=st.binary(max_size=60), log=st.binary(max_size=200))
def test_folders_of_any_bytes_are_read(info: bytes, log: bytes) -> None:
    read_folder(info, log)
    read_folder(json.dumps(INFO).encode(), log_of(EPOCH) + log + b"\n" + log_of(EPOCH))


@holds(
    changes=st.dictionaries(st.sampled_from(KNOWN), values, max_size=4),
    lines=st.lists(st.dictionaries(st.sampled_from(["event", *EPOCH_FIELDS]), values), max_size=4),
)
def test_any_value_in_any_field_is_read(
    changes: dict[str, Any], lines: list[dict[str, Any]]
) -> None:
    read_folder(json.dumps(INFO | changes).encode(), log_of(*(EPOCH | line for line in lines)))


@holds(
    lines=st.lists(
        st.one_of(
            st.integers(0, 9).map(lambda n: {**EPOCH, "epoch": n}),
            st.just({"event": "note", "text": "a"}),
            st.dictionaries(st.sampled_from(["event", *EPOCH_FIELDS]), values),
        ),
        max_size=5,
    ),
    cut=st.floats(0, 1),
)
def test_of_a_log_cut_anywhere_all_whole_lines_are_read(
    lines: list[dict[str, Any]], cut: float
) -> None:
    content = log_of(*lines)
    content = content[: round(cut * len(content))]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "a"
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps(INFO))
        (folder / "metrics.jsonl").write_bytes(content)
        (run,) = list_runs(Path(name))
    whole = lines[: content.count(b"\n")]
    sure = [line["epoch"] for line in whole if line.get("event") == "epoch" and _sound(line)]
    assert [epoch.epoch for epoch in run.epochs if epoch.epoch in range(10)] == [
        epoch for epoch in sure if epoch in range(10)
    ]
    assert (run.problem is None) == (len(run.epochs) == sum(map(_says_epoch, whole)))


def _says_epoch(line: dict[str, Any]) -> bool:
    return line.get("event") == "epoch"


def _sound(line: dict[str, Any]) -> bool:
    """Whether the reader has to take an epoch: written independently of it."""
    if not set(EPOCH_FIELDS) <= set(line) or line["phase"] not in PHASES:
        return False
    for name in EPOCH_FIELDS[1:]:
        value = line[name]
        whole = name in ("epoch", "phase_epoch", "trainable_params", "peak_memory_bytes")
        if value is None and not whole:
            continue
        if not isinstance(value, int | float) or not abs(value) <= 1.7976931348623157e308:
            return False
    return True


@holds(
    epochs=st.lists(st.integers(0, 9), max_size=6),
    junk=st.binary(max_size=20),
    at=st.integers(0, 9),
)
def test_going_on_after_an_epoch_keeps_that_epoch_and_nothing_behind_it(
    epochs: list[int], junk: bytes, at: int
) -> None:
    known = sorted(set(epochs))
    content = log_of(*({**EPOCH, "epoch": n} for n in known)) + junk
    kept = content[: _end_of_epoch(content, at)]
    found = [json.loads(line)["epoch"] for line in kept.splitlines()]
    assert found == [n for n in known if n <= at]


# --- learning rates -----------------------------------------------------------------------------

schedules = st.builds(
    Schedule,
    name=st.sampled_from(["constant", "exponential", "step", "cosine"]),
    decay=st.floats(0, 1e4),
    drop=st.floats(1e-6, 1),
    epochs_drop=st.integers(1, 50),
    warmup=st.integers(0, 20),
)


@holds(schedule=schedules, rate=st.floats(1e-30, 1e30), epochs=st.integers(1, 300))
@example(schedule=Schedule("exponential", decay=1e4), rate=1.0, epochs=200)
def test_every_schedule_is_finite_and_falls_after_its_warmup(
    schedule: Schedule, rate: float, epochs: int
) -> None:
    rates = [learning_rate(schedule, rate, epoch, epochs) for epoch in range(epochs)]
    assert all(0 <= one <= rate * (1 + 1e-12) for one in rates)
    rising, falling = rates[: schedule.warmup], rates[schedule.warmup :]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert not falling or falling[0] == rate
    assert rising + falling[:1] == sorted(rising + falling[:1])
    if schedule.name == "constant":
        assert set(falling) <= {rate}


# --- the split ----------------------------------------------------------------------------------

names = st.lists(
    st.text(st.characters(exclude_categories=(), exclude_characters="/\0"), min_size=1, max_size=8),
    min_size=2,
    max_size=40,
    unique=True,
)


@holds(
    files=names,
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**63 - 1),
    added=names,
)
def test_the_split_is_whole_stratified_and_its_own(
    files: list[str], fraction: float, seed: int, added: list[str]
) -> None:
    config = Config("transfer", val_fraction=fraction, split_seed=seed)
    split = dict(_split_class(files, config))
    assert sorted(split) == sorted(files)
    counts = Counter(split.values())
    assert min(counts["train"], counts["val"]) >= 1
    wanted = min(max(len(files) * fraction, 1), len(files) - 1)
    assert abs(counts["val"] - wanted) <= 0.5 + 1e-9
    assert dict(_split_class(files[::-1], config)) == split
    # Photos that come in never change the order of those that are there: validation ones stay, but
    # for as many as come in before them.
    more = dict(_split_class([*files, *(set(added) - set(files))], config))
    moved = [file for file in files if more[file] != split[file]]
    assert len({split[file] for file in moved}) <= 1


@holds(
    tracks=st.dictionaries(st.integers(0, 30), st.integers(1, 6), min_size=1, max_size=12),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**31),
)
def test_no_track_is_on_both_sides_of_the_split(
    tracks: dict[int, int], fraction: float, seed: int
) -> None:
    files = [f"a/{track:05}_{frame:05}.png" for track, n in tracks.items() for frame in range(n)]
    config = Config("transfer", val_fraction=fraction, split_seed=seed, group_by="track")
    split = _split_class(files, config)
    assert sorted(file for file, _ in split) == sorted(files)
    sides: dict[str, set[str]] = {}
    for file, side in split:
        sides.setdefault(file.rpartition("_")[0], set()).add(side)
    assert all(len(one) == 1 for one in sides.values())
    assert any(side == "train" for _, side in split)
    if len(tracks) > 1:
        assert any(side == "val" for _, side in split)


@holds(
    files=st.lists(
        st.text(
            st.characters(exclude_categories=(), exclude_characters="\0/"), min_size=1, max_size=12
        ).filter(lambda text: text not in (".", "..")),
        max_size=6,
    )
)
@example(files=["a ", " b", "#c", '"d"', "e\nf", "g\r", "\ud800", "\u2028", "h\\", "\ufeffi"])
def test_a_list_of_photos_to_leave_out_is_read_as_it_was_written(files: list[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "list.txt"
        path.write_text("".join(f"{excluded_line(file)}\n" for file in files), encoding="utf-8")
        assert read_excluded(path) == frozenset(files)


# --- keys of the cache --------------------------------------------------------------------------

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
ingredients = st.dictionaries(st.sampled_from("abcdef"), plain, min_size=1, max_size=4)


@holds(one=ingredients, other=ingredients, about=ingredients, kind=st.sampled_from(["x", "y"]))
@example(one={"a": 1}, other={"a": 1.0}, about={}, kind="x")
@example(one={"a": True}, other={"a": 1}, about={}, kind="x")
@example(one={"a": [1, 2]}, other={"a": [12]}, about={}, kind="x")
def test_keys_are_equal_where_all_that_counts_is(
    one: dict[str, Any], other: dict[str, Any], about: dict[str, Any], kind: str
) -> None:
    key = Key("x", one).digest
    assert Key("x", dict(reversed(one.items())), about).digest == key
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (Key(kind, other).digest == key) == (same and kind == "x")


# --- flags --------------------------------------------------------------------------------------


@holds(text=texts | st.from_regex(r"-?[0-9.eE_]* ?[kKmMgGtT]?[bB]?", fullmatch=True))
@example(text="1e400")
@example(text="nan")
@example(text="inf GB")
@example(text="١٢ GB")
def test_a_size_is_a_number_of_bytes_or_refused(text: str) -> None:
    try:
        size = parse_size(text)
    except ValueError as error:
        assert "must be a size" in str(error)
    else:
        assert 0 <= size <= 10**18


@holds(size=st.integers(0, 10**15))
@example(size=999_999)
@example(size=999_500_000)
def test_a_size_that_is_shown_can_be_typed(size: int) -> None:
    assert parse_size(format_size(size)) == pytest.approx(size, rel=0.005)
    assert parse_size(str(size)) == size


@holds(
    rate=st.floats(1e-30, 1e30),
    layers=st.integers(1, 999).map(str) | st.sampled_from(["all", "features.7", "a:b"]),
)
def test_a_pair_that_is_written_is_read(rate: float, layers: str) -> None:
    assert _pair(f"{rate!r}:{layers}") == (rate, layers)


@holds(
    text=texts | st.from_regex(r"[0-9a-z.,:@ -]*", fullmatch=True),
    flag=st.sampled_from(
        [
            "--gradual",
            "--layer-decay",
            "--cache-limit",
            "--head",
            "--unfreeze",
            "--lr",
            "--views",
            "--epochs",
        ]
    ),
)
@example(text="²", flag="--views")
@example(text="²@²", flag="--gradual")
@example(text="²", flag="--head")
@example(text="9" * 5000, flag="--unfreeze")
@example(text="nan", flag="--layer-decay")
@example(text="nan", flag="--lr")
@example(text="--", flag="--unfreeze")
@example(text="9" * 5000, flag="--views")
@example(text="9" * 5000, flag="--head")
@example(text="20@" + "9" * 5000, flag="--gradual")
@example(text="1e999", flag="--cache-limit")
def test_any_text_after_a_flag_is_taken_or_refused(text: str, flag: str) -> None:
    try:
        config = parse(["--phase", "finetune", f"{flag}={text}"])
    except ThawError:
        return
    except SystemExit as error:  # how argparse refuses
        assert error.code == 2
        return
    assert 0 < config.layer_decay <= 1
    assert math.isfinite(config.learning_rate)
    json.dumps(config.to_dict(), allow_nan=False)


@holds(
    stages=st.lists(
        st.tuples(st.integers(1, 40), st.sampled_from(["20", "all", "features.7", "a@b"])),
        min_size=1,
        max_size=4,
        unique_by=lambda pair: pair[0],
    )
)
def test_gradual_stages_that_are_written_are_read(stages: list[tuple[int, str]]) -> None:
    stages = sorted(stages)
    written = ",".join(f"{which}@{after}" for after, which in stages)
    config = Config("finetune", epochs=50, unfreeze="1", gradual=written)
    assert config.stages == ((0, "1"), *stages)
    if len(stages) > 1:
        with pytest.raises(ConfigError):
            backwards = ",".join(f"{which}@{after}" for after, which in reversed(stages))
            Config("finetune", epochs=50, unfreeze="1", gradual=backwards)


# --- names --------------------------------------------------------------------------------------


@holds(text=st.text(st.characters(exclude_categories=()), max_size=40))
@example(text="=1+1")
@example(text="\r=1")
@example(text="\u202e\u2066x")
@example(text="\ud800")
@example(text="'=1")
def test_names_that_are_inert_cannot_act(text: str) -> None:
    shown, cell = inert(text), inert_cell(text)
    for one in (shown, cell):
        assert one.isprintable()
        one.encode()
    assert inert(shown) == shown
    assert inert_cell(cell) == cell
    assert not cell.startswith(("=", "+", "-", "@"))
    if text.isprintable():
        assert shown == text
        assert cell.removeprefix("'") == text.removeprefix("'")


# --- curves -------------------------------------------------------------------------------------

curves = st.lists(st.floats(0, 1), min_size=1, max_size=1300)


def rows_of(before: list[float], after: list[float]) -> pd.DataFrame:
    raw = np.array([*before, *after])
    epochs = np.arange(len(raw))
    phase = ["transfer"] * len(before) + ["finetune"] * len(after)
    return pd.DataFrame(
        {"series": "a", "phase": phase, "split": "Validation", "x": epochs, "raw": raw, "mark": ""}
    )


@holds(
    sizes=st.tuples(st.integers(1, 1300), st.integers(0, 1300)),
    values=st.lists(st.floats(-10, 10), min_size=2, max_size=12),
    weight=st.floats(0, 0.99),
)
def test_smoothing_stays_within_each_side_of_the_boundary(
    sizes: tuple[int, int], values: list[float], weight: float
) -> None:
    before, after = (
        np.resize(part, n).tolist()
        for part, n in zip(np.array_split(values, 2), sizes, strict=True)
    )
    rows = _smoothed(rows_of(before, after), weight)
    alone = _smoothed(rows_of([], after), weight)
    assert rows["value"][len(before) :].tolist() == pytest.approx(alone["value"].tolist())
    for _, side in rows.groupby("phase"):
        assert side["value"].min() >= side["raw"].min() - 1e-9
        assert side["value"].max() <= side["raw"].max() + 1e-9
        assert side["value"].iloc[0] == pytest.approx(side["raw"].iloc[0])


@holds(sizes=st.tuples(st.integers(1, 5000), st.integers(0, 5000)), marked=st.integers(0, 9999))
def test_a_long_curve_keeps_its_ends_and_marks_on_both_sides(
    sizes: tuple[int, int], marked: int
) -> None:
    rows = rows_of([0.5] * sizes[0], [0.6] * sizes[1])
    marked %= len(rows)
    rows.loc[marked, "mark"] = "best"
    kept = _thinned(rows)
    places = set(kept["x"])
    ends = {0, sizes[0] - 1, len(rows) - 1} | ({sizes[0]} if sizes[1] else set())
    assert ends | {marked} <= places
    assert kept["x"].is_monotonic_increasing
    assert set(kept["x"]) <= set(rows["x"])
    assert (kept.groupby("phase").size() <= 403).all()


# --- others' logs -------------------------------------------------------------------------------

NAMES = (
    "log.csv",
    "metrics.csv",
    "trainer_state.json",
    "events.out.tfevents.1.host",
    "history.csv",
)
CELLS = st.one_of(
    numbers.map(str), texts, st.sampled_from(["", "nan", "inf", "1e999", "00:12", '"'])
)
TABLE = st.lists(st.lists(CELLS, max_size=5), max_size=5).map(
    lambda rows: "epoch,accuracy,loss,val_loss,time\n" + "\n".join(",".join(row) for row in rows)
)
STATE = st.fixed_dictionaries(
    {
        "log_history": values
        | st.lists(
            st.dictionaries(
                st.sampled_from(
                    ["epoch", "step", "loss", "eval_loss", "eval_accuracy", "learning_rate"]
                ),
                values,
            ),
            max_size=4,
        )
    }
).map(json.dumps)


def event_record(content: bytes) -> bytes:
    """A record of an event file whose checksums fit, whatever it holds."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    head = struct.pack("<Q", len(content))
    sums = [struct.pack("<I", masked_crc32c(part)) for part in (head, content)]
    return head + sums[0] + content + sums[1]


@holds(
    name=st.sampled_from(NAMES),
    content=st.one_of(
        st.binary(max_size=200),
        TABLE.map(lambda text: text.encode("utf-8", "surrogatepass")),
        STATE.map(str.encode),
        st.lists(st.binary(max_size=60), max_size=4).map(
            lambda parts: b"".join(map(event_record, parts))
        ),
    ),
)
@example(name="log.csv", content=b"epoch,loss\n0," + b"9" * 5000)
@example(name="log.csv", content=b"epoch,loss\n" + b"9" * 5000 + b",1")
@example(name="log.csv", content=b'epoch,loss\n0,"1')
@example(name="trainer_state.json", content=b"[" * 100_000)
@example(
    name="trainer_state.json",
    content=b'{"log_history": [{"epoch": ' + b"9" * 5000 + b', "loss": 1}]}',
)
def test_of_any_file_an_importer_makes_a_log_or_an_error(name: str, content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        for where in (path, Path(folder)):
            try:
                found = read_all([where])
            except ThawError as error:
                assert str(error)
            else:
                for log in found.logs:
                    assert log.epochs
