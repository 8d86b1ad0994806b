"""What a sender says of how many Instances a Series has: C-FIND as SCU, in a thread of its own for each source.

`Sources.ask` never waits; the answer is there at one of the next looks. A source that does not answer is left alone for
a while and its Series go on without it: an archive that is down must not hold up the patients it sent.
"""

import logging
import threading
import time
from dataclasses import dataclass, field

from pydicom import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelFind

from node.case import Case
from node.config import Config, Source
from node.index import Index
from node.send import SendError, associated, num_instances_told

log = logging.getLogger(__name__)

_LEFT_ALONE_S = 60.0
_MAX_ANSWERS = 10  # to a question about one Series
_MAX_KEPT = 1000


@dataclass
class _State:
    """Of one source. left_alone_until: monotonic, s."""

    source: Source
    questions: dict[str, Case] = field(default_factory=dict)
    left_alone_until: float = 0.0
    is_silent: bool = False


class Sources:
    """The answers of the configured sources. `ask` and `answer_questions` may run in different threads."""

    def __init__(self, index: Index, config: Config) -> None:
        self._index = index
        self._calling_ae_title = config.receive.ae_title
        self._states = {source.name: _State(source) for source in config.complete.sources}
        self._source_of = {title: source.name for source in config.complete.sources for title in source.sends_as}
        # By SeriesInstanceUID: Instances that were here when it was asked, and what was answered.
        self._answers: dict[str, tuple[int, int | None]] = {}
        self._lock = threading.Lock()

    def ask(self, case: Case) -> tuple[bool, int | None]:
        """Whether the answer is still awaited, and the answer: None when there is no source or it does not say.

        A source that holds more than what is here is asked again when that many have come.
        """
        name = self._source_of.get(case.calling_ae_title)
        if name is None:
            return False, None
        state = self._states[name]
        with self._lock:
            num_here, answer = self._answers.get(case.series_instance_uid, (-1, None))
            if num_here == case.num_instances or (answer or 0) > case.num_instances:
                return False, answer
            if time.monotonic() < state.left_alone_until:
                return False, None
            state.questions[case.series_instance_uid] = case
            return True, None

    def forget(self, case: Case) -> None:
        """The Series is settled: by the time that it is judged again, its source may hold more, or less."""
        with self._lock:
            self._answers.pop(case.series_instance_uid, None)
            for state in self._states.values():
                state.questions.pop(case.series_instance_uid, None)

    def answer_questions(self, source: Source) -> None:
        """Asks a source what is to be asked of it, and has the Series concerned judged again."""
        state = self._states[source.name]
        with self._lock:
            cases = list(state.questions.values())
        if not cases:
            return
        counts: dict[str, int] = {}
        try:
            for case in cases:
                counts[case.series_instance_uid] = count_instances(case, source, self._calling_ae_title)
        except SendError as error:
            state.left_alone_until = time.monotonic() + _LEFT_ALONE_S
            if not state.is_silent:
                log.warning("action=source-silent source=%r: %s; its Series go on without it", source.name, error)
            state.is_silent = True
        else:
            if state.is_silent:
                log.info("action=source-answers source=%r", source.name)
            state.is_silent = False
        with self._lock:
            for case in cases:
                uid = case.series_instance_uid
                if uid in state.questions:  # else it has been settled meanwhile
                    self._answers[uid] = case.num_instances, counts.get(uid)
                if state.questions.get(uid) is case:  # else more came, and it is asked again
                    del state.questions[uid]
            while len(self._answers) > _MAX_KEPT:
                del self._answers[next(iter(self._answers))]
        for case in cases:
            self._index.check_now(case)


def count_instances(case: Case, source: Source, calling_ae_title: str) -> int:
    """NumberOfSeriesRelatedInstances of the Series at its source.

    Raises:
        SendError: the source cannot be reached, refuses, breaks off, takes too long, or does not tell the number.
    """
    query = Dataset()
    query.QueryRetrieveLevel = "SERIES"
    query.StudyInstanceUID = case.study_instance_uid
    query.SeriesInstanceUID = case.series_instance_uid
    query.NumberOfSeriesRelatedInstances = None
    model = StudyRootQueryRetrieveInformationModelFind
    syntaxes = [ExplicitVRLittleEndian, ImplicitVRLittleEndian]
    deadline = time.monotonic() + source.timeout_s
    count = None
    with associated(source, [(model, syntaxes)], calling_ae_title=calling_ae_title) as association:
        for number, (status, found) in enumerate(association.send_c_find(query, model)):
            if "Status" not in status:
                raise SendError(f"{source.where} broke off the query")
            if status.Status not in (0x0000, 0xFF00, 0xFF01):
                raise SendError(f"{source.where} refused the query with status 0x{status.Status:04X}")
            if number > _MAX_ANSWERS or time.monotonic() > deadline:
                association.abort()
                raise SendError(f"{source.where} came to no end with its answer")
            if found is not None and str(found.get("SeriesInstanceUID", "")) == case.series_instance_uid:
                count = num_instances_told(found)
    if count is None:
        raise SendError(f"{source.where} does not tell how many Instances the Series has")
    return count
