"""Bearer tokens: who may do what over HTTP. Only their hashes are kept, in a file that `cspine token` writes.

A token is 32 random bytes, so a fast hash is enough: there is nothing to guess.
"""

import hashlib
import hmac
import json
import os
import secrets
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

from node.process import sync
from node.web.settings import Right

RIGHTS: tuple[Right, ...] = get_args(Right)


class TokensError(Exception):
    """The file of the tokens is damaged; the message says which, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Token:
    """What is kept of a token."""

    name: str
    sha256: str
    rights: tuple[Right, ...]
    made_at: str


class Tokens:
    """The tokens of a data folder; read again when the file changes."""

    def __init__(self, data_dir: Path) -> None:
        self._path = data_dir / "web-tokens.json"
        self._read_at: int | None = None
        self._tokens: tuple[Token, ...] = ()

    def all(self) -> tuple[Token, ...]:
        """Every token.

        Raises:
            TokensError: their file is damaged.
        """
        try:
            changed_at = self._path.stat().st_mtime_ns
        except FileNotFoundError:
            self._read_at, self._tokens = None, ()
            return ()
        if changed_at != self._read_at:
            try:
                rows = json.loads(self._path.read_text(encoding="utf-8"))
                self._tokens = tuple(Token(**row | {"rights": tuple(row["rights"])}) for row in rows)
            except (ValueError, TypeError, KeyError) as error:
                raise TokensError(f"{self._path} is damaged; remove it and make the tokens anew") from error
            self._read_at = changed_at
        return self._tokens

    def find(self, secret: str) -> Token | None:
        """The token of this secret, None if there is none."""
        digest = _hash(secret)
        return next((token for token in self.all() if hmac.compare_digest(token.sha256, digest)), None)

    def make(self, name: str, rights: tuple[Right, ...]) -> str:
        """Makes a token, in place of one of the same name; returns its secret, which is kept nowhere."""
        secret = secrets.token_urlsafe(32)
        made_at = datetime.now(UTC).isoformat(timespec="seconds")
        token = Token(name=name, sha256=_hash(secret), rights=rights, made_at=made_at)
        self._write([*(other for other in self.all() if other.name != name), token])
        return secret

    def remove(self, name: str) -> bool:
        """Whether there was such a token."""
        left = [token for token in self.all() if token.name != name]
        if len(left) == len(self.all()):
            return False
        self._write(left)
        return True

    def _write(self, tokens: list[Token]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_suffix(".draft")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump([asdict(token) for token in tokens], file, indent=1)
        sync(draft)
        draft.replace(self._path)
        sync(self._path.parent)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
