"""An Orthanc as a source: its changes, its Series, the files of its Instances. On `orthanc-api-client`.

Every question has a timeout, which that library leaves to its user. Called by `node/watch`; knows nothing of the node.
"""

import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import responses
from typing import Any

import requests
from orthanc_api_client import ChangeType, OrthancApiClient
from orthanc_api_client.exceptions import HttpError, OrthancApiException, ResourceNotFound
from requests.adapters import HTTPAdapter

_CHUNK_BYTES = 256 * 1024


class OrthancError(Exception):
    """A question was not answered. status: of HTTP, if there was an answer. cause: why there was none, where known.

    retry_after: the header in which a proxy before it may ask for a pause, "" for none.
    """

    def __init__(
        self,
        message: str,
        status: int | None = None,
        cause: requests.RequestException | None = None,
        retry_after: str = "",
    ) -> None:
        super().__init__(message)
        self.status, self.cause, self.retry_after = status, cause, retry_after

    @property
    def reason(self) -> str:
        """What the status means, as HTTP has it."""
        return responses.get(self.status or 0, "unknown status")


class GoneError(OrthancError):
    """What was asked for is not there, or no longer."""


@dataclass(frozen=True, kw_only=True)
class StableSeries:
    """A Series that has got no more Instances for a while. number: of the change."""

    number: int
    series_id: str


@dataclass(frozen=True, kw_only=True)
class Changes:
    """A page of the changes feed. last: the number up to which it was read. new_instance_ids: what came in it."""

    stable: Sequence[StableSeries]
    new_instance_ids: Sequence[str]
    last: int


@dataclass(frozen=True, kw_only=True)
class Series:
    """A Series in Orthanc. tags: what Orthanc keeps of it, by keyword. is_stable: since it was started, nothing new."""

    tags: Mapping[str, Any]
    instance_ids: Sequence[str]
    is_stable: bool


@dataclass(frozen=True, kw_only=True)
class Instance:
    """An Instance in Orthanc. number: InstanceNumber, 0 where there is none."""

    instance_id: str
    sop_instance_uid: str
    number: int


class Orthanc:
    """One Orthanc, while something is fetched from it; close it after use. Safe to use from several threads.

    adapter: carries the requests, where TLS is set up in a special way. num_connections: how many it keeps open.
    """

    def __init__(
        self,
        url: str,
        *,
        user: str = "",
        password: str = "",
        token: str = "",
        timeout_s: float = 30.0,
        num_connections: int = 4,
        adapter: HTTPAdapter | None = None,
    ) -> None:
        self._timeout_s = timeout_s
        # The library joins paths by urljoin, which would drop what follows the last slash.
        self._api = OrthancApiClient(
            url.rstrip("/") + "/",
            user=user or None,
            pwd=password or None,
            api_token=token or None,
            pool_maxsize=num_connections,
        )
        session = self._api._http_session
        session.trust_env = False  # no proxy and no password that only the environment knows
        # Its own would try three times more, each with the whole timeout.
        session.mount(url[: url.index("://") + 3], adapter or HTTPAdapter(pool_maxsize=num_connections))

    def close(self) -> None:
        self._api.close()

    def last_change(self) -> int:
        """The number of the latest change that is kept: what is deleted takes its changes with it. 0 if there is none.

        Raises:
            OrthancError: it does not say.
        """
        answer = self._get_json("changes?last")
        if not isinstance(answer, dict) or not isinstance(answer.get("Last"), int):
            raise OrthancError("does not answer like an Orthanc; check url", status=200)
        return int(answer["Last"])

    def changes(self, since: int, limit: int = 1000) -> Changes:
        """The changes after number `since`; where there are none, `last` is the latest there ever was.

        Raises:
            OrthancError: it does not say.
        """
        answer = self._get_json(f"changes?since={since}&limit={limit}")
        with _reading():
            stable = [
                StableSeries(number=int(change["Seq"]), series_id=str(change["ID"]))
                for change in answer["Changes"]
                if change["ChangeType"] == ChangeType.STABLE_SERIES
            ]
            new = [str(change["ID"]) for change in answer["Changes"] if change["ChangeType"] == ChangeType.NEW_INSTANCE]
            return Changes(stable=stable, new_instance_ids=new, last=int(answer["Last"]))

    def series_of(self, instance_id: str) -> str:
        """The Series of an Instance.

        Raises:
            GoneError: it is not there any more.
            OrthancError: it does not say.
        """
        answer = self._get_json(f"instances/{instance_id}")
        with _reading():
            return str(answer["ParentSeries"])

    def series(self, series_id: str) -> Series:
        """A Series and what is in it.

        Raises:
            GoneError: it is not there any more.
            OrthancError: it does not say.
        """
        answer = self._get_json(f"series/{series_id}")
        with _reading():
            return Series(
                tags=dict(answer["MainDicomTags"]),
                instance_ids=list(answer["Instances"]),
                is_stable=answer["IsStable"] is True,
            )

    def instances(self, series_id: str) -> list[Instance]:
        """The Instances of a Series, by InstanceNumber.

        Raises:
            GoneError, OrthancError: as above.
        """
        answer = self._get_json(f"series/{series_id}/instances?expand")
        with _reading():
            found = [
                Instance(
                    instance_id=str(item["ID"]),
                    sop_instance_uid=str(item["MainDicomTags"]["SOPInstanceUID"]),
                    number=_number(item["MainDicomTags"].get("InstanceNumber")),
                )
                for item in answer
            ]
        return sorted(found, key=lambda instance: (instance.number, instance.sop_instance_uid))

    def tags(self, instance: Instance) -> dict[str, Any]:
        """The attributes of an Instance, by keyword; values are texts, several joined by backslashes.

        Raises:
            GoneError, OrthancError: as above.
        """
        answer = self._get_json(f"instances/{instance.instance_id}/simplified-tags")
        with _reading():
            return dict(answer)

    def read(self, instance: Instance) -> Generator[bytes, None, None]:
        """The file of an Instance, piece by piece.

        Raises:
            GoneError, OrthancError: as above, or it broke off.
        """
        with self._get(f"instances/{instance.instance_id}/file", stream=True) as response:
            try:
                yield from response.iter_content(_CHUNK_BYTES)
            except requests.RequestException as error:
                raise OrthancError("broke off", cause=error) from error

    def _get_json(self, path: str) -> Any:
        content = self._get(path).content
        with _reading():
            return json.loads(content)

    def _get(self, path: str, *, stream: bool = False) -> requests.Response:
        try:
            response: requests.Response | None = self._api.get(
                path, timeout=self._timeout_s, allow_redirects=False, stream=stream
            )
        except ResourceNotFound as error:
            raise GoneError("has no such thing", status=404) from error
        except HttpError as error:
            headers = error.request_response.headers if error.request_response is not None else {}
            raise OrthancError(
                f"answered {error.http_status_code}",
                status=error.http_status_code,
                retry_after=headers.get("Retry-After", ""),
            ) from error
        except OrthancApiException as error:
            cause = error.__context__
            is_cause = isinstance(cause, requests.RequestException)
            raise OrthancError("does not answer", cause=cause if is_cause else None) from error
        if response is None:  # an error that the library swallows
            raise OrthancError("did not answer properly")
        return response


@contextmanager
def _reading() -> Iterator[None]:
    """While an answer is read, whose shape is not certain."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise OrthancError("does not answer like an Orthanc; check url", status=200) from error


def _number(text: Any) -> int:
    try:
        return int(text)
    except (TypeError, ValueError):
        return 0
