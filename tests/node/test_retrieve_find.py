"""C-FIND for what the node holds: dcmtk's findscu, pynetdicom, and answers beside a real Orthanc's."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydicom import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from node.case import Case
from node.config import ReceiveConfig
from node.index import Index
from node.peers import DicomPeer
from node.retention import finish_interrupted
from node.retrieve import identifier, scp
from node.send import associated
from tests.factories import make_ct_series
from tests.node.retrieving import NUM_SLICES, PATIENT_FIND, STUDY_FIND, Held, ask, tool, wait_for_cancel
from tests.orthanc_server import OrthancServer
from tests.ports import free_port
from tests.receiver import listening
from tests.web_server import hold

# pynetdicom leaves the socket of a refused connection open.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


@pytest.mark.parametrize(
    ("keys", "numbers"),
    [
        ({}, [2, 1, 0]),  # the latest first
        ({"PatientID": "P-1"}, [1]),
        ({"PatientID": "P-*"}, [2, 1, 0]),
        ({"PatientName": "MÜLLER*"}, []),  # case counts beyond ASCII
        ({"PatientName": "müller*"}, [2, 0]),
        ({"PatientName": "doe^jane"}, [1]),
        ({"PatientName": "doe^jane^^^"}, [1]),
        ({"PatientName": "^^^^"}, [2, 1, 0]),  # no value
        ({"PatientName": "Müller*", "AccessionNumber": "ACC2"}, [2]),
        ({"StudyDate": "20260102-"}, [2, 1]),
        ({"StudyDate": "-20260101"}, [0]),
        ({"ModalitiesInStudy": "SR"}, [0]),
        ({"ModalitiesInStudy": "MR"}, []),
        ({"ModalitiesInStudy": ["SR", "MR"]}, [0]),
        ({"AccessionNumber": "ACC9"}, []),
    ],
)
def test_c_find_matches(held: Held, keys: dict[str, object], numbers: list[int]) -> None:
    found, statuses = ask(held.peer, "STUDY", **({"StudyInstanceUID": ""} | keys))
    assert [held.studies.index(answer.StudyInstanceUID) for answer in found] == numbers
    assert statuses <= {0xFF00, 0x0000}


def test_c_find_takes_a_list_of_uids(held: Held) -> None:
    found, _ = ask(held.peer, "STUDY", StudyInstanceUID=held.studies[:2])
    assert {answer.StudyInstanceUID for answer in found} == set(held.studies[:2])


def test_c_find_answers_what_was_asked_for_and_no_more(held: Held) -> None:
    (found,), _ = ask(
        held.peer, "STUDY", AccessionNumber="ACC0", PatientName="", ModalitiesInStudy="",
        NumberOfStudyRelatedSeries="", NumberOfStudyRelatedInstances="", PatientComments="", ProcedureCodeSequence=[],
    )  # fmt: skip
    assert found.PatientName == "Müller^Eva"
    assert list(found.ModalitiesInStudy) == ["CT", "SR"]
    assert (found.NumberOfStudyRelatedSeries, found.NumberOfStudyRelatedInstances) == (2, NUM_SLICES + 1)
    assert found.RetrieveAETitle == "CSPINE"
    assert not found.PatientComments
    assert "StudyDate" not in found


def test_a_key_that_is_not_matched_is_answered_and_said_to_be_ignored(held: Held) -> None:
    found, statuses = ask(held.peer, "SERIES", StationName="CT9", SeriesInstanceUID="", Modality="CT")
    assert statuses == {0xFF01, 0x0000}
    assert [answer.StationName for answer in found] == ["CT7"] * 3


@pytest.mark.parametrize(("asked", "status"), [("A", 0xFF01), ("", 0xFF00), ("*", 0xFF00)])
def test_a_key_in_a_sequence_is_not_matched_either(held: Held, asked: str, status: int) -> None:
    item = Dataset()
    item.RequestedProcedureID = asked
    found, statuses = ask(held.peer, "SERIES", SeriesInstanceUID="", Modality="CT", RequestAttributesSequence=[item])
    assert (len(found), statuses) == (3, {status, 0x0000})


def test_series_and_images_are_found_below_their_study(held: Held) -> None:
    found, _ = ask(held.peer, "SERIES", StudyInstanceUID=held.studies[0], SeriesInstanceUID="", Modality="")
    assert {answer.Modality for answer in found} == {"CT", "SR"}
    found, _ = ask(
        held.peer, "IMAGE", StudyInstanceUID=held.studies[1], SeriesInstanceUID=held.series[1], SOPInstanceUID="",
        InstanceNumber="",
    )  # fmt: skip
    assert [answer.InstanceNumber for answer in found] == list(range(1, NUM_SLICES + 1))


def test_patients_are_found_once_each(held: Held) -> None:
    found, _ = ask(held.peer, "PATIENT", PATIENT_FIND, PatientID="", PatientName="")
    assert sorted((answer.PatientID, str(answer.PatientName)) for answer in found) == [
        ("P-0", "Müller^Eva"),
        ("P-1", "Doe^Jane"),
    ]


def test_what_there_is_of_a_patient_is_counted(held: Held) -> None:
    keys = [f"NumberOfPatientRelated{what}" for what in ("Studies", "Series", "Instances")]
    found, statuses = ask(held.peer, "PATIENT", PATIENT_FIND, PatientID="", **dict.fromkeys(keys, ""))
    counts = {str(answer.PatientID): [int(answer[key].value) for key in keys] for answer in found}
    assert counts == {"P-0": [2, 3, 2 * NUM_SLICES + 1], "P-1": [1, 1, NUM_SLICES]}
    assert statuses == {0xFF00, 0x0000}


def test_what_is_here_is_said_to_be_online(held: Held) -> None:
    for level in ("STUDY", "SERIES", "IMAGE"):
        found, _ = ask(held.peer, level, InstanceAvailability="", SOPInstanceUID="")
        assert {answer.InstanceAvailability for answer in found} == {"ONLINE"}


@pytest.mark.filterwarnings("ignore:Invalid value for VR DA:UserWarning")
@pytest.mark.parametrize(
    ("level", "keys"), [("PATIENT", {}), ("NONE", {}), ("STUDY", {"StudyDate": "yesterday-today"})]
)
def test_what_cannot_be_asked_is_refused(held: Held, level: str, keys: dict[str, str]) -> None:
    assert ask(held.peer, level, **keys) == ([], {0xA900})


def test_more_matches_than_are_given_are_refused(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identifier, "MAX_MATCHES", 2)
    assert ask(held.peer, "STUDY", StudyInstanceUID="") == ([], {0xA700})
    assert len(ask(held.peer, "STUDY", PatientID="P-0")[0]) == 2


def test_findscu_finds(held: Held) -> None:
    done = subprocess.run(
        [tool("findscu"), "-P", "-aec", "CSPINE", "127.0.0.1", str(held.peer.port), "-k", "QueryRetrieveLevel=STUDY",
         "-k", "PatientID=P-0", "-k", "StudyInstanceUID"],
        capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert held.studies[0] in said
    assert held.studies[2] in said
    assert held.studies[1] not in said


def test_what_was_purged_is_found_no_more(tmp_path: Path) -> None:
    held = Held(tmp_path)

    def series_found() -> list[str]:
        found, _ = ask(held.peer, "SERIES", StudyInstanceUID=held.studies[0], SeriesInstanceUID="", Modality="")
        return sorted(answer.Modality for answer in found)

    def purge(remove: Callable[[Case], bool]) -> None:
        case = held.index.case(held.series[0])
        assert case is not None
        assert remove(case)

    with listening(held.config, held.index):
        assert series_found() == ["CT", "SR"]
        purge(held.index.purge_originals)
        assert series_found() == ["SR"]
        purge(held.index.purge_results)  # their files go a moment later
        assert series_found() == []
        finish_interrupted(held.index)
        assert [answer.StudyInstanceUID for answer in ask(held.peer, "STUDY", StudyInstanceUID="")[0]] == [
            held.studies[2], held.studies[1],
        ]  # fmt: skip
        hold(
            held.index,
            make_ct_series(
                held.index.data_dir / "instances" / "again",
                series_instance_uid=held.series[0],
                study_instance_uid=held.studies[0],
            ),
        )
        assert series_found() == ["CT"]
    held.index.close()


def test_what_arrives_while_it_is_asked_is_found_by_every_process(held: Held, tmp_path: Path) -> None:
    """Two receivers share the catalog; each takes in what the other may have taken in already."""
    data = shutil.copytree(
        held.index.data_dir, tmp_path / "data", ignore=shutil.ignore_patterns("catalog*", "*.places")
    )
    index = Index(data)
    configs = [
        held.config.model_copy(update={"data_dir": data, "receive": ReceiveConfig(port=free_port())}) for _ in range(2)
    ]
    peers = [DicomPeer(name="node", host="127.0.0.1", port=c.receive.port, ae_title="CSPINE") for c in configs]
    with listening(configs[0], index), listening(configs[1], index):
        for round_ in range(3):
            for peer in peers[:: 1 if round_ % 2 else -1]:
                assert len(ask(peer, "STUDY", StudyInstanceUID="")[0]) == 3 + round_
            hold(index, make_ct_series(data / "instances" / f"new{round_}", num_slices=2))
    index.close()


def test_answers_are_those_of_orthanc(held: Held, tmp_path: Path) -> None:
    """Attribute by attribute, of what both hold."""
    server = OrthancServer(tmp_path / "orthanc", port=free_port(), node_port=free_port())
    try:
        for path in [path for made in held.paths for path in made]:
            server.client.upload_file(str(path))
        keys: dict[str, list[dict[str, object]]] = {
            "STUDY": [{}, {"PatientID": "P-0"}, {"PatientName": "DOE*"}, {"StudyDate": "20260102-20260103"}],
            "SERIES": [{"Modality": "CT", "StudyInstanceUID": held.studies[1]}, {"SeriesInstanceUID": held.series}],
            "IMAGE": [{"StudyInstanceUID": held.studies[1], "SeriesInstanceUID": held.series[1]}],
        }
        wanted = {
            "STUDY": ["StudyInstanceUID", "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate",
                      "StudyTime", "AccessionNumber", "StudyID", "StudyDescription"],
            "SERIES": ["StudyInstanceUID", "SeriesInstanceUID", "Modality", "SeriesNumber", "SeriesDescription",
                       "NumberOfSeriesRelatedInstances", "BodyPartExamined"],
            "IMAGE": ["SOPInstanceUID", "SOPClassUID", "InstanceNumber"],
        }  # fmt: skip
        unique = {"STUDY": "StudyInstanceUID", "SERIES": "SeriesInstanceUID", "IMAGE": "SOPInstanceUID"}
        for level, asked in keys.items():
            for query in asked:
                values = dict.fromkeys(wanted[level], "") | query
                both = [ask(peer, level, **values)[0] for peer in (held.peer, server.destination)]
                ours, theirs = (
                    {
                        str(answer[unique[level]].value): {k: str(answer[k].value).strip() for k in wanted[level]}
                        for answer in answers
                    }
                    for answers in both
                )
                assert ours == theirs, (level, query)
                assert ours
    finally:
        server.stop()


def test_a_cancelled_c_find_ends_and_the_association_goes_on(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    is_cancelled, answers = False, scp.answers
    query = Dataset()
    query.QueryRetrieveLevel, query.StudyInstanceUID = "STUDY", ""
    with associated(held.peer, [(STUDY_FIND, [ExplicitVRLittleEndian])], calling_ae_title="WS") as association:
        uncancelled = [status.Status for status, _ in association.send_c_find(query, STUDY_FIND)]
    assert len(uncancelled) > len(held.studies)

    def pausing(*arguments: Any) -> Iterator[Dataset]:
        for answer in answers(*arguments):
            yield answer
            wait_for_cancel()

    monkeypatch.setattr(scp, "answers", pausing)
    with associated(held.peer, [(STUDY_FIND, [ExplicitVRLittleEndian])], calling_ae_title="WS") as association:
        statuses = []
        for status, _ in association.send_c_find(query, STUDY_FIND, msg_id=7):
            statuses.append(status.Status)
            if not is_cancelled:
                association.send_c_cancel(7, query_model=STUDY_FIND)
                is_cancelled = True
        assert statuses == [0xFF00, 0xFE00]
        monkeypatch.setattr(scp, "answers", answers)
        again = [status.Status for status, _ in association.send_c_find(query, STUDY_FIND, msg_id=8)]
        assert again == uncancelled
