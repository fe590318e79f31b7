"""`python -m trainer`: flags -> Config -> fit."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any, Final, NoReturn, get_args

from trainer.cache import parse_size
from trainer.cli import guarded, inert
from trainer.config import (
    DEFAULT_LR,
    Augmentation,
    Config,
    Precision,
    Schedule,
    default_cache_dir,
    whole,
)
from trainer.process import launched, prepare_process, ranks, restart_with_huge_pages
from trainer.runlog import Run
from trainer.schema import PHASES, ThawError

_EPILOG: Final = """\
examples:
  python -m trainer --phase finetune                      both phases on the embedded sample
  python -m trainer --phase transfer --data photos/       the head, on your own class folders
  python -m trainer --phase finetune --data photos/ --unfreeze 20 --lr 1e-5
  python -m trainer sweep --lr 1e-4 1e-6 --unfreeze 20 all   many finetunes from one parent
  python -m trainer --resume auto                         go on where it was interrupted
  torchrun --nproc-per-node 2 -m trainer --phase finetune ...   one training by two processes
  python -m trainer run oregon-transfer                   an experiment of the labs (recipes: all)
  python -m trainer test RUN                              the best checkpoint on the test photos
  python -m trainer import logs/                          runs from the logs of other tools
  python -m trainer data photos/                          sizes, broken photos, duplicates
  python -m trainer track RUN                             send a run to MLflow
  python -m trainer cache                                 what is kept to save time
  streamlit run streamlit_app.py                          compare the runs
"""


def build_parser() -> argparse.ArgumentParser:
    """All flags, grouped as in the documentation."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer",
        description="Train an image classifier in two phases: frozen backbone, then top layers "
        "unfrozen. Every run is logged under runs/.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--phase",
        required=True,
        metavar="|".join(PHASES),
        help="direct: measure the pretrained model as it is; scratch: random weights, everything "
        "trains; transfer: backbone frozen, the head trains; finetune: top layers unfrozen "
        "(runs transfer first where there is no transfer run to start from)",
    )
    _add_data(parser.add_argument_group("data"))
    _add_model(parser.add_argument_group("model"))
    _add_training(parser.add_argument_group("training"))
    _add_schedule(parser.add_argument_group("schedule (of the learning rate, by epochs)"))
    _add_photos(parser.add_argument_group("photos (augmentation; off unless given)"))
    _add_speed(parser.add_argument_group("speed"))
    _add_run(parser.add_argument_group("run"))
    return parser


def _add_data(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--data",
        metavar="DIR",
        help="folder of class folders, or with train/ and "
        "val/ above them; or oregon, food101, signs; default: the parent's data, else 'sample', "
        "the embedded road signs",
    )
    add_split(group)
    group.add_argument(
        "--exclude-file",
        type=Path,
        metavar="F",
        help="list of photos to leave out, one a line, as `python -m trainer data` writes it",
    )
    group.add_argument(
        "--strict", action="store_true", default=None, help="stop at an unreadable photo"
    )


def add_split(group: argparse._ArgumentGroup) -> None:
    """What decides which photos train and which validate."""
    group.add_argument("--split-file", type=Path, metavar="F", help="CSV with columns path,split")
    group.add_argument(
        "--val-fraction",
        type=float,
        metavar="X",
        help="held out for validation, where the data has no val folder (0.3)",
    )
    group.add_argument("--split-seed", type=int, metavar="N", help="another split (0)")
    group.add_argument(
        "--group-by",
        metavar="track",
        help="of photos named track_frame (00001_00012.png) all of one track train or all validate "
        "(track for signs)",
    )
    group.add_argument("--limit", type=int, metavar="N", help="use at most N photos of each class")


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--arch",
        metavar="NAME",
        help="torchvision model, nasnet_mobile, cnn10 or timm:<name> (efficientnet_b0)",
    )
    group.add_argument(
        "--weights",
        metavar="W",
        help="imagenet, none, or a file: a state dict, or Keras's own .h5 (imagenet)",
    )
    group.add_argument(
        "--head", type=_head, metavar="H", help="linear, or hidden sizes such as 512,256 (linear)"
    )
    group.add_argument("--pool", metavar="avg|max", help="last pooling (avg)")
    group.add_argument(
        "--size",
        type=int,
        metavar="PX",
        help="the network sees PX x PX pixels, the photo's whole shorter side (what its pretrained "
        "weights were trained with)",
    )
    group.add_argument(
        "--outputs",
        type=int,
        metavar="N",
        help="outputs of the head, more than there are classes: the last ones stay without a class "
        "(one for each class)",
    )
    group.add_argument(
        "--from",
        dest="parent",
        metavar="RUN",
        help="run to finetune from (the "
        "newest finished transfer run of the same data and architecture)",
    )


