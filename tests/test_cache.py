"""Files of rows and the folder that keeps them: nothing wrong ever comes out of them."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import trainer.cache
from trainer.__main__ import main
from trainer.cache import Cache, Entry, Key, format_size, list_entries, parse_size
from trainer.rows import Header, Layout, RowFile

LAYOUT = Layout((("float32", (2, 3)), ("uint8", (5,))))
EVERY = np.arange(10)


def header(rows: int = 10) -> Header:
    return Header("k" * 64, LAYOUT, rows, {"kind": "activations"})


def content(rows: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """What row number i holds, for every i of `rows`."""
    floats = np.stack([np.random.default_rng([seed, i]).random((2, 3), np.float32) for i in rows])
    return floats, np.repeat(rows[:, None], 5, axis=1).astype(np.uint8)


def test_rows_come_back_as_they_were_written_in_any_order(tmp_path: Path) -> None:
    file = RowFile.create(tmp_path / "x.rows", header())
    for rows in (np.array([7]), np.array([3, 4, 5, 9]), np.array([1, 0])):
        file.write(rows, content(rows))
    wanted = np.array([0, 1, 2, 4, 5, 9])
    for opened in (file, RowFile.load(tmp_path / "x.rows", header())):
        values, good = opened.read(wanted)
        assert good.tolist() == [True, True, False, True, True, True]
        for found, expected in zip(values, content(wanted), strict=True):
            assert found.dtype == expected.dtype
            assert np.array_equal(found[good], expected[good])


def test_any_flipped_bit_of_any_row_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "x.rows"
    RowFile.create(path, header()).write(EVERY, content(EVERY))
    original = path.read_bytes()
    rows_start = len(original) - 10 * LAYOUT.row_bytes
    rng = np.random.default_rng(0)
    for position in rng.integers(rows_start - 80, len(original), 60):  # marks and rows
        spoiled = bytearray(original)
        spoiled[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(spoiled)
        file = RowFile.load(path, header())
        values, good = file.read(EVERY)
        assert good.sum() == 9
        for found, expected in zip(values, content(EVERY), strict=True):
            assert np.array_equal(found[good], expected[good])
        file.write(EVERY[~good], content(EVERY[~good]))
        assert file.read(EVERY)[1].all()


def test_writers_at_the_same_time_leave_whole_rows_only(tmp_path: Path) -> None:
    """Two that disagree, as two machines may in the last bit: each row is one's or the other's."""
    path = tmp_path / "x.rows"
    RowFile.create(path, header())
    stop = threading.Event()

    def write(seed: int) -> None:
        file = RowFile.load(path, header())
        while not stop.is_set():
            file.write(EVERY, content(EVERY, seed))

    threads = [threading.Thread(target=write, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    either = [content(EVERY, seed)[0] for seed in (0, 1)]
    for _ in range(50):
        (floats, _), good = RowFile.load(path, header()).read(EVERY)
        for row in np.flatnonzero(good):
            assert any(np.array_equal(floats[row], one[row]) for one in either)
    stop.set()
    for thread in threads:
        thread.join()


def test_what_another_process_wrote_is_seen_after_refresh(tmp_path: Path) -> None:
    mine = RowFile.create(tmp_path / "x.rows", header())
    RowFile.create(tmp_path / "x.rows", header()).write(EVERY, content(EVERY))  # opens the same
    assert not mine.has(EVERY).any()
    mine.refresh()
    assert mine.read(EVERY)[1].all()


def test_a_file_of_another_content_is_refused(tmp_path: Path) -> None:
    RowFile.create(tmp_path / "x.rows", header())
    with pytest.raises(ValueError, match="header"):
        RowFile.load(tmp_path / "x.rows", Header("j" * 64, LAYOUT, 10, {}))


@pytest.mark.parametrize("folder", [True, False])
def test_a_file_without_a_name(tmp_path: Path, folder: bool) -> None:
    file = RowFile.temporary(header(), tmp_path if folder else None)
    file.write(EVERY, content(EVERY))
    assert file.read(EVERY)[1].all()
    assert not list(tmp_path.iterdir())


# --- the folder ---------------------------------------------------------------------------------


def key(number: int) -> Key:
    return Key("activations", {"number": number}, {"data": "flowers", "view": number})


def age(path: Path, seconds: float) -> None:
    when = time.time() - seconds
    os.utime(path, (when, when))


def test_least_recently_used_goes_first(tmp_path: Path) -> None:
    size = LAYOUT.file_bytes(10)
    paths = {}
    for number in range(3):
        assert Cache(tmp_path, 10**6).open(key(number), LAYOUT, 10) is not None
        paths[number] = tmp_path / "rows" / f"{key(number).digest}.rows"
        age(paths[number], 1000 - number)
    assert Cache(tmp_path, 10**6).open(key(0), LAYOUT, 10) is not None  # used now
    assert Cache(tmp_path, 3 * size).open(key(3), LAYOUT, 10) is not None
    assert [path.exists() for path in paths.values()] == [True, False, True]


def test_a_run_does_not_evict_what_it_uses_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = Cache(tmp_path, 2 * LAYOUT.file_bytes(10))
    opened = [cache.open(key(number), LAYOUT, 10) for number in range(5)]
    assert [file is not None for file in opened] == [True, True, False, False, False]
    assert capsys.readouterr().out.count("no more room within --cache-limit") == 1
    assert cache.open(key(1), LAYOUT, 10) is not None


def test_thousands_of_files_do_not_make_the_next_one_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0
    look = trainer.cache.list_entries

    def counted(folder: Path) -> list[Entry]:
        nonlocal looks
        looks += 1
        return look(folder)

    monkeypatch.setattr(trainer.cache, "list_entries", counted)
    monkeypatch.setattr(trainer.cache, "_LISTED_SECONDS", 1e9)
    size = LAYOUT.file_bytes(10)
    cache = Cache(tmp_path, 40 * size)
    assert all(cache.open(key(number), LAYOUT, 10) for number in range(40))
    assert looks == 1
    assert cache.open(key(40), LAYOUT, 10) is None  # all are its own
    assert looks == 2
    assert sum(entry.bytes for entry in look(tmp_path / "rows")) == 40 * size


def test_a_full_disk_is_left_some_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.cache._SPARE_BYTES", 1 << 60)
    assert Cache(tmp_path, 10**6).open(key(0), LAYOUT, 10) is None
    assert not list_entries(tmp_path / "rows")


def test_what_a_killed_process_left_behind_is_swept_up(tmp_path: Path) -> None:
    assert Cache(tmp_path, 10**6).open(key(0), LAYOUT, 10) is not None
    old, new = tmp_path / "rows" / ".abc.new", tmp_path / "rows" / ".def.new"
    for path in (old, new):
        path.write_bytes(b"half a file")
    age(old, 7200)
    assert Cache(tmp_path, 10**6).open(key(1), LAYOUT, 10) is not None
    assert (old.exists(), new.exists()) == (False, True)


@pytest.mark.parametrize(
    ("text", "size"),
    [("20GB", 20 * 10**9), ("500 mb", 500 * 10**6), ("1.5g", 1_500_000_000), ("17", 17), ("0", 0)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1 XB", "nan", "1e30GB", "many"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match=r"size|could not convert"):
        parse_size(text)


def test_sizes_are_shown_as_disks_are_sold() -> None:
    assert [format_size(size) for size in (5, 1400, 52_700_000, 2.4e9)] == [
        *("5 B", "1.4 KB", "52.7 MB", "2.4 GB")
    ]


def test_the_command_lists_verifies_and_clears(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--cache-dir", str(tmp_path)]
    assert main(["cache", *where]) == 0
    assert "0 files" in capsys.readouterr().out
    cache = Cache(tmp_path, 10**6)
    for number in range(2):
        file = cache.open(key(number), LAYOUT, 10)
        assert file is not None
        file.write(EVERY[:4], content(EVERY[:4]))
    assert main(["cache", "list", *where]) == 0
    assert "4/10 rows  activations  flowers, view 1" in capsys.readouterr().out
    assert main(["cache", "verify", *where]) == 0
    assert "All sound." in capsys.readouterr().out
    spoiled = tmp_path / "rows" / f"{key(0).digest}.rows"
    content_ = bytearray(spoiled.read_bytes())
    content_[-9 * LAYOUT.row_bytes] ^= 1
    spoiled.write_bytes(content_)
    (tmp_path / "rows" / "stray.rows").write_text("what is this?")
    assert main(["cache", "verify", *where]) == 1
    output = capsys.readouterr().out
    assert "1 DAMAGED" in output
    assert "unusable" in output
    assert [entry.path.name for entry in list_entries(tmp_path / "rows")] == [
        f"{key(1).digest}.rows"
    ]
    assert main(["cache", "clear", *where]) == 0
    assert not list_entries(tmp_path / "rows")
