"""A notice as signed JSON, posted to a web address.

The signature is an HMAC-SHA256 over `<timestamp>.<body>`, so that the receiver can tell who sent it, and when.
"""

import hashlib
import hmac
import json
import time

from node.notify.http import post
from node.notify.notice import Notice
from node.targets import WebhookTarget

SIGNATURE_HEADER = "X-CSpine-Signature"


def send(notice: Notice, target: WebhookTarget) -> None:
    """Posts the notice.

    Raises:
        NotifyError: it was not taken.
    """
    body = json.dumps(notice.to_dict()).encode()
    headers = {"Content-Type": "application/json", "X-CSpine-Event": notice.event, "X-CSpine-Notice": notice.notice_id}
    if secret := target.read_secret():
        headers[SIGNATURE_HEADER] = sign(body, secret, int(time.time()))
    post(target.url, body, headers, timeout_s=target.timeout_s)


def sign(body: bytes, secret: str, timestamp: int) -> str:
    """The signature header: `t=<seconds since the epoch>,v1=<hex HMAC-SHA256 of "t.body">`."""
    digest = hmac.new(secret.encode(), f"{timestamp}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={timestamp},v1={digest}"
