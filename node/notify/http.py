"""One HTTP POST of a notification, and what its failure means."""

import requests

from node.notify.errors import NotifyError

# What the same request would meet again: it must be mended at one end first. 408 and 429 ask for another try.
_PERMANENT = {400, 401, 403, 404, 405, 406, 410, 411, 413, 415, 422, 501}


def post(url: str, body: bytes, headers: dict[str, str], *, timeout_s: float) -> requests.Response:
    """Posts a body; returns the answer, whose status is 2xx.

    Raises:
        NotifyError: there is no such answer; permanent where another try would get the same.
    """
    try:
        answer = requests.post(url, data=body, headers=headers, timeout=timeout_s, allow_redirects=False)
    except requests.exceptions.SSLError as error:
        raise NotifyError(f"{url} has a certificate that is not trusted here", permanent=True) from error
    except (requests.exceptions.InvalidURL, requests.exceptions.MissingSchema) as error:
        raise NotifyError(f"{url} is no web address", permanent=True) from error
    except requests.exceptions.RequestException as error:
        raise NotifyError(f"{url} does not answer ({type(error).__name__}); check that it runs") from error
    if not 200 <= answer.status_code < 300:
        what = "redirects, which is not followed" if answer.is_redirect else f"answered {answer.status_code}"
        permanent = answer.is_redirect or answer.status_code in _PERMANENT
        raise NotifyError(f"{url} {what}; check address and credentials", permanent=permanent)
    return answer
