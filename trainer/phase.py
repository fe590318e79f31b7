"""One phase in one run folder: what trains, what is recorded, what is kept."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from trainer.checkpoint import Checkpoint, save_checkpoint
from trainer.config import Config, OptimizerName
from trainer.data import Photos, Split
from trainer.depth import distances
from trainer.environment import peak_memory_bytes
from trainer.files import write_atomically
from trainer.graphs import TrainingForward
from trainer.journal import Entry, Journal, Kept
from trainer.loop import Evaluation, Objective, TrainingResult, diverged
from trainer.model import head_name, set_train_mode, trainable_modules, trainable_parameters
from trainer.prefix import Cut, Trace
from trainer.resume import Resume
from trainer.run_writer import RunWriter
from trainer.runlog import RunError
from trainer.schedule import learning_rate
from trainer.schema import CHECKPOINTS, EpochRecord, PhaseRecord, Status, ThawError, Unfreezing
from trainer.start import Start
from trainer.tensorboard import TensorBoardLog
from trainer.track import follow
from trainer.weight_change import weight_change

# Checkpoints are written at least this often, and at the end. An epoch may take milliseconds, and
# writing a network takes longer than that; the journal has every epoch.
_SAVE_SECONDS: Final = 30.0


# Of a group of an optimizer's parameters: the factor of its learning rate.
_SCALE: Final = "scale"


def make_optimizer(
    network: nn.Module,
    name: OptimizerName,
    lr: float,
    scales: Mapping[str, float] | None = None,
    gradual: bool = False,
) -> torch.optim.Optimizer:
    """A fresh optimizer over what trains; nothing is carried over from an earlier phase.

    `scales` are the factors of the learning rate of those parameters, by name, whose is not 1;
    `gradual` says that some have no gradients in the first steps.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter, value in network.named_parameters():
        if value.requires_grad:
            groups.setdefault((scales or {}).get(parameter, 1.0), []).append(value)
    parameters: list[dict[str, Any]] = [
        {"params": values} | ({"lr": lr * scale, _SCALE: scale} if scales else {})
        for scale, values in sorted(groups.items(), reverse=True)
    ]
    match name:
        case "adam":
            return torch.optim.Adam(parameters, lr, fused=True)
        case "adamw":
            return torch.optim.AdamW(parameters, lr, fused=True)
        case "sgd":
            # Fused it takes no parameters whose momentum begins later than that of others.
            return torch.optim.SGD(parameters, lr, momentum=0.9, fused=not gradual)


def layer_scales(tail: nn.Module, network: nn.Module, decay: float) -> dict[str, float]:
    """For what trains of a network's tail the factors of its learning rate, by parameter; empty
    where all train at the same."""
    if decay == 1:
        return {}
    away = distances(network)
    trained = (name for name, value in tail.named_parameters() if value.requires_grad)
    return {name: decay ** away[name] for name in trained}


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The head's learning rate; that of other layers in proportion."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(_SCALE, 1.0)


@dataclass(frozen=True)
class Stage:
    """What trains after `after` epochs of a phase, until more is freed.

    `unfrozen` names the modules that own what trains, `training` those in training mode meanwhile.
    """

    after: int
    unfrozen: tuple[str, ...]
    training: frozenset[str]
    params: int
    backbone_trains: bool

    @classmethod
    def of(cls, network: nn.Module, after: int = 0) -> Stage:
        """As the network is frozen now; puts its modules into their modes."""
        set_train_mode(network)
        unfrozen = trainable_modules(network)
        return cls(
            after,
            unfrozen,
            frozenset(n for n, m in network.named_modules() if m.training),
            trainable_parameters(network),
            len(unfrozen) > _head_size(network),
        )


