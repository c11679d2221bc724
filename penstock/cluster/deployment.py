"""Engines that outlive their server: a folder by which the next server of the same deployment finds them.

    lock          held by the server that serves it; the kernel lets go of it with the process
    key           what prompts are hashed with: with another one nothing in the engines' caches would be found
    NAME.socket   an engine listens here for whoever comes next (cluster.doorway); NAME is made of the replica's
    NAME.log      what it writes, as there may be nobody to read a pipe

Only this user may enter the folder. A server that ends in order ends its engines and takes these files away, no others.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from penstock.core.errors import BadConfig

NAMES = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._-]{1,40}")  # a name, not the way to another folder
OURS = ("*.socket", "*.log", "key", "lock")
PRIVATE = 0o700
KEY_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class Outlive:
    """`name` of the deployment, the same for the server that comes next. Engines wait `for_s` for it, then end.

    `folder`: where deployments are kept; None = the user's runtime directory, else the one for temporary files.
    """

    name: str
    for_s: float = 60.0
    folder: Path | None = None

    def __post_init__(self) -> None:
        if not NAMES.fullmatch(self.name):
            raise ValueError(
                f"outlive.name must be 1 to 40 letters, digits, dots, dashes or underscores,"
                f" and neither . nor .., got {self.name!r}"
            )
        if not 0 < self.for_s < float("inf"):
            raise ValueError(
                f"outlive.for_s must be a positive number of seconds, got {self.for_s}"
            )

    @property
    def place(self) -> Path:
        if self.folder is not None:
            return self.folder.expanduser() / self.name
        runtime = os.environ.get("XDG_RUNTIME_DIR")
        if runtime:
            return Path(runtime) / "penstock" / self.name
        return Path(tempfile.gettempdir()) / f"penstock-{os.getuid()}" / self.name


class Deployment:
    """The folder, as the server that holds its lock has it. Raises BadConfig when another one does."""

    def __init__(self, outlive: Outlive) -> None:
        if not sys.platform.startswith("linux"):
            raise BadConfig(
                "engines outlive their server on Linux only", hint="leave out serve.outlive"
            )
        self.outlive, self.folder = outlive, opened_folder(outlive)
        self._lock = _locked(self.folder / "lock", outlive.name)

    def socket(self, replica: str) -> Path:
        return self.folder / f"{_file_name(replica)}.socket"

    def log(self, replica: str) -> Path:
        return self.folder / f"{_file_name(replica)}.log"

    def sockets(self) -> list[Path]:
        return sorted(self.folder.glob("*.socket"))

    def close(self) -> None:
        """Its engines have ended: nothing is left for the next server."""
        for path in [path for name in OURS for path in self.folder.glob(name)]:
            with suppress(OSError):
                path.unlink()
        with suppress(OSError):
            self.folder.rmdir()
        os.close(self._lock)


def key_of(outlive: Outlive) -> bytes:
    """What this deployment hashes prompts with, from its first server on. Raises BadConfig."""
    return kept_key(opened_folder(outlive) / "key", hint="set serve.outlive.folder")


def kept_key(path: Path, *, hint: str) -> bytes:
    """The secret in a file, which whoever comes first makes. Raises BadConfig where that cannot be."""
    import fcntl  # not on every platform

    try:
        file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)  # nobody reads what another one has not written yet
            key = os.read(file, KEY_BYTES + 1)
            if not key:
                key = secrets.token_bytes(KEY_BYTES)
                os.write(file, key)
        finally:
            os.close(file)
    except OSError as error:
        raise BadConfig(f"{path} cannot be used: {error.strerror}", hint=hint) from None
    if len(key) != KEY_BYTES:
        raise BadConfig(f"{path} holds no key", hint="delete it, and what else is in its folder")
    return key


def opened_folder(outlive: Outlive) -> Path:
    """Made if need be. Raises BadConfig unless it is this user's alone."""
    place = outlive.place
    try:
        place.mkdir(mode=PRIVATE, parents=True, exist_ok=True)
        found = place.lstat()  # a link would lead to a folder of somebody else's choice
    except OSError as error:
        raise BadConfig(
            f"the folder of the deployment cannot be made: {place}: {error.strerror or error}",
            hint="set serve.outlive.folder",
        ) from None
    if outlive.folder is None and place.parent.lstat().st_uid != os.getuid():
        raise BadConfig(
            f"{place.parent} is another user's, who could put something else in place of {place}",
            hint="set serve.outlive.folder",
        )
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise BadConfig(
            f"{place} is not this user's alone: its owner or its mode lets others in",
            hint=f"chmod 700 {place}, or set serve.outlive.folder",
        )
    return place


def _locked(path: Path, name: str) -> int:
    import fcntl  # not on every platform

    while True:
        lock = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise BadConfig(
                f"another server serves the deployment {name!r}",
                hint="end it first, or give this one another serve.outlive.name",
            ) from None
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(lock).st_ino:
                return lock
        os.close(lock)  # the server that has just ended took the file with it


def _file_name(replica: str) -> str:
    """Short, as paths of sockets are at most about a hundred bytes."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", replica)[-24:]
    return f"{plain}-{hashlib.blake2b(replica.encode(), digest_size=4).hexdigest()}"
