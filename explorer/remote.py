"""A runs folder at a URL that fsspec knows, such as s3://bucket/runs: what is there, and its files.

Only read, never written. fsspec is imported when the first URL is opened, never with this module.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from trainer.runlog import RunError

RUNS_DIR_VARIABLE: Final = "THAW_RUNS_DIR"
# More than these are no runs folder but, say, a whole bucket of photos.
MOST_FILES: Final = 200_000
_TRIES: Final = 3
_URL: Final = re.compile(r"[a-z][a-z0-9+.-]*(::[a-z][a-z0-9+.-]*)*://", re.IGNORECASE)
_SECRET: Final = re.compile(r"(?<=://)[^/?#]*@|[?#].*")
_ANY_URL: Final = re.compile(r"\w+://[^\s\"'<>]+")
_INSTALL: Final = "pip install -r requirements-remote.txt"
# What a listing calls the version of a file and the time at which it was written, by file system.
_VERSION: Final = ("ETag", "etag", "md5Hash", "content_md5")
_WRITTEN: Final = ("LastModified", "last_modified", "mtime", "updated", "modified", "created")


# --- which one ----------------------------------------------------------------------------------


def runs_place(arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    """`--runs-dir DIR|URL`, else $THAW_RUNS_DIR, else `runs`, as it was typed."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--runs-dir")
    try:
        named = parser.parse_known_args(list(arguments))[0].runs_dir
    except argparse.ArgumentError:  # `--runs-dir` without a value
        named = None
    return named or environment.get(RUNS_DIR_VARIABLE) or "runs"


def is_url(place: str) -> bool:
    return _URL.match(place) is not None


def shown(url: str) -> str:
    """The URL without what may be a password or a signature."""
    return _SECRET.sub("", url)


# --- what is there ------------------------------------------------------------------------------


class RemoteError(RunError):
    """A place that cannot be read: says what is wrong, where, and the remedy."""


class AwayError(RemoteError):
    """Nothing there can be read now: no way to it, no right to it, or no such place."""


@dataclass(frozen=True)
class Listed:
    """A file elsewhere. `version` changes whenever its content does; `size` is in bytes, `written`
    in seconds since 1970, None where nobody says."""

    version: str
    size: int
    written: float | None = field(default=None, compare=False)


