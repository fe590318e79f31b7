"""`python -m trainer recipes`: the experiments that come with Thaw."""

from __future__ import annotations

import argparse
import textwrap

from trainer.cli import guarded
from trainer.experiment import packaged


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m trainer recipes",
        description="The experiments that `python -m trainer run` knows: what they ask, the data "
        "they need, and how long they take.",
        allow_abbrev=False,
    )
    parser.parse_args(argv)
    return guarded(_list)


def _list() -> int:
    for name, experiment in packaged().items():
        print(name)
        for line in (experiment.title, f"needs: {experiment.needs}", f"takes: {experiment.takes}"):
            print(textwrap.fill(line, 98, initial_indent="    ", subsequent_indent="      "))
    return 0
