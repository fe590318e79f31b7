"""The model card: that it says what was measured, and nothing that a name or a path could turn it
into."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import markdown  # comes with tensorboard
import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard  # comes with timm

from explorer.calibration import calibration
from explorer.changed import load_scored
from export.card import CardError, card_path, model_card, write_card
from export.classifier import Classifier
from export.metadata import file_name
from export.precision import PRECISIONS
from export.to_onnx import Exported, export_run
from tests.explorer_runs import write_run, write_trunk
from tests.tiny_run import make_run
from trainer.cli import inert
from trainer.controls import control_of, controls_by_parent
from trainer.evidence import compare, load_predictions, points, sentence
from trainer.runlog import Run, list_runs, read_run

PHOTOS = 60
CLASSES = ("daisy", "rose", "tulip")
WRITTEN = 1_800_000_000.0  # 2027-01-15 08:00 UTC
CONTROLLED = {"epochs": 2, "batch_size": 32, "augmentation": {}, "views": "exact", "seed": 0}
HOSTILE = (
    "![x](http://127.0.0.1/x)",
    "<script>alert(1)</script>",
    "[click](javascript:alert(1))",
    "www.example.com | http://127.0.0.1 | a@b.example",
    "`` ` ``` \\` **bold** _em_ # $x$",
    "two\nlines\n\n# heading\n---\n",
    "\u202egnp.exe\x1b[31m\x00",
    "-->]]> &lt;b&gt; \\",
)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Exported]:
    """A transfer run and what was really exported of it."""
    run = make_run(tmp_path_factory.mktemp("card"))
    return run, export_run(run)


def as_if(exported: Exported, run: Run, which: str = "after", **about: Any) -> Exported:
    """The real export, as if it were of this run."""
    epochs = [one for one in run.epochs if one.phase_epoch > 0]
    best = max(epochs, key=lambda one: one.rank, default=None)
    epoch = run.boundary if which == "before" else best.epoch if best else 0
    phase = "transfer" if which == "before" else run.phase
    names = {"run_id": run.run_id, "checkpoint": which, "epoch": epoch, "phase": phase}
    metadata = dataclasses.replace(exported.metadata, **{**names, **about})
    path = run.path / file_name("model.onnx", which)
    return dataclasses.replace(exported, path=path, metadata=metadata)


def save_answers(path: Path, wrong: set[int], photos: int = PHOTOS, sure: float = 2.0) -> float:
    """Classes in turn; the photos in `wrong` are taken for the next class. Returns the accuracy."""
    labels = np.arange(photos) % len(CLASSES)
    predicted = (labels + np.isin(np.arange(photos), list(wrong))) % len(CLASSES)
    logits = (sure * np.eye(len(CLASSES))[predicted]).astype(np.float32)
    files = np.array([f"{CLASSES[label]}/{i}.jpg" for i, label in enumerate(labels)])
    np.savez(path, logits=logits, labels=labels, files=files)
    return 1 - len(wrong) / photos


def finetune(runs_dir: Path, *, control: bool = True, **info: Any) -> Run:
    """Six photos fixed and one broken, after a trunk of three epochs, with its control."""
    shared = {"classes": CLASSES, "config": CONTROLLED, **info}
    trunk = write_trunk(runs_dir)
    if control:
        beside = write_run(runs_dir, "control", (0.8, 0.8, 0.8), parent_run_id=trunk, **shared)
        save_answers(beside.path / "predictions" / "after.npz", set(range(8)))
    accuracies = (1 - 10 / PHOTOS, 0.7, 1 - 5 / PHOTOS)
    run = write_run(runs_dir, "tuned", accuracies, "finetune", 3, parent_run_id=trunk, **shared)
    save_answers(run.path / "predictions" / "before.npz", set(range(10)), sure=1.0)
    save_answers(run.path / "predictions" / "after.npz", {6, 7, 8, 9, 20}, sure=3.0)
    return read_run(run.path)


def card(run: Run, exported: Exported) -> str:
    return model_card(run, exported, list_runs(run.path.parent), WRITTEN)


def matter(text: str) -> Any:
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


def body(text: str) -> str:
    return re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)


class Page(HTMLParser):
    """What a browser would make of the card: elements with their text, and rows of tables."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.code: list[str] = []
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(markdown.markdown(text, extensions=["tables", "fenced_code"]))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "code":
            self.code.append("")

    def handle_endtag(self, tag: str) -> None:
        self._open.remove(tag)

    def handle_data(self, data: str) -> None:
        if "code" in self._open:
            self.code[-1] += data
        if {"td", "th"} & set(self._open):
            self.rows[-1][-1] += data

    def row(self, name: str) -> list[str]:
        return next(row[1:] for row in self.rows if row[0] == name)