class Remote:
    """A folder at a URL. Several threads may use it at once."""

    def __init__(self, url: str) -> None:
        self._url, self._where = url, shown(url)
        self._system: Any = None
        self._root = ""

    def listing(self) -> dict[str, Listed]:
        """All files by their path in the folder, which may be any text. Raises AwayError."""
        try:
            found = self._find()
        except FileNotFoundError as error:
            raise AwayError(
                f"There is no {self._where}: {_said(error)}. Name the bucket and the folder that "
                "hold the runs."
            ) from error
        except Exception as error:
            raise self._away(error) from error
        if len(found) > MOST_FILES:
            raise AwayError(
                f"{self._where} holds more than {MOST_FILES:,} files: it cannot be a runs folder. "
                "Name the folder with the run folders in it."
            )
        start = self._root.rstrip("/") + "/"
        return {
            name.removeprefix(start): listed
            for name, info in found.items()
            if name.startswith(start) and (listed := _listed(info)) is not None
        }

    def _find(self) -> dict[str, Any]:
        system = self._opened()
        system.invalidate_cache()
        # One page of a thousand after the other, and no more than are wanted.
        most = {"max_items": MOST_FILES + 1} if "s3" in _protocols(system) else {}
        found: dict[str, Any] = system.find(self._root, detail=True, **most)
        return found

    def fetch(self, name: str, expected: Listed, into: Path, most: int) -> Listed:
        """Copy a file whole; returns the version that was copied, maybe newer than `expected`.

        Raises RemoteError where this file cannot be had, also one of more than `most` bytes,
        AwayError where none can, FileNotFoundError where it has just gone.
        """
        try:
            for _ in range(_TRIES):
                if expected.size > most:
                    raise self._too_large(name, most)
                system, path = self._opened(), f"{self._root.rstrip('/')}/{name}"
                system.get_file(path, str(into), callback=self._bound(name, most))
                # A copy is made of several answers: all of one version, if that is still the same.
                now = _listed(system.info(path))
                if now == expected and into.stat().st_size == expected.size:
                    return expected
                expected = now or expected
        except (RunError, FileNotFoundError):
            raise
        except PermissionError as error:
            raise RemoteError(f"{self._where}/{name} may not be read: {_said(error)}.") from error
        except Exception as error:
            raise self._away(error) from error
        raise RemoteError(f"{self._where}/{name} changes faster than it can be fetched.")

    def _opened(self) -> Any:
        if self._system is None:
            from fsspec.core import url_to_fs

            system, self._root = url_to_fs(
                self._url, use_listings_cache=False, skip_instance_cache=True
            )
            if {"file", "local"} & _protocols(system):
                raise AwayError(
                    f"{self._where} is a folder of this machine. Give its path without a protocol: "
                    "then links in it are not followed, and runs can be changed."
                )
            self._system = system
        return self._system

    def _bound(self, name: str, most: int) -> Any:
        """Ends a transfer that brings more than was listed and is allowed."""
        from fsspec.callbacks import Callback

        def check(_: int | None, value: int, **__: Any) -> None:
            if value > most:
                raise self._too_large(name, most)

        return Callback(hooks={"most": check})

    def _too_large(self, name: str, most: int) -> RemoteError:
        return RemoteError(
            f"{self._where}/{name} has more than {most / 1e6:,.0f} MB and is not fetched."
        )

    def _away(self, error: Exception) -> AwayError:
        """A dozen kinds of errors of a dozen libraries, as what a user can do about them."""
        if isinstance(error, AwayError):
            return error
        why = f"{self._where} cannot be read: {_said(error)}."
        if isinstance(error, ImportError):
            return AwayError(f"{why} Install what reads it: {_INSTALL}")
        if isinstance(error, ValueError) and "not known" in str(error):
            return AwayError(f"{why} Use one of fsspec's protocols, such as s3://.")
        kinds = {kind.__name__ for kind in type(error).__mro__}
        for names, remedy in _REMEDIES.items():
            if kinds.intersection(names):
                return AwayError(f"{why} {remedy}")
        return AwayError(f"{why} Check the URL and the settings of its file system.")


_NETWORK: Final = (
    "Check the network and the address of the server (AWS_ENDPOINT_URL for a server of your own)."
)
# By the names of the errors' classes, as their libraries may not be there.
_REMEDIES: Final[Mapping[tuple[str, ...], str]] = {
    ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"): "Give the explorer a key "
    "that may list and read: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE.",
    ("PermissionError",): "Check the key (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE) "
    "and that it may list and read there.",
    ("HTTPClientError", "ConnectionError", "ClientError", "TimeoutError", "gaierror"): _NETWORK,
    ("OSError",): _NETWORK,
}


def _said(error: Exception) -> str:
    """What an error says of itself, as the part of a sentence, with URLs as they may be shown."""
    said = _ANY_URL.sub(lambda found: shown(found[0]), str(error))
    return said.strip().rstrip(".") or type(error).__name__


def _protocols(system: Any) -> set[str]:
    """Of a file system and of those that it stands on, such as s3 below simplecache."""
    found: set[str] = set()
    while system is not None:
        said = system.protocol
        found |= {said} if isinstance(said, str) else set(said)
        system = getattr(system, "fs", None)
    return found


def _listed(info: Mapping[str, Any]) -> Listed | None:
    """What a listing says of a file; None for what is no file, or of no known size."""
    size = info.get("size")
    if info.get("type") != "file" or not isinstance(size, int):
        return None
    written = next((time for name in _WRITTEN if (time := _seconds(info.get(name)))), None)
    version = next((said for name in _VERSION if (said := info.get(name))), None)
    return Listed(str(version or written).strip('"'), size, written)


def _seconds(time: Any) -> float | None:
    if isinstance(time, datetime):
        return time.timestamp()
    return float(time) if isinstance(time, int | float) else None