def _add_training(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--epochs", type=int, metavar="N", help="epochs of the phase (10)")
    group.add_argument(
        "--transfer-epochs",
        type=int,
        metavar="N",
        help="epochs of a transfer phase that finetune has to run first (as --epochs)",
    )
    group.add_argument("--batch-size", type=int, metavar="N", help="photos a step (32)")
    group.add_argument(
        "--lr",
        type=float,
        metavar="X",
        help="initial learning rate "
        f"({DEFAULT_LR['transfer']:g}; finetune {DEFAULT_LR['finetune']:g})",
    )
    group.add_argument(
        "--transfer-lr",
        type=float,
        metavar="X",
        help="the same for a transfer phase that finetune has to run first",
    )
    group.add_argument("--optimizer", metavar="adam|adamw|sgd", help="(adam)")
    group.add_argument(
        "--unfreeze",
        metavar="N|all|NAME",
        help="what finetune unfreezes: the top N "
        "layers as Keras counts them, all, or a module and all above it, such as "
        "features.7 (20)",
    )
    group.add_argument(
        "--gradual",
        metavar="LAYERS@EPOCH,...",
        help="what finetune unfreezes later: 20@5,all@10 the top 20 after 5 epochs of the phase, "
        "all after 10 (off)",
    )
    group.add_argument(
        "--layer-decay",
        type=float,
        metavar="F",
        help="finetune: each block further from the head learns at F times the rate (1)",
    )
    group.add_argument(
        "--label-smoothing",
        type=float,
        metavar="F",
        help="train towards labels of which this part is spread over all classes (0)",
    )
    group.add_argument(
        "--class-weights",
        metavar="off|balanced",
        help="balanced: in training a photo counts by the inverse of its class's number (off)",
    )


def _add_schedule(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--schedule",
        dest="name",
        metavar="NAME",
        help="constant, exponential, step or cosine (constant)",
    )
    group.add_argument(
        "--decay", type=float, metavar="K", help="exponential: lr*exp(-K*epoch) (0.3)"
    )
    group.add_argument("--drop", type=float, metavar="D", help="step: lr*D^floor(epoch/N) (0.5)")
    group.add_argument(
        "--epochs-drop", type=int, metavar="N", help="step: epochs between drops (10)"
    )
    group.add_argument(
        "--warmup", type=int, metavar="N", help="epochs of linear rise before any schedule (0)"
    )


def _add_photos(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--brightness", type=float, metavar="D", help="shift by up to D of the range"
    )
    group.add_argument("--contrast", type=float, metavar="F", help="factor between 1/F and F")
    group.add_argument(
        "--color", metavar="random|fixed", help="fixed: exactly D and F for every photo (random)"
    )
    group.add_argument("--rotation", type=float, metavar="TURN", help="up to this part of a turn")
    group.add_argument("--crop-from", type=int, metavar="PX", help="random crop from a PX square")
    group.add_argument("--noise", type=float, metavar="STD", help="Gaussian, in 0-255 units")


def _add_run(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--seed", type=int, metavar="N", help="of weights, order and augmentation (0)"
    )
    group.add_argument(
        "--early-stop",
        type=int,
        metavar="N",
        help="stop after N epochs without a better validation accuracy",
    )
    group.add_argument("--run-name", metavar="S", help="part of the run's folder name")
    group.add_argument("--runs-dir", type=Path, metavar="DIR", help="(runs)")
    group.add_argument(
        "--track",
        metavar="mlflow",
        help="also send the run to MLflow, at $MLFLOW_TRACKING_URI, as it is trained (off)",
    )
    group.add_argument(
        "--resume",
        metavar="RUN|auto",
        help="go on with an interrupted run, or the newest one (auto), as its run.json says; "
        "beside it only --runs-dir and the flags of the cache",
    )


def _add_speed(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--device", metavar="auto|cpu|cuda", help="(auto)")
    group.add_argument(
        "--views",
        type=_views,
        metavar="exact|auto|N",
        help="exact: every epoch augments each photo anew; N: N views of each photo in turn, "
        "another and faster training; auto: exact, and says when fewer would save much (exact)",
    )
    group.add_argument(
        "--precision",
        choices=get_args(Precision),
        help="bf16: let the frozen part run in bfloat16 where that is clearly faster, a few "
        "percent off and so another training (fp32)",
    )
    add_cache(group)


def add_cache(group: argparse._ActionsContainer) -> None:
    """What is kept to save time, and where."""
    group.add_argument(
        "--no-cache",
        dest="cache",
        action="store_false",
        default=None,
        help="keep nothing: compute what is frozen anew in every epoch",
    )
    group.add_argument("--cache-dir", type=Path, metavar="DIR", help=f"({default_cache_dir()})")
    group.add_argument(
        "--cache-limit",
        type=_size,
        metavar="SIZE",
        help="most that the cache may take, such as 500MB (20GB)",
    )


def _views(text: str) -> int | str:
    number = whole(text)
    return text if number is None else number


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _head(text: str) -> tuple[int, ...]:
    if text == "linear":
        return ()
    sizes = [whole(part.strip()) for part in text.split(",")]
    if None in sizes:
        raise argparse.ArgumentTypeError(f"{text}: must be linear or sizes such as 512,256")
    return tuple(size for size in sizes if size is not None)


_COMMANDS: Final = {
    "sweep": "trainer.sweep",
    "cache": "trainer.cache_command",
    "import": "trainer.imports.command",
    "test": "trainer.evaluate",
    "run": "trainer.run_command",
    "recipes": "trainer.recipes_command",
    "data": "trainer.survey_command",
    "lr-find": "trainer.lr_find_command",
    "track": "trainer.track_command",
}
_SCHEDULE: Final = ("name", "decay", "drop", "epochs_drop", "warmup")
_PHOTOS: Final = ("brightness", "contrast", "color", "rotation", "crop_from", "noise")


def parse(argv: list[str] | None = None) -> Config:
    """Flags -> Config. Raises ThawError for values that make no sense."""
    parser = build_parser()
    arguments = vars(parser.parse_args(argv))
    if [] in arguments.values():  # what argparse makes of `--lr=--`
        parser.error("-- is no value; give one, or leave the flag away")
    return config_of({name: value for name, value in arguments.items() if value is not None})


def config_of(settings: Mapping[str, Any]) -> Config:
    """The Config of settings by the names of the flags. Raises ConfigError."""
    given = dict(settings)
    schedule = Schedule(**{name: given.pop(name) for name in _SCHEDULE if name in given})
    augmentation = Augmentation(**{name: given.pop(name) for name in _PHOTOS if name in given})
    return Config(schedule=schedule, augmentation=augmentation, **given)


_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


def stop_on_signals() -> None:
    """The first SIGTERM or SIGINT ends the process so that what is being trained is kept; the
    second stops it at once."""
    for number in _SIGNALS:
        signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    for one in _SIGNALS:
        signal.signal(one, signal.SIG_DFL)
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status: 0 done, 2 a mistake of the user's."""
    arguments = sys.argv[1:] if argv is None else argv
    stop_on_signals()
    command: Callable[[list[str]], int]
    if arguments[:1] and arguments[0] in _COMMANDS:
        if ranks() > 1:
            return guarded(lambda: _refuse_ranks(arguments[0]))
        command = import_module(_COMMANDS[arguments[0]]).main
        return command(arguments[1:])
    if any(word.partition("=")[0] == "--resume" for word in arguments):
        command = import_module("trainer.resume_command").main
        return command(arguments)
    return guarded(lambda: _train(parse(arguments)))


def _refuse_ranks(command: str) -> NoReturn:
    raise ThawError(
        f"`python -m trainer {command}` is the work of one process. torchrun is for one training "
        "by many; start this without it."
    )


def _train(config: Config) -> int:
    prepare_process()
    if launched():
        from trainer.torchrun import train

        return train(config)
    from trainer.fit import fit  # imports torch: --help and wrong flags need not wait for it

    return told(config.runs_dir, lambda: fit(config))


def told(runs_dir: Path, training: Callable[[], Run]) -> int:
    """Train, and say what can be done next, also where it was interrupted; returns 0."""
    try:
        run = training()
    except (KeyboardInterrupt, SystemExit):
        where = [] if runs_dir == Config.runs_dir else ["--runs-dir", str(runs_dir)]
        words = ["python", "-m", "trainer", "--resume", "auto", *where]
        print(f"To go on:  {inert(shlex.join(words))}")
        raise
    print("Compare the runs:  streamlit run streamlit_app.py")
    print(f"Export this one:   python -m export {run.run_id}")
    return 0


if __name__ == "__main__":
    restart_with_huge_pages()
    sys.exit(main())