def unfenced(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def plain(text: str) -> str:
    """The card without what is code in every kind of Markdown."""
    return re.sub(r"`[^`\n]+`", "", unfenced(text))


# --- what it says -------------------------------------------------------------------------------


def test_the_card_of_a_real_export(real: tuple[Run, Exported]) -> None:
    run, exported = real
    path = write_card(run, exported)
    text = path.read_text()
    assert path == exported.path.with_name("model-card.md")
    page = Page(body(text))
    assert page.row("model.onnx") == [exported.sha256]
    assert page.row("its checkpoint") == [exported.metadata.checkpoint_sha256]
    assert page.row("Validation photos compared") == [str(exported.parity.photos)]
    assert page.row("Same class as PyTorch") == ["100%"]
    difference = exported.parity.max_abs_logit_difference
    assert float(page.row("Largest difference of a logit")[0]) == pytest.approx(difference, rel=0.1)
    assert "uint8 [N, 64, 64, 3]" in page.row("input photos")[0]
    assert "shorter side has 72 pixels" in text
    assert not list(path.parent.glob(".*"))


def test_hubs_read_the_front_matter(real: tuple[Run, Exported], tmp_path: Path) -> None:
    run = finetune(tmp_path)
    read = ModelCard(card(run, as_if(real[1], run))).data
    assert read.library_name == "onnx"
    assert read.pipeline_tag == "image-classification"
    (accuracy, f1) = read.eval_results
    assert (accuracy.metric_type, f1.metric_type) == ("accuracy", "f1")
    assert accuracy.metric_value == pytest.approx(1 - 5 / PHOTOS, abs=1e-6)
    assert accuracy.dataset_name == "flowers"


def test_its_numbers_are_those_of_the_evidence(real: tuple[Run, Exported], tmp_path: Path) -> None:
    run = finetune(tmp_path)
    text = card(run, as_if(real[1], run))
    page = Page(body(text))
    both = [load_predictions(run.predictions(which)) for which in ("before", "after")]
    found = compare(*both)
    assert (found.fixed, found.broken) == (6, 1)
    assert f"After against before unfreezing: {sentence(found, found.p)}." in text
    assert page.row("Accuracy") == ["83.3%", "91.7%", "+8.3 points"]
    assert page.row("Macro F1") == ["83.3%", "91.7%", "+8.3 points"]
    assert page.row("Loss") == ["0.167", "0.083", "\u22120.083"]
    interval = f"{points(found.low)} to {points(found.high)} points"
    assert page.row("95% interval")[2] == interval
    for i, name in enumerate(CLASSES):
        before, after = (np.mean((one.predicted == i)[one.labels == i]) for one in both)
        recalls = [f"{before:.1%}", f"{after:.1%}", points(float(after - before))]
        assert page.row(name) == ["20", *recalls]
    assert "epoch 2 of 2 (epoch 5 in all), the best by validation accuracy" in text


def test_intervals_and_calibration_are_those_of_others(
    real: tuple[Run, Exported], tmp_path: Path
) -> None:
    from statsmodels.stats.proportion import proportion_confint

    run = finetune(tmp_path)
    page = Page(body(card(run, as_if(real[1], run))))
    for column, (which, right) in enumerate({"before": 50, "after": 55}.items()):
        low, high = proportion_confint(right, PHOTOS, method="wilson")
        assert page.row("95% interval")[column] == f"{low:.1%} to {high:.1%}"
        error = calibration(load_scored(run.predictions(which))).ece
        assert page.row("Calibration error")[column] == f"{error:.1%}"


def test_the_control_is_named(real: tuple[Run, Exported], tmp_path: Path) -> None:
    run = finetune(tmp_path)
    shared = {"classes": CLASSES, "parent_run_id": run.parent_run_id}
    for name, config in (("newer", CONTROLLED), ("another", CONTROLLED | {"seed": 1})):
        beside = write_run(tmp_path, name, (0.8, 0.8, 0.8), config=config, **shared)
        save_answers(beside.path / "predictions" / "after.npz", {30, 31})
    control = control_of(run, controls_by_parent(list_runs(tmp_path)))
    assert control is not None
    assert control.run_id.endswith("newer")
    answers = [load_predictions(one.predictions("after")) for one in (control, run)]
    found = compare(*answers)
    said = f"the control `{control.run_id}`, the head alone: {sentence(found, found.p)}."
    assert said in card(run, as_if(real[1], run))


def test_without_a_control_it_says_so(real: tuple[Run, Exported], tmp_path: Path) -> None:
    run = finetune(tmp_path, control=False)
    assert "There is no control" in card(run, as_if(real[1], run))


def test_before_unfreezing_is_the_trunk(real: tuple[Run, Exported], tmp_path: Path) -> None:
    run = finetune(tmp_path)
    text = card(run, as_if(real[1], run, "before"))
    page = Page(body(text))
    assert page.row("Figure")[0] == "Before unfreezing (this model)"
    assert page.row("Phase") == ["transfer"]
    assert page.row("Checkpoint") == ["before unfreezing, at epoch 3"]
    assert page.row("Validation accuracy")[0].startswith("83.3% (50 of 60 photos")
    assert matter(text)["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.833333
    assert "chose the best" not in text


def test_the_phases_and_their_settings(real: tuple[Run, Exported], tmp_path: Path) -> None:
    settings = {
        "lr": 1e-5,
        "optimizer": "adamw",
        "unfreeze": "20",
        "val_fraction": 0.3,
        "split_seed": 12345,
        "views": 5,
        "limit": 80,
        "schedule": {"name": "step", "drop": 0.5, "epochs_drop": 10, "warmup": 2},
        "augmentation": {"brightness": 0.3, "contrast": 1.0, "crop_from": 235},
    }
    weights = {"source": "/home/someone/nets/b0.pth", "sha256": "abc"}
    run = finetune(tmp_path, config=CONTROLLED | settings, weights=weights)
    text = card(run, as_if(real[1], run))
    page = Page(body(text))
    assert page.row("Phase") == ["transfer", "finetune"]
    assert page.row("Learning rate")[1] == "1e-05"
    assert page.row("Optimizer")[1] == "adamw"
    assert page.row("Schedule")[1] == "step, drop 0.5, epochs drop 10, warmup 2"
    assert page.row("Augmentation")[1] == "5 views in turn, brightness 0.3, crop from 235"
    assert page.row("Trained layers")[1] == "head (--unfreeze 20)"
    assert page.row("Split") == [
        "30% of each class to validate on, drawn by chance (split seed 12345)"
    ]
    assert "Weights at the start: `b0.pth`, SHA-256 `abc`." in text


def test_what_is_off_by_default_is_named_where_it_was_on(
    real: tuple[Run, Exported], tmp_path: Path
) -> None:
    settings = {
        "layer_decay": 0.9,
        "label_smoothing": 0.1,
        "class_weights": "balanced",
        "group_by": "track",
        "val_fraction": 0.3,
        "split_seed": 0,
    }
    run = finetune(tmp_path, config=CONTROLLED | settings)
    (phase,) = run.info["phases"]
    later = {"epoch": 5, "unfrozen_layers": ["head", "block"], "trainable_params": 12_345}
    run.info["phases"] = [{**phase, "gradual": [later]}]
    page = Page(body(card(run, as_if(real[1], run))))
    assert page.row("Freed later")[-1] == "after epoch 5: 12,345 parameters"
    assert page.row("Layer decay")[-1] == "0.9"
    assert page.row("Label smoothing")[-1] == "0.1"
    assert page.row("Class weights")[-1] == "balanced"
    assert page.row("Split")[0].endswith("all photos of a track on one side")
    off = card(finetune(tmp_path / "off", config=CONTROLLED), real[1])
    assert "smoothing" not in off
    assert "Class weights" not in off


def test_a_rounded_model_has_an_accuracy_of_its_own(
    real: tuple[Run, Exported], tmp_path: Path
) -> None:
    run = finetune(tmp_path)
    exported = as_if(real[1], run, precision="int8")
    figures = {"precision": "int8", "accuracy": 0.9, "accuracy_pytorch": 0.905, "photos": 600}
    parity = dataclasses.replace(exported.parity, **figures, kept=("the head (1)",))
    exported = dataclasses.replace(exported, parity=parity, kept_layers=("classifier.1",))
    text = card(run, exported)
    page = Page(body(text))
    assert page.row("File")[0].endswith("MB, int8")
    assert page.row("Accuracy in int8") == ["90.0% on the 600 photos that were compared"]
    assert page.row("Accuracy on them, by PyTorch") == ["90.50%"]
    assert page.row("Kept in float32") == ["the head (1)"]
    assert page.row("Layers in float32") == ["classifier.1"]
    assert "its accuracy was at most 1 point lower" in text
    (metric,) = matter(text)["model-index"][0]["results"][0]["metrics"]
    assert (metric["type"], metric["value"]) == ("accuracy", 0.9)


def test_a_lost_parent_is_named(real: tuple[Run, Exported], tmp_path: Path) -> None:
    run = finetune(tmp_path)
    shutil.rmtree(tmp_path / str(run.parent_run_id))
    text = card(run, as_if(real[1], run))
    assert f"It started from the run `{run.parent_run_id}`, which is no longer there" in text


def test_limits_that_the_data_show(real: tuple[Run, Exported], tmp_path: Path) -> None:
    dataset = {"name": "flowers", "counts": {"train": 9, "val": 60, "test": 7}, "fingerprint": "1"}
    run = finetune(tmp_path, dataset=dataset, sweep={"of": 12})
    uneven = np.array([0] * 40 + [1] * 15 + [2] * 5)
    logits = np.eye(3, dtype=np.float32)[uneven]
    logits[:5] = [0, 0, 1]
    files = np.array([f"val/{i}.jpg" for i in range(PHOTOS)])
    np.savez(run.predictions("after"), logits=logits, labels=uneven, files=files)
    text = card(run, as_if(real[1], run))
    assert "`daisy` has 40 validation photos, `tulip` 5" in text
    assert "2 of 3 classes have fewer than 30 validation photos" in text
    assert "one of 12 of a sweep" in text
    assert "The 7 photos of the test split were not used" in text
    assert "not compared. They were validated on different photos." in text
    assert Page(body(text)).row("Split") == ["by the folders of the data"]


# --- what is not known --------------------------------------------------------------------------


def unknowns(text: str) -> list[str]:
    """What a reader must not meet: values of the program, and empty cells."""
    return re.findall(r"\b(?:None|nan|inf|null)\b|\| +\|", unfenced(body(text)))


def test_a_run_of_which_little_is_known(real: tuple[Run, Exported]) -> None:
    run, exported = real
    bare = Run(run.path, {"phases": [{"name": "transfer", "first_epoch": 0}]})
    text = model_card(bare, exported, [], WRITTEN)
    assert not unknowns(text)
    odd = {"dataset": {"name": 3, "counts": [], "rejected": [1, {}]}, "weights": "x", "sweep": 1}
    odd |= {"config": {"lr": "1", "epochs": None, "schedule": 3, "augmentation": [], "limit": {}}}
    odd |= {"environment": {"versions": [], "cpu": None, "threads": float("nan")}}
    odd |= {"phases": [{"name": "scratch", "first_epoch": 0, "unfrozen_layers": 7}]}
    assert not unknowns(model_card(Run(run.path, odd), exported, [], 1e99))


def test_it_says_by_how_many_processes_a_run_was_trained(real: tuple[Run, Exported]) -> None:
    run, exported = real
    info = {**run.info, "environment": {"device": "cpu", "threads": 1}}
    info["distributed"] = {"world_size": 2, "nodes": 1, "job": "a"}
    text = model_card(Run(run.path, info), exported, [], WRITTEN)
    assert "Trained on `cpu`, 2 processes, 1 thread." in text


@pytest.mark.parametrize("which", ["before", "after"])
@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04"])
def test_lost_predictions(
    real: tuple[Run, Exported], tmp_path: Path, which: str, content: bytes | None
) -> None:
    run = finetune(tmp_path)
    run.predictions(which).unlink()
    if content is not None:
        run.predictions(which).write_bytes(content)
    text = card(run, as_if(real[1], run))
    assert "more than chance to it is not known" in text
    assert Page(body(text)).row("Accuracy") == ["83.3%", "91.7%", "+8.3 points"]  # by the log
    assert not unknowns(text)
    assert str(tmp_path) not in text


def test_answers_of_a_later_epoch_are_not_taken_for_the_models(
    real: tuple[Run, Exported], tmp_path: Path
) -> None:
    """A run that is still training saves a better epoch while an earlier one is exported."""
    run = finetune(tmp_path)
    save_answers(run.predictions("after"), {1})
    text = card(run, as_if(real[1], run))
    assert Page(body(text)).row("Accuracy")[1] == "91.7%"
    assert "98.3%" not in text


@pytest.mark.parametrize("phase", ["direct", "scratch", "transfer"])
def test_runs_without_a_boundary(real: tuple[Run, Exported], tmp_path: Path, phase: Any) -> None:
    accuracies = (0.75,) if phase == "direct" else (0.1, 0.75)
    run = write_run(tmp_path, "one", accuracies, phase, classes=CLASSES)
    save_answers(run.path / "predictions" / "after.npz", set(range(15)))
    done = read_run(run.path)
    epoch = done.epochs[-1].epoch
    text = card(done, as_if(real[1], done, epoch=epoch))
    page = Page(body(text))
    assert page.row("Accuracy") == ["75.0%"]
    assert page.row("Class") == ["Photos", "Recall"]
    assert "unfreezing" not in text
    assert not unknowns(text)


def test_classes_that_no_photo_shows(real: tuple[Run, Exported], tmp_path: Path) -> None:
    """As of a direct run: the pretrained network's classes, of which a few are validated."""
    run = write_run(tmp_path, "direct", (0.5,), "direct")
    logits = np.zeros((4, 1000), np.float32)
    logits[:, 7] = 1
    labels, files = np.array([7, 7, 9, 9]), np.array(list("abcd"))
    np.savez(run.path / "predictions" / "after.npz", logits=logits, labels=labels, files=files)
    names = tuple(f"class {i}" for i in range(1000))
    done = read_run(run.path)
    text = card(done, as_if(real[1], done, classes=names))
    page = Page(body(text))
    assert page.row("class 7") == ["2", "100.0%"]
    assert page.row("class 9") == ["2", "0.0%"]
    assert "No validation photo is of the other 998 classes." in text
    assert "`class 99` and 900 more" in text


# --- names and places ---------------------------------------------------------------------------


def hostile(runs_dir: Path, exported: Exported, name: str) -> tuple[Run, Exported]:
    """`name` wherever a run and its export can hold a text."""
    dataset = {"name": name, "counts": {"train": 9, "val": 60}, "fingerprint": name}
    dataset["rejected"] = [{"file": name, "reason": name}]
    schedule = {"name": name, "warmup": 1}
    config = {"optimizer": name, "unfreeze": name, "schedule": schedule, "split_file": name}
    run = finetune(
        runs_dir,
        dataset=dataset,
        config=CONTROLLED | config,
        weights={"source": name, "sha256": name},
        environment={"versions": {name: name}, "cpu": name, "device": name, "git": name},
    )
    info = json.loads((run.path / "run.json").read_text())
    info["phases"][0]["unfrozen_layers"] = [name] * 5
    (run.path / "run.json").write_text(json.dumps(info | {"status": name}))
    safe = name.replace("/", "-").replace("\0", "")
    moved = run.path.rename(run.path.with_name(safe))
    run = read_run(moved)
    classes = tuple(f"{name}{i}" for i in range(3))
    other = as_if(exported, run, classes=classes, arch=name, run_id=name, versions={name: name})
    return run, dataclasses.replace(other, path=moved / f"{safe}.onnx")


@pytest.mark.parametrize("name", HOSTILE)
def test_names_stay_text(real: tuple[Run, Exported], tmp_path: Path, name: str) -> None:
    run, exported = hostile(tmp_path, real[1], name)
    text = card(run, exported)
    page = Page(body(text))
    allowed = {"h1", "h2", "h3", "p", "ul", "li", "code", "pre"}
    assert page.tags <= allowed | {"table", "thead", "tbody", "tr", "th", "td"}
    assert all(c.isprintable() or c == "\n" for c in text)
    # By no other kind of Markdown either: outside of code nothing is left of a name.
    left = plain(body(text))
    assert not re.search(r"[<>`$@\\]|!\[|\]\(|\*|://|www|bold|heading|alert|exe", left)
    assert sum(line.startswith("```") for line in text.splitlines()) == 6
    assert [line for line in left.splitlines() if line.startswith("#")] == [
        *("# Image classifier: 3 classes of ", "## Intended use and limits", "## Data"),
        *("## Training", "## Results", "### By class", "## Compared with PyTorch"),
        *("## Input and output", "## Use", "## Files and licence"),
    ]
    for table in re.findall(r"(?:^\|.*\n)+", left, re.MULTILINE):
        assert len({row.count("|") for row in table.splitlines()}) == 1
    shown = inert(name).replace("`", r"\x60").replace("|", r"\x7c")
    assert f"{shown}0" in page.code


@pytest.mark.parametrize("name", HOSTILE)
def test_front_matter_is_harmless_as_yaml_and_as_markdown(
    real: tuple[Run, Exported], tmp_path: Path, name: str
) -> None:
    run, exported = hostile(tmp_path, real[1], name)
    text = card(run, exported)
    front = text.removesuffix(body(text))
    assert set(matter(text)) == {
        *("license", "library_name", "pipeline_tag", "tags", "metrics", "model-index")
    }
    assert re.fullmatch(r"[\w\s:.,'-]*", front)
    assert Page(front).tags <= {"hr", "h2", "p", "ul", "li"}
    assert ModelCard(text).data.eval_results


def test_no_place_of_this_machine(real: tuple[Run, Exported], tmp_path: Path) -> None:
    run = finetune(
        tmp_path,
        dataset={
            "name": "/home/someone/secret/flowers",
            "root": "/home/someone/secret/flowers",
            "rejected": [{"file": "C:\\secret\\1.jpg", "reason": "/home/someone/secret"}],
        },
        config=CONTROLLED
        | {
            "data": "/home/someone/secret/flowers",
            "split_file": "/home/someone/secret/s.csv",
            "cache_dir": "/home/someone/secret",
            "runs_dir": str(tmp_path),
        },
        weights={"source": "~/secret/b0.pth", "sha256": "1"},
    )
    arch = "timm:local-dir:/home/someone/secret/net"
    text = card(run, as_if(real[1], run, arch=arch))
    for place in (str(tmp_path), "someone", "secret", str(Path.home()), str(Path.cwd())):
        assert place not in text
    for kept in ("flowers", "1.jpg", "s.csv", "b0.pth", "net"):
        assert f"`{kept}`" in text
    assert str(real[0].path.parents[1]) not in write_card(*real).read_text()


# --- the file -----------------------------------------------------------------------------------


def test_the_same_export_gives_the_same_card(real: tuple[Run, Exported], tmp_path: Path) -> None:
    run = finetune(tmp_path)
    assert card(run, as_if(real[1], run)) == card(read_run(run.path), as_if(real[1], run))
    assert write_card(*real).read_bytes() == write_card(*real).read_bytes()


@pytest.mark.parametrize("which", ["before", "after"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_its_name_follows_the_models(which: Any, precision: Any) -> None:
    named = card_path(Path("a") / file_name("model.onnx", which, precision))
    assert named == Path("a") / file_name("model-card.md", which, precision)


def test_models_in_one_folder_keep_their_cards() -> None:
    models = ["model.onnx", "model-before-fp16.onnx", "flowers.onnx", "models.onnx", "onnx"]
    assert [card_path(Path(name)).name for name in models] == [
        "model-card.md",
        "model-card-before-fp16.md",
        "flowers-card.md",
        "models-card.md",
        "onnx-card.md",
    ]


def test_a_card_that_cannot_be_written(real: tuple[Run, Exported], tmp_path: Path) -> None:
    run, exported = real
    (tmp_path / "model-card.md").mkdir()
    shutil.copy(exported.path, tmp_path)
    there = dataclasses.replace(exported, path=tmp_path / exported.path.name)
    with pytest.raises(CardError, match=r"Cannot write the model card .*model-card\.md"):
        write_card(run, there)
    assert not list(tmp_path.glob(".*"))


def snippets(text: str) -> Sequence[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def test_the_code_in_it_runs(
    real: tuple[Run, Exported],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, exported = real
    photo = next(Path(run.info["dataset"]["root"]).rglob("*.jpg"))
    (tmp_path / "PHOTOS").mkdir()
    shutil.copy(photo, tmp_path / "PHOTOS")
    shutil.copy(photo, tmp_path / "PHOTO.jpg")
    shutil.copy(exported.path, tmp_path)
    monkeypatch.chdir(tmp_path)
    with_thaw, without = snippets(card(run, exported))
    exec(with_thaw, {})
    (best,) = Classifier.load(exported.path).classify([photo], top=1)[0].top
    assert capsys.readouterr().out == f"{Path('PHOTOS') / photo.name} {best}\n"
    exec(without, {})
    label, probability = capsys.readouterr().out.rsplit(maxsplit=1)
    assert label == best.label
    assert float(probability) == pytest.approx(best.probability, abs=1e-5)


def test_the_explorer_can_name_it_without_torch() -> None:
    code = "import sys, export.card; print(sorted({'torch', 'onnxruntime'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
