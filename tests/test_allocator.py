"""A training program gets huge pages by beginning anew, once, as it was called."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import trainer.allocator

_SHOW = """
import os, sys
from trainer.allocator import restart_with_huge_pages
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
    not trainer.allocator._gives_huge_pages_on_request(),
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
