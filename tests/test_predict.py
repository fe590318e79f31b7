"""What a dry run predicts: multiplied out from measurements, and held against a real sweep."""

from __future__ import annotations

import itertools
import shutil
import types
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import TINY, PhotoFolder
from trainer import predict as module
from trainer.__main__ import main
from trainer.cache import list_entries
from trainer.grid import plan
from trainer.phase import Sample
from trainer.predict import Prediction, predict
from trainer.recipe import parse
from trainer.schema import ThawError


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, make_photos: PhotoFolder) -> Path:
    """Three classes of thirty photos, one of which cannot be read."""
    root = make_photos(tmp_path_factory.mktemp("many"), photos=1)
    for source in list(root.rglob("*.jpg")):
        for number in range(1, 30):
            shutil.copy(source, source.with_name(f"{number:03d}.jpg"))
    next(root.rglob("000.jpg")).write_bytes(b"no photo")
    return root


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is measured takes one second."""
    clock = itertools.count(0.0)
    monkeypatch.setattr(module, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))


def predicted(data: Path, flags: str) -> Prediction:
    return predict(plan(parse([*TINY, "--data", str(data), *flags.split()]), None))


def steps(values: Sequence[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(values)]


# --- multiplied out ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("ticking")
@pytest.mark.parametrize(
    ("vary", "others", "cached"),
    [
        (["--epochs 2", "--epochs 3", "--epochs 4"], "--noise 2", True),
        (["--limit 10", "--limit 20", "--limit 30"], "--epochs 2", True),
        (["--lr 1", "--lr 1 2", "--lr 1 2 3"], "--epochs 2 --unfreeze 30", False),
    ],
    ids=["epochs", "photos", "members"],
)
def test_grows_linearly(many: Path, vary: list[str], others: str, cached: bool) -> None:
    found = [predicted(many, f"{flags} {others}") for flags in vary]
    first, second = steps([one.seconds for one in found])
    assert first == pytest.approx(second)
    assert first > 0
    first, second = steps([one.cache_bytes for one in found])
    assert first == second
    assert (first > 0) is cached


@pytest.mark.usefixtures("ticking")
def test_fewer_views_and_no_cache(many: Path) -> None:
    exact = predicted(many, "--epochs 4 --noise 2")
    fewer = predicted(many, "--epochs 4 --noise 2 --views 2")
    plain = predicted(many, "--epochs 4")
    assert plain.seconds < fewer.seconds < exact.seconds
    assert plain.cache_bytes < fewer.cache_bytes < exact.cache_bytes
    # Nothing of an earlier epoch is left, however many views there are.
    unkept = predicted(many, "--epochs 4 --noise 2 --views 2 --no-cache")
    assert unkept == Prediction(exact.seconds, 0)


@pytest.mark.usefixtures("ticking")
def test_seeds_share_what_does_not_depend_on_them(many: Path) -> None:
    """Without augmentation all seeds train on the same activations of the same parent."""
    one, two = (predicted(many, f"--epochs 2 --seed {seeds}") for seeds in ("0", "0 1"))
    assert one.cache_bytes == two.cache_bytes
    assert one.seconds < two.seconds


def test_layers_cost_from_when_they_are_freed(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes as many seconds as parameters train, and nothing else takes any time."""
    now = 0

    def train(learners: Sequence[Sample], *_: object) -> None:
        nonlocal now
        values = [value for learner in learners for value in learner.tail.parameters()]
        now += sum(value.numel() for value in values if value.requires_grad)

    monkeypatch.setattr(module, "time", types.SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(module, "train_epoch", train)
    few, more, gradual = (
        predicted(many, f"--epochs 4 --unfreeze {flags}").seconds
        for flags in ("10", "30", "10 --gradual 30@1")
    )
    assert few < more
    assert gradual == pytest.approx((1 * few + 3 * more) / 4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--unfreeze 9999", "--unfreeze 9999: this network has"),
        ("--crop-from 100", "--crop-from 100: must be at least 224"),
        ("--arch mobilenet_v9", "Unknown architecture"),
        ("--data /nowhere", "There is no folder /nowhere"),
    ],
)
def test_mistakes_are_found_as_in_training(photos: Path, flags: str, message: str) -> None:
    with pytest.raises(ThawError) as caught:
        predicted(photos, flags)
    assert message in str(caught.value)


# --- and in reality ---------------------------------------------------------------------------


def everything(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def test_a_dry_run_writes_nothing(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["sweep", *TINY, "--data", str(photos), "--lr", "1e-3", "1e-4", "--dry-run"]
    argv += ["--runs-dir", str(tmp_path / "runs"), "--cache-dir", str(tmp_path / "cache")]
    assert main([*argv, "--cache-limit", "1MB"]) == 0
    assert everything(tmp_path) == []
    out = capsys.readouterr().out
    assert " of cache, more than --cache-limit 1 MB: what it cannot keep is computed again" in out
    assert out.splitlines()[-1] == "Nothing was trained (--dry-run)."


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(
            "--unfreeze 20 all --noise 0 2 --views 2 --epochs 3",
            marks=pytest.mark.slow,
            id="finetune",
        ),
        pytest.param("--phase transfer --seed 0 1 --crop-from 240 --epochs 2", id="transfer"),
    ],
)
def test_a_real_sweep_leaves_the_predicted_bytes(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str], flags: str
) -> None:
    expected = predicted(photos, flags)
    argv = ["sweep", *TINY, "--data", str(photos), "--runs-dir", str(tmp_path / "runs")]
    argv += ["--cache-dir", str(tmp_path / "cache"), *flags.split()]
    assert main(argv) == 0
    entries = list_entries(tmp_path / "cache" / "rows")
    assert sum(entry.bytes for entry in entries) == expected.cache_bytes
    before = everything(tmp_path)
    capsys.readouterr()
    assert main([*argv, "--again", "--dry-run"]) == 0
    assert everything(tmp_path) == before
    assert ("Starting from transfer run" in capsys.readouterr().out) is ("transfer" not in flags)