@dataclass(frozen=True)
class Part:
    """The part of a network that a phase trains, before any run has its copy of it.

    `module` maps what crosses over at `cut` (None: normalised photos) to logits. Each of `stages`
    frees what the one before it does, and more: the last one decides where the cut is.
    """

    module: nn.Module
    cut: Cut | None
    stages: tuple[Stage, ...]
    linear: bool

    @classmethod
    def of(cls, network: nn.Module, trace: Trace | None, stages: Sequence[Stage]) -> Part:
        """As the network is frozen now, in the last of `stages`; shares its modules."""
        cut = trace.cut() if trace is not None else None
        module = trace.part(cut, None) if trace is not None and cut is not None else network
        all_trains = cut is not None and all(p.requires_grad for p in module.parameters())
        return cls(module, cut, tuple(stages), all_trains and len(stages) == 1)

    @property
    def unfrozen(self) -> tuple[str, ...]:
        """The modules that own what trains, sooner or later."""
        return self.stages[-1].unfrozen

    @property
    def training(self) -> frozenset[str]:
        """The modules that are in training mode, sooner or later."""
        return self.stages[-1].training

    def stage(self, phase_epoch: int) -> Stage:
        """The one in which an epoch trains; epoch 0 shows the first."""
        return next(
            (one for one in reversed(self.stages) if one.after < phase_epoch), self.stages[0]
        )

    def copy(self) -> nn.Module:
        """A copy that trains by itself; what is frozen stays shared."""
        shared: list[Tensor] = []
        for name, module in self.module.named_modules():
            if name not in self.unfrozen:
                shared += module.parameters(recurse=False)
            if name not in self.training:
                shared += module.buffers(recurse=False)
        twin = copy.deepcopy(self.module, {id(tensor): tensor for tensor in shared})
        # Not as the network is frozen now: that may be for another run's part by now.
        twin.requires_grad_(False)
        free(twin, self.unfrozen)
        return twin


def free(module: nn.Module, names: Iterable[str]) -> None:
    """Let what these modules own train."""
    for name in names:
        for parameter in module.get_submodule(name).parameters(recurse=False):
            parameter.requires_grad_(True)


@dataclass
class Sample:
    """A copy of a part that trains outside of any run; see `trainer.loop.Learner`."""

    tail: nn.Module
    forward: TrainingForward
    cut: Cut | None
    training: frozenset[str]
    optimizer: torch.optim.Optimizer
    objective: Objective
    linear: bool

    @classmethod
    def of(
        cls,
        part: Part,
        optimizer: OptimizerName,
        rate: float,
        objective: Objective | None = None,
        scales: Mapping[str, float] | None = None,
        stage: Stage | None = None,
    ) -> Sample:
        """In `stage`, the last one unless it is given."""
        tail, stage = part.copy(), stage or part.stages[-1]
        made = make_optimizer(tail, optimizer, rate, scales, gradual=len(part.stages) > 1)
        tail.requires_grad_(False)
        free(tail, stage.unfrozen)
        return cls(
            tail,
            TrainingForward(tail),
            part.cut,
            stage.training,
            made,
            objective or Objective(),
            part.linear,
        )


