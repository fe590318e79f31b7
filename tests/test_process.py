"""A training program gets huge pages by beginning anew, once, as it was called; and its threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import trainer.process

_SHOW = """
import os, sys
from trainer.process import restart_with_huge_pages
print("begun", flush=True)
restart_with_huge_pages()
print(sys.argv[1:], os.environ.get("GLIBC_TUNABLES"))
"""


def _output(tunables: str | None) -> list[str]:
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    if tunables is not None:
        environment["GLIBC_TUNABLES"] = tunables
    command = [sys.executable, "-c", _SHOW, "--run-name", "two words"]
    return subprocess.check_output(command, text=True, env=environment).splitlines()


@pytest.mark.skipif(
    not trainer.process._gives_huge_pages_on_request(),
    reason="huge pages are not given on request here",
)
def test_it_begins_anew_once_with_the_same_arguments() -> None:
    shown = "['--run-name', 'two words'] glibc.malloc.hugetlb=1"
    assert _output(None) == ["begun", "begun", shown]
    other = "glibc.malloc.check=0"
    assert _output(other)[-1] == shown.replace("glibc", f"{other}:glibc")


def test_what_the_user_set_stays() -> None:
    asked = "glibc.malloc.hugetlb=0"
    assert _output(asked) == ["begun", f"['--run-name', 'two words'] {asked}"]


ALLOWED = trainer.process._allowed_cores()


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, ALLOWED),
        ({"cpu.max": "max 100000"}, ALLOWED),
        ({"cpu.max": "100000 100000"}, 1),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "6400000 100000"}, min(64, ALLOWED)),
        ({"cpu.max": "damaged"}, ALLOWED),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, ALLOWED),
        ({"cpu/cpu.cfs_quota_us": "90000", "cpu/cpu.cfs_period_us": "100000"}, 1),
    ],
)
def test_a_container_is_given_no_more_threads_than_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cores: int
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{content}\n")
    monkeypatch.setattr(trainer.process, "_CGROUPS", tmp_path)
    assert trainer.process.usable_cores() == cores


def test_threads_are_limited_unless_the_user_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.process, "_share", lambda: 0.5)
    monkeypatch.setattr(trainer.process, "_allowed_cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    trainer.process.prepare_process()
    assert os.environ["OMP_NUM_THREADS"] == "3"
    monkeypatch.delenv("OMP_NUM_THREADS")
    trainer.process.prepare_process()
    assert os.environ["OMP_NUM_THREADS"] == "1"
