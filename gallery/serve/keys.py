"""API keys: who may use a server, and how many runs each may have open at once.

A key is a random text of 256 bits. Each line of the file of keys contains a name, the SHA-256 hash of the key, and
optionally a number of runs. A key of this length does not need a slower hash.

    diffsight key keys.txt alice            # prints the new key once, and adds its hash to the file
"""

import hmac
import os
import secrets
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from diffsight.errors import InputError
from diffsight.key_hash import hash_of

_PREFIX = "ds-"
_DEFAULT_RUNS = 8


@dataclass(frozen=True)
class Key:
    """One line of a file of keys."""

    name: str
    digest: str
    runs: int = _DEFAULT_RUNS


ANYONE = Key("anyone", "", 1 << 30)  # on a server without keys


class Keys:
    """The keys of a server.

    Args:
        file: The file; None for a server without keys, which anyone who can reach it may use.

    Raises:
        InputError: The file does not exist, or it contains an invalid line.
    """

    def __init__(self, file: str | Path | None) -> None:
        self._keys: list[Key] | None = None if file is None else _read(Path(file))

    def find(self, key: str | None) -> Key | None:
        """Return the entry of a key; None if there is none. Takes the same time for every wrong key."""
        return self.with_digest(hash_of(key or ""))

    def with_digest(self, digest: str) -> Key | None:
        """Return the entry of the key with a hash, as `find` does."""
        if self._keys is None:
            return ANYONE
        found = None
        for known in self._keys:
            if hmac.compare_digest(known.digest.encode(), digest.encode("utf-8", "replace")):
                found = known
        return found


def key_in(headers: Mapping[str, str]) -> str | None:
    """Return the key in the headers of a request."""
    kind, _, key = headers.get("authorization", headers.get("Authorization", "")).partition(" ")
    return key.strip() if kind.lower() == "bearer" and key.strip() else None


def add_key(file: str | Path, name: str, runs: int = _DEFAULT_RUNS) -> str:
    """Add a new key to a file, which is created if necessary, and return the key.

    Raises:
        InputError: The name is already in the file, or is not valid, or the file cannot be written.
    """
    path = Path(file)
    known = _read(path) if path.exists() else []
    if not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise InputError(f"the name of a key may contain only letters, digits, and - _ . between them, not {name!r}")
    if any(key.name == name for key in known):
        raise InputError(f"{file} has a key for {name!r} already: remove that line first, or choose another name")
    if runs < 1:
        raise InputError(f"a key allows 1 run or more at once, not {runs}")
    key = _PREFIX + secrets.token_urlsafe(32)
    lines = [*(f"{one.name} {one.digest} {one.runs}" for one in known), f"{name} {hash_of(key)} {runs}"]
    target = Path(os.path.realpath(path))  # the file behind a link
    try:
        with tempfile.TemporaryDirectory(dir=target.parent) as beside:
            new = Path(beside) / target.name
            new.touch(mode=0o600)
            new.write_text("\n".join(lines) + "\n", encoding="utf-8")
            new.replace(target)
    except OSError as error:
        if not path.parent.exists():
            raise InputError(f"the folder {path.parent} does not exist: create it, or choose another file") from None
        raise InputError(f"the file of keys {path} cannot be written: {error.strerror}") from None
    return key


def _read(path: Path) -> list[Key]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        hint = "" if path.exists() else ". `diffsight key` makes one"
        raise InputError(f"the file of keys {path} cannot be read: {error}{hint}") from None
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.startswith("#"):
            name, digest, *rest = [*line.split(), "", ""]
            runs = rest[0] or str(_DEFAULT_RUNS)
            if len(digest) != 64 or not runs.isdigit():
                raise InputError(f"{path}, line {number}: a line is a name, a hash, and perhaps a number of runs")
            found.append(Key(name, digest, int(runs)))
    return found
