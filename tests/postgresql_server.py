"""A real PostgreSQL as a process of its own, for tests: on a Unix socket in a folder of its own, gone afterwards."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import psycopg
import pytest
from pydantic import SecretStr


def find_programs() -> Path:
    """The folder of PostgreSQL's programs; without it the test is skipped, or fails where servers are required."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if found:
        return found[-1].parent
    missing = "There is no PostgreSQL on this machine; on Debian: apt-get install postgresql"
    if os.environ.get("CSPINE_REQUIRE_SERVERS"):
        pytest.fail(missing)
    pytest.skip(missing)


class PostgreSQLServer:
    """Runs from construction to `stop`. durable: as in real life; else nothing is synced, which is quicker."""

    def __init__(self, *, durable: bool = False) -> None:
        self._programs = find_programs()
        # PostgreSQL does not run as root, and a socket's path has at most 107 characters.
        self._user = "postgres" if os.geteuid() == 0 else None
        self._folder = Path(tempfile.mkdtemp(prefix="cspine-pg-", dir="/tmp"))
        if self._user:
            shutil.chown(self._folder, self._user)
        self._num_databases = 0
        data = str(self._folder / "data")
        self._run("initdb", "--no-sync", "--auth=trust", "--username=cspine", "--encoding=UTF8", "--locale=C", data)
        options = (
            f"-c listen_addresses='' -k {self._folder} -c fsync={'on' if durable else 'off'} -c max_connections=200"
        )
        self._run("pg_ctl", "start", "-w", "-D", data, "-l", str(self._folder / "log"), "-o", options)

    def make_database(self) -> SecretStr:
        """The URL of a new, empty database."""
        self._num_databases += 1
        name = f"test{self._num_databases}"
        with psycopg.connect(self._url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return SecretStr(self._url(name))

    def stop(self) -> None:
        self._run("pg_ctl", "stop", "-m", "immediate", "-D", str(self._folder / "data"))
        shutil.rmtree(self._folder)

    def _url(self, name: str) -> str:
        return f"postgresql://cspine@/{name}?host={self._folder}"

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._programs / program), *arguments]
        log = self._folder / "programs.log"
        with log.open("ab") as file:
            ended = subprocess.run(command, stdout=file, stderr=file, user=self._user, cwd=self._folder, timeout=60)
        assert ended.returncode == 0, log.read_text(encoding="utf-8", errors="replace")
