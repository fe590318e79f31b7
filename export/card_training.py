"""The first part of a model card: what the model is, its limits, how it was trained."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from export.card_facts import Card, Network, stated
from export.card_markdown import (
    bullets,
    code,
    count,
    facts,
    finite,
    last_name,
    moment,
    name_list,
    placeless,
    plain,
    shown,
    table,
)
from trainer.evidence import FEW
from trainer.runlog import Run

if TYPE_CHECKING:
    pass

_UNEVEN: Final = 2  # times as many photos in the largest class as in the smallest
_PHASES: Final = {
    "direct": "the pretrained network as it is, not trained",
    "scratch": "random weights, everything trained",
    "transfer": "backbone frozen, head trained",
    "finetune": "top layers unfrozen",
}


def front_matter(card: Card) -> Iterator[str]:
    import yaml  # type: ignore[import-untyped]

    arch, data = _label(placeless(card.exported.metadata.arch)), _label(card.data)
    record, rounded = card.own.record, _rounded_accuracy(card)
    accuracy = card.own.accuracy if rounded is None else rounded
    f1 = finite(record.val_macro_f1) if record and rounded is None else None
    measured = {"accuracy": ("Accuracy", accuracy), "f1": ("Macro F1", f1)}
    metrics = [
        {"type": kind, "name": f"{name} on the validation photos", "value": round(value, 6)}
        for kind, (name, value) in measured.items()
        if value is not None
    ]
    matter: dict[str, Any] = {
        "license": "unknown",
        "library_name": "onnx",
        "pipeline_tag": "image-classification",
        "tags": ["onnx", "image-classification", "transfer-learning", "thaw", arch],
    }
    if metrics:
        dataset = {"type": "imagefolder", "name": data, "split": "validation"}
        result = {"task": {"type": "image-classification"}, "dataset": dataset, "metrics": metrics}
        matter["metrics"] = [metric["type"] for metric in metrics]
        matter["model-index"] = [{"name": f"{arch}-{data}", "results": [result]}]
    yield f"---\n{yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)}---"


def _rounded_accuracy(card: Card) -> float | None:
    """What a file that is less precise than the network itself reached in the comparison."""
    if card.exported.metadata.precision == "fp32":
        return None
    return finite(card.exported.parity.to_dict().get("accuracy"))


def _label(name: str) -> str:
    """Letters and digits only: who does not know front matter reads it as Markdown."""
    return re.sub(r"[\W_]+", "-", name).strip("-").lower() or "unnamed"


def summary(card: Card) -> Iterator[str]:
    about, exported, rounded = card.exported.metadata, card.exported, _rounded_accuracy(card)
    many = count(len(card.classes), "class", "classes")
    yield f"# Image classifier: {many}{f' of {code(card.data)}' if card.data else ''}"
    yield f"It tells apart {name_list(card.classes)}."
    versions = ", ".join(f"{name} {version}" for name, version in sorted(about.versions.items()))
    yield facts(
        ("File", f"{code(exported.path.name)}, {exported.size / 1e6:.1f} MB, {about.precision}"),
        {
            "Network": code(placeless(about.arch)),
            "Checkpoint": _checkpoint(card),
            "Validation accuracy": _accuracy(card.own),
            f"Accuracy in {about.precision}": ""
            if rounded is None
            else f"{rounded:.1%} on the {exported.parity.photos:,} photos that were compared",
            "Run": code(about.run_id),
            "Exported": ", ".join(filter(None, (moment(card.written), f"with {code(versions)}"))),
        },
    )


def _checkpoint(card: Card) -> str:
    epoch, record = card.exported.metadata.epoch, card.own.record
    if card.is_before:
        return f"before unfreezing, at epoch {epoch:,}"
    if card.run.phase == "direct":
        return _PHASES["direct"]
    where = (
        "after unfreezing" if card.before else f"phase {card.run.phase}: {_what(card.run.phase)}"
    )
    if record is None or not card.epochs:
        return f"{where}; epoch {epoch:,}"
    counted = f" (epoch {epoch:,} in all)" if record.phase_epoch != epoch else ""
    best = f"epoch {record.phase_epoch:,} of {card.epochs:,}{counted}"
    return f"{where}; {best}, the best by validation accuracy"


def _what(phase: str | None) -> str:
    return _PHASES.get(phase or "", "")


def _accuracy(network: Network) -> str:
    accuracy, answers = network.accuracy, network.answers
    if accuracy is None or answers is None:
        return "" if accuracy is None else f"{accuracy:.1%}"
    photos = count(len(answers.right), "photo", "photos")
    return f"{accuracy:.1%} ({answers.right.sum():,} of {photos}; 95% interval {interval(network)})"


def interval(network: Network) -> str:
    if network.answers is None:
        return ""
    low, high = network.answers.interval
    return f"{low:.1%} to {high:.1%}"


def limits(card: Card) -> Iterator[str]:
    yield "## Intended use and limits"
    yield (
        "For photos like those it was trained on, each of which shows one of the classes. Measure "
        "it on photos of your own before you rely on it."
    )
    yield bullets(
        (
            "A photo of anything else still gets one of the classes: there is no answer for none "
            "of them.",
            "Photos from another source (camera, place, light, season) can be recognised far worse "
            "than the figures here say.",
            *_flattered(card),
            *_certainty(card),
            *_uneven(card),
        )
    )


def _flattered(card: Card) -> Iterator[str]:
    """Why the accuracy on new photos will be lower than that on the validation photos."""
    if not card.is_before and card.epochs > 1:
        yield (
            f"The validation photos chose the best of {card.epochs:,} epochs, so the accuracy on "
            "them flatters the model."
        )
    if not card.is_before and card.sweep > 1:
        yield (
            f"The run is one of {card.sweep:,} of a sweep on the same validation photos. If it was "
            "chosen as the best of them, that flatters it further."
        )
    yield (
        "Where several photos show the same object or scene, some may have been trained on and "
        "others validated on, which flatters the accuracy."
    )
    prints = (stated(run, "dataset", "fingerprint") for run in (*card.lineage, card.run))
    if len({one for one in prints if isinstance(one, str)}) > 1:
        yield (
            "Its phases were not trained on the same photos and split, so photos validated on may "
            "have been trained on before."
        )
    counts = stated(card.run, "dataset", "counts")
    if isinstance(counts, Mapping) and (tests := int(finite(counts.get("test")) or 0)):
        photos = count(tests, "photo", "photos")
        yield f"The {photos} of the test split were not used: not trained on, and not measured."
    elif isinstance(counts, Mapping):
        yield "There was no test split: no photo was kept apart to measure the final model on."


def _certainty(card: Card) -> Iterator[str]:
    said = "The probabilities are the softmax of the logits, not the chance of being right"
    answers = card.own.answers
    yield said + (
        f": on the validation photos that of the answers is {answers.confidence.mean():.1%} on "
        f"average, and {answers.accuracy:.1%} of them are right (expected calibration error "
        f"{answers.calibration_error:.1%})."
        if answers
        else "."
    )


def _uneven(card: Card) -> Iterator[str]:
    if (answers := card.own.answers) is None:
        return
    photos = np.bincount(answers.said.labels)
    there = np.flatnonzero(photos)
    least, most = there[photos[there].argmin()], photos.argmax()
    if photos[most] >= _UNEVEN * photos[least]:
        yield (
            f"The classes are uneven: {code(card.classes[most])} has {photos[most]:,} validation "
            f"photos, {code(card.classes[least])} {photos[least]:,}. The accuracy is mostly that "
            "of the large ones."
        )
    few = int((photos[there] < FEW).sum())
    if few:
        every = (
            "Every class has" if few == len(there) else f"{few:,} of {len(there):,} classes have"
        )
        yield (
            f"{every} fewer than {FEW} validation photos; in the smallest one photo is "
            f"{100 / photos[least]:.2g} points of recall."
        )


def data(card: Card) -> Iterator[str]:
    train, val, test = (
        shown(stated(card.run, "dataset", "counts", split)) for split in ("train", "val", "test")
    )
    limit = shown(stated(card.run, "config", "limit"))
    yield "## Data"
    yield facts(
        ("Data", code(card.data) if card.data else "name not known"),
        {
            "Trained on": train and f"{train} photos",
            "Validated on": val and f"{val} photos; by class under Results",
            "Test split": test and f"{test} photos",
            "Limit": limit and f"{limit} photos of each class",
            "Split": _split(card),
            "Left out": _rejected(card.run),
            "Fingerprint": shown(stated(card.run, "dataset", "fingerprint")),
        },
    )


def _split(card: Card) -> str:
    file = stated(card.run, "config", "split_file")
    if isinstance(file, str):
        return f"by the file {code(last_name(file))}"
    folders = {name.partition("/")[0].lower() for name in _photo_names(card)}
    if folders and folders <= {"val", "valid", "validation"}:
        return "by the folders of the data"
    share = finite(stated(card.run, "config", "val_fraction"))
    seed = plain(stated(card.run, "config", "split_seed"))
    if share is None or not seed:
        return ""
    by_track = stated(card.run, "config", "group_by") == "track"
    whole = "; all photos of a track on one side" if by_track else ""
    return f"{share:.0%} of each class to validate on, drawn by chance (split seed {seed}){whole}"


def _photo_names(card: Card) -> Sequence[str]:
    return card.own.answers.said.files if card.own.answers else ()


def _rejected(run: Run) -> str:
    """How many and which; not why, because a reason can name a place on this machine."""
    rejected = stated(run, "dataset", "rejected")
    if not isinstance(rejected, list) or not rejected:
        return ""
    files = [one.get("file") for one in rejected if isinstance(one, Mapping)]
    named = name_list([placeless(file) for file in files if isinstance(file, str)])
    return f"{count(len(rejected), 'photo', 'photos')} that could not be read" + (
        f": {named}" if named else ""
    )


def training(card: Card) -> Iterator[str]:
    phases = [(run, phase) for run in card.lineage for phase in run.info.get("phases") or ()]
    yield "## Training"
    if phases:
        columns = [_phase_facts(run, phase) for run, phase in phases]
        rows = [(name, [column[name] for column in columns]) for name in columns[0]]
        head = ("Phase", *(phase["name"] for _, phase in phases))
        known = [
            [name, *(cell or "not known" for cell in cells)] for name, cells in rows if any(cells)
        ]
        yield table(head, known)
    yield bullets(
        (
            _parent_gone(card),
            _weights(card),
            "BatchNorm never trained: neither its weights nor its statistics."
            if {run.phase for run in card.lineage} & {"transfer", "finetune"}
            else "",
            _environment(card),
        )
    )


def _phase_facts(run: Run, phase: Mapping[str, Any]) -> dict[str, str]:
    """The same names for every phase; "" for what is not known or did not matter."""
    config, name = stated(run, "config") or {}, phase["name"]
    trained = sum(one.phase == name and one.phase_epoch > 0 for one in run.epochs)
    planned = int(finite(config.get("epochs")) or 0)
    about = {
        "What": _what(name),
        "Run": code(run.run_id),
        "Started": moment(run.info.get("started")),
    }
    training = {
        "Epochs": f"{trained:,}{f' of {planned:,}' if trained < planned else ''}"
        if trained
        else "",
        "Trained layers": _layers(phase, config),
        "Trained parameters": shown(phase.get("trainable_params")),
        "Freed later": _freed_later(phase),
        "Learning rate": shown(config.get("lr")),
        "Layer decay": _unless(config.get("layer_decay"), 1),
        "Schedule": _schedule(config.get("schedule")),
        "Optimizer": shown(config.get("optimizer")),
        "Batch size": shown(config.get("batch_size")),
        "Label smoothing": _unless(config.get("label_smoothing"), 0),
        "Class weights": _unless(config.get("class_weights"), "off"),
        "Augmentation": _augmentation(config),
        "Seed": plain(config.get("seed")),
    }
    return about | (training if name != "direct" else dict.fromkeys(training, ""))


def _layers(phase: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    listed = phase.get("unfrozen_layers")
    names = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    said = name_list(names)
    if len(names) > 3:
        said = f"{len(names):,} modules, {code(names[0])} to {code(names[-1])}"
    asked = config.get("unfreeze") if names and phase["name"] == "finetune" else None
    return f"{said} ({code(f'--unfreeze {asked}')})" if isinstance(asked, str) else said


def _freed_later(phase: Mapping[str, Any]) -> str:
    """What a gradual phase freed after its first stage, and when."""
    listed = phase.get("gradual")
    stages = [one for one in listed if isinstance(one, Mapping)] if isinstance(listed, list) else []
    return "; ".join(
        f"after epoch {shown(one.get('epoch'))}: {shown(one.get('trainable_params'))} parameters"
        for one in stages
    )


def _unless(value: Any, default: float | str) -> str:
    return "" if value is None or value == default else shown(value)


def _schedule(chosen: Any) -> str:
    if not isinstance(chosen, Mapping) or not isinstance(name := chosen.get("name"), str):
        return ""
    used = {"exponential": ["decay"], "step": ["drop", "epochs_drop"]}.get(name, [])
    return _settings(code(name), chosen, [*used, *(["warmup"] if chosen.get("warmup") else [])])


def _augmentation(config: Mapping[str, Any]) -> str:
    chosen, views = config.get("augmentation"), config.get("views")
    if not isinstance(chosen, Mapping):
        return ""
    off = {"brightness": 0, "contrast": 1, "rotation": 0, "crop_from": None, "noise": 0}
    used = [name for name, value in off.items() if chosen.get(name, value) != value]
    turns = f"{views:,} views in turn" if used and isinstance(views, int) else ""
    return _settings(turns, chosen, used) or "none"


def _settings(first: str, chosen: Mapping[str, Any], names: Iterable[str]) -> str:
    said = (f"{name.replace('_', ' ')} {shown(chosen.get(name))}" for name in names)
    return ", ".join(filter(None, (first, *said)))


def _parent_gone(card: Card) -> str:
    oldest = card.lineage[0] if card.lineage else card.run
    if oldest.parent_run_id is None:
        return ""
    return (
        f"It started from the run {code(oldest.parent_run_id)}, which is no longer there: what "
        "was trained before is not known."
    )


def _weights(card: Card) -> str:
    source, digest = (stated(card.run, "weights", name) for name in ("source", "sha256"))
    if not isinstance(source, str):
        return ""
    known = f", SHA-256 {code(digest)}" if isinstance(digest, str) else ""
    return f"Weights at the start: {code(placeless(source))}{known}."


def _environment(card: Card) -> str:
    if not card.lineage:
        return ""
    names = ("device", "cpu", "threads", "versions", "git")
    device, cpu, threads, versions, git = (
        stated(card.lineage[-1], "environment", name) for name in names
    )
    processes = stated(card.lineage[-1], "distributed", "world_size")
    packages = versions.items() if isinstance(versions, Mapping) else ()
    named = ", ".join(f"{name} {version}" for name, version in packages if version)
    parts = (
        shown(device),
        shown(cpu),
        count(processes, "process", "processes") if isinstance(processes, int) else "",
        count(threads, "thread", "threads") if isinstance(threads, int) else "",
        shown(named),
        f"commit {code(git)} of Thaw" if isinstance(git, str) else "",
    )
    return f"Trained on {', '.join(filter(None, parts))}." if any(parts) else ""