class PhaseRun:
    """One phase in one run folder: records what is measured, keeps the best.

    The epochs themselves are driven from outside (together.py), for one or for many at a time.
    `resume` is a run that was interrupted, with its last checkpoint, to go on with. `watch`, where
    there is one, says after an epoch why training on is not worth while, or None.
    """

    watch: Callable[[EpochRecord], str | None] | None = None

    def __init__(
        self,
        config: Config,
        start: Start,
        writer: RunWriter,
        part: Part,
        objective: Objective,
        val: Split,
        device: torch.device,
        resume: Resume | None = None,
    ) -> None:
        self.config, self.start, self.writer = config, start, writer
        self._val, self._device = val, device
        self.tail, self.cut = part.copy(), part.cut
        self.part, self.linear = part, part.linear
        self.objective = objective
        self.optimizer: torch.optim.Optimizer
        self.best: EpochRecord | None = None
        self.boundary: EpochRecord | None = None
        self.last: EpochRecord | None = None
        self.status: Status = "running"
        self.error: ThawError | None = None
        self._unsaved: dict[str, Kept] = {}
        self._saved = -math.inf
        self._open_logs(resume)
        self._scales = layer_scales(self.tail, start.network, config.layer_decay)
        self._enter(part.stages[0])
        if resume is not None:
            self._go_on(resume)
        else:
            self._write_down()

    def _open_logs(self, resume: Resume | None) -> None:
        """What is written beside run.json and the log."""
        path, epoch = self.writer.path, None if resume is None else resume.checkpoint.epoch + 1
        self._journal = Journal(path / CHECKPOINTS, self.config.phase)
        self._board = TensorBoardLog(path, epoch)
        follow(path)

    def _enter(self, stage: Stage) -> None:
        """Let train what trains in a stage, and nothing else."""
        self.tail.requires_grad_(False)
        free(self.tail, stage.unfrozen)
        self.stage, self.training = stage, stage.training
        self.forward = TrainingForward(self.tail)  # a graph holds what trained when it was captured

    def _write_down(self) -> None:
        """What this phase will train, before it does."""
        config, start, (first, *later) = self.config, self.start, self.part.stages
        gradual = tuple(map(self._unfreezing, later))
        self.writer.start_phase(
            PhaseRecord(
                config.phase, start.first_epoch, None, first.unfrozen, first.params, gradual
            )
        )
        if self._scales:
            self.writer.update(layer_rates=self._layer_rates())

    def _unfreezing(self, stage: Stage) -> Unfreezing:
        return Unfreezing(self.start.first_epoch + stage.after, stage.unfrozen, stage.params)

    def _layer_rates(self) -> list[dict[str, Any]]:
        """The initial learning rates, head first: {rate, modules}."""
        groups: dict[float, dict[str, None]] = {}
        for name, scale in self._scales.items():
            groups.setdefault(scale, {})[name.rpartition(".")[0]] = None
        return [
            {"rate": self.config.learning_rate * scale, "modules": list(modules)}
            for scale, modules in sorted(groups.items(), reverse=True)
        ]

    def _go_on(self, resume: Resume) -> None:
        self.boundary, *trained = resume.records
        self.last = resume.records[-1]
        self.best = max(trained, key=lambda record: record.rank, default=None)
        self._saved = time.monotonic()
        with torch.no_grad():
            for name, value in self._changing():
                value.copy_(resume.checkpoint.state_dict[name])
        self._unsaved = dict(resume.unsaved)
        if resume.checkpoint.optimizer is not None:
            self.optimizer = self._new_optimizer()
            self.optimizer.load_state_dict(resume.checkpoint.optimizer)
        self._enter(self.part.stage(resume.phase_epoch))

    def _new_optimizer(self) -> torch.optim.Optimizer:
        """Over all that trains sooner or later: what has no gradient is left as it is, and what is
        freed later begins with a state of its own."""
        config = self.config
        self._enter(self.part.stages[-1])
        gradual = len(self.part.stages) > 1
        made = make_optimizer(
            self.tail, config.optimizer, config.learning_rate, self._scales, gradual
        )
        self._enter(self.part.stages[0])
        return made

    @property
    def phase_epoch(self) -> int | None:
        """The last epoch that was recorded, counted in this phase; None: not even epoch 0."""
        return self.last.phase_epoch if self.last is not None else None

    def begin(self, evaluation: Evaluation, seconds: float) -> EpochRecord:
        """Epoch 0: what was there before any step."""
        if not math.isfinite(evaluation.loss):
            raise diverged(evaluation.loss, "the evaluation before any step")
        record = self._record(0, evaluation, None, seconds, len(self._val) / seconds)
        self.boundary = record
        if self.config.phase == "finetune":
            self._save_predictions("before", evaluation.logits)
        self._keep("last", record)
        if self.config.phase == "direct":
            self._keep_best(record, evaluation)
        self.save()  # a run that is killed has something to go on from
        return record

    def start_epoch(self, phase_epoch: int) -> None:
        if phase_epoch == 1:
            self.optimizer = self._new_optimizer()
        stage = self.part.stage(phase_epoch)
        if stage.after != self.stage.after:
            self._enter(stage)
            self.writer.unfreeze(self.config.phase, self._unfreezing(stage))
        set_rate(self.optimizer, self._rate(phase_epoch))

    def end_epoch(
        self,
        phase_epoch: int,
        trained: TrainingResult,
        evaluation: Evaluation,
        seconds: float,
        images_per_second: float,
    ) -> EpochRecord:
        if not math.isfinite(evaluation.loss):
            epoch = self.start.first_epoch + phase_epoch
            raise diverged(evaluation.loss, f"the validation after epoch {epoch}")
        record = self._record(phase_epoch, evaluation, trained, seconds, images_per_second)
        self._keep("last", record)
        if self.best is None or record.rank > self.best.rank:
            self._keep_best(record, evaluation)
        self._journal.write(Entry(self._unsaved["last"], self._unsaved.get("best")))
        if text := self._enough(record):
            self.writer.note(text)
            tqdm.write(f"{self.writer.run_id}: {text}")
            self.end("done")
        return record

    def _enough(self, record: EpochRecord) -> str | None:
        """Why to stop after this epoch, if that is so."""
        patience = self.config.early_stop
        since = record.phase_epoch - self.best.phase_epoch if self.best else 0
        if patience is not None and since >= patience:
            return f"Stopped early: no better validation accuracy for {patience} epochs."
        return None if self.watch is None else self.watch(record)

    def end(self, status: Status, reason: str | None = None) -> None:
        """Whatever ends the run, its checkpoints are written and its log says how."""
        if self.status != "running":
            return
        self.status = status
        try:
            self.save()
            self._journal.remove()
        except ThawError as error:
            if status == "done":  # but what it ends with is not on disk
                self.status, status, reason = "failed", "failed", str(error)
            raise
        finally:
            if status == "done" and self.last is not None:
                self.writer.end_phase(self.last.epoch)
                self.writer.update(weight_change=self._weight_change())
            self.writer.close(status, reason)

    def _weight_change(self) -> dict[str, dict[str, float]]:
        """How far the last epoch's weights are from the start's: of the backbone and of the head,
        each where it trained."""
        head = head_name(self.start.network)
        parts: dict[str, list[str]] = {"backbone": [], "head": []}
        for name in self.part.unfrozen:
            parts["head" if _is_in(head, name) else "backbone"].append(name)
        found = {
            part: weight_change(self.start.network, self.tail, names)
            for part, names in parts.items()
        }
        return {part: change.to_dict() for part, change in found.items() if change is not None}

    def fail(self, error: ThawError) -> None:
        """End this run for a reason of its own; what it kept so far is written, if it can be."""
        try:
            self.writer.check_there()
        except RunError as gone:  # whatever could not be written, this is why
            error = gone
        self.error = error
        try:
            self.end("failed", str(error))
        except ThawError:
            self._unsaved.clear()  # the reason is already known

    def save_sometimes(self) -> None:
        """Call it when all that train together have written their journals of an epoch: what is
        saved is then never ahead of any of them."""
        if self.status == "running" and time.monotonic() - self._saved > _SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Write the checkpoints and predictions that are newer than those on disk."""
        for kind in ("best", "last"):  # a run goes on from the last: it is never ahead of the best
            if (kept := self._unsaved.get(kind)) is not None:
                if kept.logits is not None:
                    self._save_predictions("after", kept.logits)
                path = self.writer.checkpoint(f"{self.config.phase}-{kind}")
                save_checkpoint(path, self._checkpoint(kept))
                del self._unsaved[kind]
        self._saved = time.monotonic()

    def _rate(self, phase_epoch: int) -> float:
        """The learning rate of an epoch; epoch 0 shows that of the first."""
        config = self.config
        done = self.start.epochs_done
        return learning_rate(
            config.schedule,
            config.learning_rate,
            done + max(0, phase_epoch - 1),
            done + config.epochs,
        )

    def _record(
        self,
        phase_epoch: int,
        evaluation: Evaluation,
        trained: TrainingResult | None,
        seconds: float,
        images_per_second: float,
    ) -> EpochRecord:
        rate = self._rate(phase_epoch)
        record = EpochRecord(
            phase=self.config.phase,
            epoch=self.start.first_epoch + phase_epoch,
            phase_epoch=phase_epoch,
            train_loss=trained.loss if trained else None,
            train_acc=trained.accuracy if trained else None,
            val_loss=evaluation.loss,
            val_acc=evaluation.accuracy,
            val_top5=evaluation.top5,
            val_macro_f1=evaluation.macro_f1,
            lr_head=rate,
            lr_backbone=rate * self._backbone_scale(),
            trainable_params=self.stage.params,
            seconds=seconds,
            images_per_second=images_per_second,
            peak_memory_bytes=peak_memory_bytes(self._device),
            time=time.time(),
        )
        self.writer.epoch(record)
        self.last = record
        self._board.epoch(record)
        return record

    def _backbone_scale(self) -> float:
        """The factor of the fastest of the layers that train besides the head."""
        if not self._scales:
            return float(self.stage.backbone_trains)
        return max(
            (
                scale
                for name, scale in self._scales.items()
                if scale < 1 and name.rpartition(".")[0] in self.stage.unfrozen
            ),
            default=0.0,
        )

    def _keep_best(self, record: EpochRecord, evaluation: Evaluation) -> None:
        self.best = record
        self._keep("best", record, evaluation)

    def _keep(self, kind: str, record: EpochRecord, evaluation: Evaluation | None = None) -> None:
        """Remember the network as it is now; written to disk from time to time."""
        changed = {name: value.clone() for name, value in self._changing()}
        stepped = kind == "last" and record.phase_epoch > 0
        optimizer = copy.deepcopy(self.optimizer.state_dict()) if stepped else None
        logits = None if evaluation is None else evaluation.logits
        self._unsaved[kind] = Kept(record.epoch, changed, optimizer, logits)

    def _checkpoint(self, kept: Kept) -> Checkpoint:
        start = self.start
        state = {
            name: value.detach().cpu().contiguous()
            for name, value in {**start.network.state_dict(), **kept.changed}.items()
        }
        return Checkpoint(
            start.spec,
            start.classes,
            start.preprocess,
            self.config.phase,
            kept.epoch,
            state,
            optimizer=kept.optimizer,
        )

    def _changing(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in self.tail.state_dict().items():
            owner = name.rpartition(".")[0]
            if owner in self.part.unfrozen or owner in self.part.training:
                yield name, value

    def _save_predictions(self, name: str, logits: NDArray[np.float32]) -> None:
        """Per-photo validation logits float32 [N, classes], labels int64 [N], files str [N]."""
        buffer = io.BytesIO()
        np.savez(
            buffer,
            logits=logits,
            labels=self._val.labels,
            files=np.array(self._val.files, dtype=np.str_),
        )
        path = self.writer.predictions(name)
        try:
            write_atomically(path, buffer.getvalue())
        except OSError as error:
            raise RunError(f"Cannot write {path}: {error.strerror}.") from error


def _head_size(network: nn.Module) -> int:
    head = head_name(network)
    return sum(_is_in(head, name) for name in trainable_modules(network))


def _is_in(module: str, name: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def pretrained_labels(photos: Photos, start: Start) -> Split:
    """Validation photos labelled by the classes of the pretrained head."""
    outputs = np.array(outputs_of(photos.classes, start.classes))
    return dataclasses.replace(photos.val, labels=outputs[photos.val.labels])


def outputs_of(classes: Sequence[str], pretrained: Sequence[str]) -> list[int]:
    """For each class the output of a pretrained head.

    Class folders named like ImageNet classes are matched by name. Where any is not, class number i
    counts as output i, which is how the labs extended their labels to 1000.
    """
    wanted = [_plain(name) for name in classes]
    known = {_plain(name): index for index, name in reversed(list(enumerate(pretrained)))}
    unknown = [name for name in wanted if name not in known]
    if unknown:
        print(
            f"Note: {len(unknown)} classes (such as {unknown[0]!r}) are not known to the "
            "pretrained network; class number i is compared with its output i, so expect chance."
        )
    return [i if unknown else known[name] for i, name in enumerate(wanted)]


def _plain(name: str) -> str:
    """`n01530575_brambling` and `Brambling` are the same class."""
    head, _, rest = name.partition("_")
    is_wnid = len(head) == 9 and head[0] == "n" and head[1:].isdecimal()
    return (rest if is_wnid else name).replace("_", " ").replace("-", " ").strip().lower()
