"""Whom mail servers and HL7 receivers must be certified by."""

import ssl
from pathlib import Path

from node.notify.errors import NotifyError


def trusting(ca_file: Path | None) -> ssl.SSLContext:
    """A context for a connection to a server whose certificate is checked. ca_file: None trusts the system's.

    Raises:
        NotifyError: the file cannot be used.
    """
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        why = "it holds no certificates in PEM" if isinstance(error, ssl.SSLError) else error.strerror
        raise NotifyError(f"ca_file {ca_file} cannot be used: {why}") from error
