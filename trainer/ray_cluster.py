"""A connection to a Ray cluster: the one that is named, or one of this machine alone.

Ray is optional: requirements-ray.txt.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from trainer.schema import ThawError

_ROOT: Final = Path(__file__).parent.parent
_CONNECT_SECONDS: Final = 10.0
# What of this process's environment workers on other nodes need too. Secrets are not handed on: Ray
# shows the environment of its workers.
_HANDED_ON: Final = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "THAW_DATA", "THAW_CACHE")


class RayError(ThawError):
    """What stands between a command and its work on Ray."""


def require_ray() -> Any:
    """The module, with nothing sent to its makers. Raises RayError where it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # or epochs of several tasks were left out
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it takes a worker's restart for one
    try:
        import ray
    except ImportError as error:
        raise RayError(
            f"--engine ray needs Ray ({error}): pip install -r requirements-ray.txt"
        ) from error
    return ray


@contextlib.contextmanager
def connected(
    address: str | None, store_bytes: int, cpus: int | None = None, log: bool = True
) -> Iterator[Any]:
    """Ray, connected to `address`, else to $RAY_ADDRESS, else to a cluster of this machine with
    `cpus` (all) that may keep `store_bytes` of results, and ends afterwards. A connection that is
    there already is used and kept. `log`: what workers print is printed here.

    Raises RayError.
    """
    ray = require_ray()
    if ray.is_initialized():
        yield ray
        return
    where = address or os.environ.get("RAY_ADDRESS")
    own: dict[str, Any] = {"address": where}
    if where is None:
        own = {"address": "local", "num_cpus": cpus, "object_store_memory": store_bytes}
        own["include_dashboard"] = False
    else:
        _refuse_deaf(where)
    handed_on = {name: os.environ[name] for name in _HANDED_ON if name in os.environ}
    workers = {"env_vars": {"PYTHONPATH": str(_ROOT), **handed_on}}
    try:
        ray.init(**own, runtime_env=workers, logging_level="ERROR", log_to_driver=log)
    except (OSError, ValueError, RuntimeError) as error:
        asked = f"at {where}" if where else "on this machine"
        raise RayError(f"No Ray cluster {asked}: {error}.") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _refuse_deaf(address: str) -> None:
    """Ray itself would try for minutes. Raises RayError."""
    host, _, port = address.rpartition("/")[2].rpartition(":")
    if port.isdecimal():  # unlike "auto"
        try:
            socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
        except OSError as error:
            raise RayError(
                f"No Ray cluster answers at {address}: {error.strerror or error}. Start one with "
                "`ray start --head`, or leave the address away to use this machine alone."
            ) from error
