"""`python -m tests.benchmarks.peers PEER ...`: trains once, prints one JSON line last."""

from __future__ import annotations

import argparse
import gc
import importlib
import json
from importlib import metadata

from tests.benchmarks.peers.job import PEERS, Job, Report
from trainer.process import keep_freed_memory


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.peers")
    parser.add_argument("peer", choices=PEERS)
    Job.add_flags(parser)
    arguments = parser.parse_args()
    job = Job.from_flags(arguments)
    if not job.untuned:
        keep_freed_memory()
    module, package = PEERS[arguments.peer]
    report = Report(job)
    importlib.import_module(f"tests.benchmarks.peers.{module}").run(job, report)
    gc.collect()  # ends the workers of loaders that a framework holds in a cycle
    named = {"peer": arguments.peer, "version": f"{package} {metadata.version(package)}"}
    print(json.dumps(named | report.result()))


if __name__ == "__main__":
    main()
