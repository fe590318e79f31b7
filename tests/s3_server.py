"""A real S3-compatible server on a local folder, for tests: `rclone serve s3`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_KEY, _SECRET = "thaw", "a-secret-of-the-tests"
_ADDRESS = re.compile(r"http://127\.0\.0\.1:\d+")


@contextmanager
def s3_server(folder: Path, remembers: bool = False) -> Iterator[str]:
    """Serve `folder` and yield the endpoint's URL; each folder directly in it is a bucket, and what
    is written there without the server is seen at once, unless it `remembers` what lies where.

    Meanwhile the environment has what s3fs and botocore need, also for processes started now.
    Skips the test where rclone or s3fs is missing.
    """
    s3fs = pytest.importorskip("s3fs", reason="needs requirements-remote.txt")
    beside = Path(sys.executable).parent / "rclone"
    rclone = str(beside) if beside.exists() else shutil.which("rclone")
    if rclone is None:
        pytest.skip("needs rclone, whose `serve s3` is the server")
    command = [rclone, "serve", "s3", str(folder), "--addr", "127.0.0.1:0", "--config", os.devnull]
    command += ["--auth-key", f"{_KEY},{_SECRET}"]
    if not remembers:  # every request lists all folders above its file
        command += ["--dir-cache-time", "0s"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    with server, pytest.MonkeyPatch.context() as patch:
        try:
            endpoint = _address(server)
            for name, value in environment(endpoint).items():
                patch.setenv(name, value)
            s3fs.S3FileSystem.clear_instance_cache()  # one of an earlier server, by the same name
            yield endpoint
        finally:
            server.kill()
            s3fs.S3FileSystem.clear_instance_cache()


def environment(endpoint: str) -> dict[str, str]:
    """What s3fs and botocore need to know of a server."""
    return {
        "AWS_ACCESS_KEY_ID": _KEY,
        "AWS_SECRET_ACCESS_KEY": _SECRET,
        "AWS_ENDPOINT_URL": endpoint,
        "FSSPEC_S3_ENDPOINT_URL": endpoint,  # of fsspec that is imported later
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


def _address(server: subprocess.Popen[str]) -> str:
    """Where it listens; it writes that to its log when it is ready."""
    assert server.stderr is not None
    said = []
    for line in server.stderr:
        said.append(line)
        if found := _ADDRESS.search(line):
            # Or it would wait, once what it complains about fills the pipe.
            threading.Thread(target=server.stderr.read, daemon=True).start()
            return found[0]
    raise AssertionError(f"rclone did not start: {''.join(said)}")
