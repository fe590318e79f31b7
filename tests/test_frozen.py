"""Computing what is frozen once must not change what is learned, and never return a wrong thing."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

import trainer.cache
import trainer.forms
import trainer.frozen
import trainer.together
from tests.conftest import TINY, Train
from trainer.__main__ import main, parse
from trainer.augment import augment, view_generator
from trainer.cache import Cache, Key, list_entries
from trainer.checkpoint import load_checkpoint, load_model
from trainer.config import Augmentation, Config
from trainer.data import Photos, load_photos
from trainer.forms import Form
from trainer.frozen import Source, Work, prepare
from trainer.model import InputNormalize, ModelSpec, build_model, set_train_mode, unfreeze
from trainer.prefix import Trace
from trainer.rows import HEADER_BYTES, Layout
from trainer.runlog import Run, list_runs
from trainer.schema import Preprocess

ALL = ("--brightness", ".3", "--contrast", "2", "--rotation", ".02", "--crop-from", "235")
ALL = (*ALL, "--noise", ".6")


def figures(run: Run) -> list[float]:
    return [v for e in run.epochs for v in (e.train_loss or 0.0, e.val_loss, e.val_acc)]


def cached(folder: Path | None = None) -> list[Path]:
    folder = folder or Path(os.environ["THAW_CACHE"])
    return [entry.path for entry in list_entries(folder / "rows")]


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own, empty."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("THAW_CACHE", str(folder))
    return folder


# --- the same training --------------------------------------------------------------------------


def plainly(parent: Run, config: Config) -> list[tuple[float, float, float]]:
    """The finetune phase as anybody would write it: whole network, every view anew, no cache.

    Train loss, validation loss and accuracy of each epoch."""
    network, checkpoint = load_model(parent.checkpoint("transfer-last"))
    photos = load_photos(config, checkpoint.preprocess)
    unfreeze(network, config.unfreeze)
    optimizer = torch.optim.Adam(
        [p for p in network.parameters() if p.requires_grad], config.learning_rate
    )
    normalize = InputNormalize(checkpoint.preprocess)
    val = normalize(torch.from_numpy(photos.val.photos[:]))
    found = []
    for epoch in range(checkpoint.epoch + 1, checkpoint.epoch + 1 + config.epochs):
        set_train_mode(network)
        losses = []
        order = view_generator(config.seed, "order", epoch).permutation(len(photos.train))
        for number, start in enumerate(range(0, len(order), config.batch_size), start=1):
            rows = np.sort(order[start : start + config.batch_size])
            batch = torch.from_numpy(photos.train.photos[rows])
            names = [photos.train.files[row] for row in rows]
            if config.augmentation.active:
                batch = augment(batch, names, config.augmentation, 224, config.seed, epoch)
            draws = view_generator(config.seed, f"dropout {number}", epoch).integers(2**62)
            torch.manual_seed(int(draws))
            labels = torch.from_numpy(photos.train.labels[rows])
            loss = functional.cross_entropy(network(normalize(batch)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item() * len(rows))
        network.eval()
        with torch.inference_mode():
            logits = network(val)
        labels = torch.from_numpy(photos.val.labels)
        accuracy = float((logits.argmax(1) == labels).float().mean())
        loss = functional.cross_entropy(logits, labels)
        found.append((sum(losses) / len(order), float(loss), accuracy))
    return found


@pytest.mark.parametrize("augmentation", [pytest.param((), marks=pytest.mark.slow), ALL])
@pytest.mark.parametrize(("unfreeze", "lr"), [("8", "1e-3"), ("all", "1e-5")])
def test_training_is_what_a_plain_loop_does(
    train_awake: Train, augmentation: tuple[str, ...], unfreeze: str, lr: str
) -> None:
    parent = train_awake("--phase", "transfer", "--epochs", "1", "--lr", "0.01")
    flags = ("--phase", "finetune", "--epochs", "3", "--lr", lr, "--unfreeze", unfreeze)
    flags = (*flags, "--batch-size", "8", *augmentation, "--from", str(parent.path))
    run = train_awake(*flags)
    expected = plainly(parent, parse([*flags, "--data", parent.info["dataset"]["root"]]))
    found = [(e.train_loss, e.val_loss, e.val_acc) for e in run.epochs[1:]]
    assert np.allclose(np.array(found, float), expected, rtol=2e-4)


@pytest.mark.parametrize("augmentation", [pytest.param((), marks=pytest.mark.slow), ALL])
def test_cold_warm_and_without_cache_are_the_same(
    train_awake: Train, cache_dir: Path, augmentation: tuple[str, ...]
) -> None:
    for flags in (
        ("--phase", "transfer", "--lr", "0.01"),
        ("--phase", "finetune", "--lr", "0.001", "--unfreeze", "8"),
    ):
        flags = (*flags, "--epochs", "2", *augmentation)
        cold = train_awake(*flags)
        files = {path: path.stat().st_ino for path in cached(cache_dir)}
        warm, streamed = train_awake(*flags), train_awake(*flags, "--no-cache")
        assert figures(cold) == figures(warm)
        assert figures(streamed) == pytest.approx(figures(cold), rel=1e-5)
        assert {path: path.stat().st_ino for path in cached(cache_dir)} == files
        assert cold.info["engine"]["form"] == "folded"


def test_frozen_weights_and_statistics_are_bit_for_bit_what_they_were(train_awake: Train) -> None:
    parent = train_awake("--phase", "transfer", "--epochs", "1")
    run = train_awake(
        "--phase", "finetune", "--epochs", "2", "--lr", "0.01", "--unfreeze", "8", *ALL
    )
    before = load_checkpoint(parent.checkpoint("transfer-last")).state_dict
    after = load_checkpoint(run.checkpoint("finetune-last")).state_dict
    unfrozen = set(run.info["phases"][0]["unfrozen_layers"])
    frozen = [name for name in before if name.rpartition(".")[0] not in unfrozen]
    assert len(frozen) > 100
    assert all(before[n].numpy().tobytes() == after[n].numpy().tobytes() for n in frozen)


def test_views_in_turn_are_computed_once(train_awake: Train, cache_dir: Path) -> None:
    flags = ("--phase", "transfer", "--epochs", "5", "--views", "2", *ALL)
    run = train_awake(*flags)
    views = [trainer.cache.read_header(path).about.get("view") for path in cached(cache_dir)]
    assert sorted(view for view in views if view is not None) == [1, 2]
    assert run.info["config"]["views"] == 2
    exact = train_awake("--phase", "transfer", "--epochs", "5", *ALL)
    assert figures(exact)[:9] == figures(run)[:9]  # epochs 0 to 2 see the same views
    assert figures(exact)[9:] != figures(run)[9:]


@pytest.mark.slow
def test_auto_suggests_fewer_views_and_never_chooses_them(
    train_awake: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainer.forms, "_WORTH_A_TRIAL", 1)
    slow = (trainer.forms.Trial("folded", images_per_second=1.0, difference=0.0),)
    monkeypatch.setattr(trainer.forms, "_timed", lambda *_: slow)
    monkeypatch.setattr(trainer.together, "_LONG_MINUTES", 0)
    flags = ("--phase", "transfer", "--epochs", "6", "--brightness", "0.2")
    exact = train_awake(*flags)
    assert "--views 5" not in capsys.readouterr().out
    auto = train_awake(*flags, "--views", "auto")
    assert "--views 5" in capsys.readouterr().out
    assert figures(auto) == figures(exact)


# --- the key ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decoded(photos: Path) -> Photos:
    return load_photos(Config("transfer", data=str(photos), cache=False), Preprocess())


BASE = Work(
    preprocess=Preprocess(),
    device=torch.device("cpu"),
    augmentation=Augmentation(brightness=0.3),
    seed=0,
    views=None,
    passes=1,
    precision="fp32",
    sample=torch.zeros(2, 224, 224, 3, dtype=torch.uint8),
)


@functools.cache
def traced(arch: str) -> tuple[torch.nn.Module, Trace]:
    torch.manual_seed(0)
    network = build_model(ModelSpec(arch, 3)).eval()
    return network, Trace(network, torch.rand(3, 3, 224, 224))


def key(
    decoded: Photos,
    work: Work = BASE,
    *,
    change: Callable[[torch.nn.Module], Any] | None = None,
    arch: str = "mobilenet_v3_small",
    which: str = "8",
    epoch: int | None = 1,
    split: str = "train",
) -> str:
    network, trace = traced(arch)
    if change is not None:
        network = copy.deepcopy(network)
        change(network)
        trace = Trace(network, torch.rand(3, 3, 224, 224))
    unfreeze(network, which)
    engine = prepare(work, trace, [trace.cut()], {"arch": arch}, None, Path("none.json"))
    source = Source(engine, getattr(decoded, split), augmented=epoch is not None)
    source.open(epoch)
    return source.key.digest


def _shift(network: torch.nn.Module, name: str) -> None:
    tensor = network.state_dict()[name]
    tensor.view(-1)[0] += 1e-6 if tensor.is_floating_point() else 1


def test_the_same_again_has_the_same_key(decoded: Photos) -> None:
    assert key(decoded) == key(decoded)
    # What trains is no part of it, nor is what an unused setting says.
    assert key(decoded) == key(decoded, change=lambda n: _shift(n, "classifier.3.weight"))
    other = dataclasses.replace(BASE, passes=3, views=3)
    assert key(decoded) == key(decoded, other, epoch=4)  # the first of three views again
    assert key(decoded, epoch=None) == key(
        decoded, dataclasses.replace(BASE, seed=5, augmentation=Augmentation(noise=2)), epoch=None
    )


def test_everything_that_changes_an_activation_changes_the_key(
    decoded: Photos, monkeypatch: pytest.MonkeyPatch
) -> None:
    augmentations = {
        name: Augmentation(**{"brightness": 0.3, name: value})
        for name, value in (
            *(("brightness", 0.31), ("contrast", 1.1), ("color", "fixed")),
            *(("rotation", 0.1), ("crop_from", 230), ("noise", 1.0)),
        )
    }
    assert set(augmentations) == {f.name for f in dataclasses.fields(Augmentation)}
    preprocesses = [
        Preprocess(**change)
        for change in (
            *({"resize": 257}, {"interpolation": "bilinear"}),
            *({"mean": (0.5, 0.456, 0.406)}, {"std": (0.5, 0.224, 0.225)}),
        )
    ]
    works = [dataclasses.replace(BASE, augmentation=a) for a in augmentations.values()]
    works += [dataclasses.replace(BASE, preprocess=p) for p in preprocesses]
    works.append(dataclasses.replace(BASE, seed=1))
    keys = [key(decoded, work, epoch=3) for work in works]
    keys += [key(decoded, epoch=epoch) for epoch in (1, 2, 3, None)]
    keys += [key(decoded, which=which) for which in ("20", "features.9")]
    keys += [key(decoded, split="val"), key(decoded, arch="mobilenet_v3_large")]
    for name in ("features.0.0.weight", "features.1.block.0.1.running_mean"):
        keys.append(key(decoded, change=lambda network, name=name: _shift(network, name)))
    keys.append(key(decoded, change=lambda n: setattr(n.get_submodule("features.0.1"), "eps", 0.1)))
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    keys.append(key(decoded))
    torch.set_num_threads(threads)
    monkeypatch.setattr(trainer.cache, "code_digest", lambda: "another version of Thaw")
    keys.append(key(decoded))
    monkeypatch.undo()
    real = trainer.frozen.describe

    def elsewhere(**changes: object) -> Callable[[torch.device], dict[str, Any]]:
        return lambda device: real(device) | changes

    for change in ({"versions": {"torch": "9"}}, {"cpu": "another"}, {"device": "NVIDIA H200"}):
        monkeypatch.setattr(trainer.frozen, "describe", elsewhere(**change))
        keys.append(key(decoded))
    monkeypatch.undo()

    def another_form(prefix: Any, *_: object) -> Form:
        return Form("plain", prefix)

    monkeypatch.setattr(trainer.frozen, "choose_form", another_form)
    keys.append(key(decoded))
    assert len(set(keys)) == len(keys)


def test_photos_and_their_names_are_in_the_key(
    decoded: Photos, photos: Path, tmp_path: Path
) -> None:
    def with_(files: dict[str, bytes]) -> Photos:
        for name, content in files.items():
            path = tmp_path / "photos" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        config = Config("transfer", data=str(tmp_path / "photos"), cache=False)
        return load_photos(config, Preprocess())

    original = {str(p.relative_to(photos)): p.read_bytes() for p in photos.rglob("*.jpg")}
    same = with_(original)
    assert key(same) == key(decoded)
    train = same.train.files
    swapped = {train[0]: original[train[1]], train[1]: original[train[0]]}
    assert key(with_(swapped)) != key(decoded)
    assert key(with_(swapped), epoch=None) != key(decoded, epoch=None)


# --- faults -------------------------------------------------------------------------------------

FLAGS = ("--phase", "transfer", "--epochs", "2", "--lr", "0.01", *ALL)


def _cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


def _other_version(path: Path) -> None:
    content = path.read_bytes()
    header = json.loads(content[:HEADER_BYTES]) | {"format": 0}
    path.write_bytes(json.dumps(header).encode().ljust(HEADER_BYTES) + content[HEADER_BYTES:])


def _garbage(path: Path) -> None:
    path.write_bytes(b"\xff" * 100)


@pytest.mark.parametrize(
    "spoil",
    [
        _flip_a_bit,
        os.unlink,
        *(
            pytest.param(one, marks=pytest.mark.slow)
            for one in (_cut_short, _other_version, _garbage)
        ),
    ],
)
def test_a_spoiled_cache_file_is_noticed_and_made_again(
    train_awake: Train,
    cache_dir: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], None],
) -> None:
    expected = figures(train_awake(*FLAGS))
    for path in cached(cache_dir):
        spoil(path)
    capsys.readouterr()
    assert figures(train_awake(*FLAGS)) == pytest.approx(expected, rel=1e-5)
    if spoil is not os.unlink:
        assert "computed again" in capsys.readouterr().out
    assert main(["cache", "verify", "--cache-dir", str(cache_dir)]) == 0


def test_files_deleted_during_a_run_are_made_again(
    train_awake: Train,
    cache_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ("--phase", "transfer", "--epochs", "3", "--lr", "0.01")
    expected = figures(train_awake(*flags))
    original = trainer.frozen.Source.open

    def delete_then_open(self: Source, epoch: int | None = None) -> None:
        if epoch == 2:
            for path in cached(cache_dir):
                path.unlink()
        original(self, epoch)

    monkeypatch.setattr(trainer.frozen.Source, "open", delete_then_open)
    assert figures(train_awake(*flags)) == pytest.approx(expected, rel=1e-5)
    assert "deleted while it was in use" in capsys.readouterr().out


@pytest.mark.parametrize("why", ["limit", "read-only", "no folder", "disk"])
def test_without_room_the_run_streams_with_one_notice(
    train_awake: Train,
    cache_dir: Path,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = [*FLAGS]
    expected = figures(train_awake(*flags, "--no-cache"))
    if why == "limit":
        flags += ["--cache-limit", "1KB"]
    elif why == "read-only":
        monkeypatch.setattr(os, "link", _refuse)
    elif why == "no folder":
        cache_dir.write_text("a file where the folder should be")
    else:
        monkeypatch.setattr(os, "posix_fallocate", _refuse_large)
    capsys.readouterr()
    assert figures(train_awake(*flags)) == pytest.approx(expected, rel=1e-5)
    assert capsys.readouterr().out.count("The cache cannot keep more") == 1
    assert not cached(cache_dir)


def _refuse(*_: object) -> None:
    raise PermissionError(30, "Read-only file system")


def _refuse_large(descriptor: int, offset: int, length: int) -> None:
    if os.fstat(descriptor).st_nlink:  # a file with a name, not one in memory
        raise OSError(28, "No space left on device")
    os.ftruncate(descriptor, length)


def test_a_full_disk_in_the_middle_of_writing(
    train_awake: Train, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = figures(train_awake(*FLAGS, "--no-cache"))
    original, written = os.pwrite, [0]

    def fill_up(descriptor: int, content: bytes, offset: int) -> int:
        if os.fstat(descriptor).st_nlink:
            written[0] += 1
            if written[0] > 80:
                raise OSError(28, "No space left on device")
        return original(descriptor, content, offset)

    monkeypatch.setattr(os, "pwrite", fill_up)
    assert figures(train_awake(*FLAGS)) == pytest.approx(expected, rel=1e-5)
    assert written[0] > 80


Command = Callable[[str, str], "subprocess.Popen[str]"]


@pytest.fixture
def command(cache_dir: Path, tmp_path: Path, photos: Path, awake: str) -> Command:
    """command(runs folder, epochs): the same training in a process of its own."""
    argv = [sys.executable, "-m", "trainer", *TINY, *FLAGS, "--data", str(photos)]
    argv += ["--weights", awake, "--cache-dir", str(cache_dir)]

    def start(runs: str, epochs: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [*argv, "--runs-dir", str(tmp_path / runs), "--epochs", epochs],
            stdout=pipe,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


@pytest.mark.slow
def test_two_runs_at_once_on_one_cache(
    train_awake: Train, cache_dir: Path, command: Command, tmp_path: Path
) -> None:
    both = [command(name, "2") for name in ("a", "b")]
    for process in both:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
    expected = figures(train_awake(*FLAGS, "--no-cache"))
    for name in ("a", "b"):
        (run,) = list_runs(tmp_path / name)
        assert figures(run) == pytest.approx(expected, rel=1e-5)
    assert main(["cache", "verify", "--cache-dir", str(cache_dir)]) == 0


@pytest.mark.slow
def test_killed_while_filling_the_next_run_goes_on(
    train_awake: Train, cache_dir: Path, command: Command
) -> None:
    process = command("killed", "300")
    deadline = time.monotonic() + 60
    while len(cached(cache_dir)) < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert len(cached(cache_dir)) >= 5
    expected = figures(train_awake(*FLAGS, "--no-cache"))
    assert figures(train_awake(*FLAGS)) == pytest.approx(expected, rel=1e-5)


def test_the_cache_can_be_used_without_permission_to_write(decoded: Photos, tmp_path: Path) -> None:
    """Rows of a file that was opened for reading only are used; what is missing is computed."""
    layout, made = Layout((("float32", (2,)),)), Key("photos", {"a": 1})
    file = Cache(tmp_path, 10**6).open(made, layout, 4)
    assert file is not None
    file.write(np.array([0, 1]), (np.ones((2, 2), np.float32),))
    path = cached(tmp_path)[0]
    path.chmod(0o444)
    again = Cache(tmp_path, 10**6).open(made, layout, 4)
    assert again is not None
    (values,), good = again.read(np.array([0, 1, 2]))
    assert good.tolist() == [True, True, False]
    assert values[:2].tolist() == [[1, 1], [1, 1]]
