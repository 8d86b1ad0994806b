"""Settings that name where a secret is: in a file or an environment variable, never in the configuration itself."""

import os
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from node.settings import Section


class WithSecret(Section):
    """A section that may have one secret."""

    secret_file: Path | None = None
    secret_env: str | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _check_secret(self) -> Self:
        if self.secret_file is not None and self.secret_env is not None:
            raise ValueError("give the secret by secret_file or by secret_env, not by both")
        return self

    @property
    def has_secret(self) -> bool:
        return self.secret_file is not None or self.secret_env is not None

    def read_secret(self) -> str:
        """The secret as it is now; "" when none is configured.

        Raises:
            OSError: the file or the variable is not there, or the file is no text.
        """
        if self.secret_file is not None:
            try:
                return self.secret_file.read_text(encoding="utf-8").strip()
            except UnicodeDecodeError as error:
                raise OSError(f"{self.secret_file} is not UTF-8") from error
        if self.secret_env is not None:
            if not os.environ.get(self.secret_env):
                raise OSError(f"the environment variable {self.secret_env} is not set")
            return os.environ[self.secret_env]
        return ""
