"""What of a received Instance is kept for its whole Series."""

import json
from collections.abc import Callable
from pathlib import Path

from pydicom import Dataset
from pydicom.dataelem import RawDataElement

from node.config import Config, DicomDestination
from node.index import Index
from node.receive.attributes import SERIES_TAGS, series_attributes
from node.send import send_files
from tests.factories import make_ct_series
from tests.receiver import listening


def test_a_received_series_has_the_attributes_of_its_first_instance(
    make_config: Callable[..., Config], index: Index, tmp_path: Path
) -> None:
    def edit(number: int, ds: Dataset) -> None:
        ds.PatientName = "Doe^Jane"
        ds.RequestedProcedurePriority = "STAT"
        ds.InstitutionalDepartmentName = ["ER", str(number)]
        ds.StationName = ""
        for keyword in ("StudyDescription", "SeriesDescription", "ProtocolName"):
            setattr(ds, keyword, "neck of Jane Doe")

    sent = make_ct_series(tmp_path / "sent", num_slices=2, edit=edit)
    with listening(make_config(), index) as config:
        receive = config.receive
        node = DicomDestination(type="dicom", name="node", host=receive.host, port=receive.port, ae_title="CSPINE")
        assert send_files(sent, node, calling_ae_title="SCANNER") == []
    (case,) = index.cases()
    expected = {"RequestedProcedurePriority": "STAT", "InstitutionalDepartmentName": ["ER", "0"]}
    assert {key: case.attributes.get(key) for key in expected} == expected
    assert "StationName" not in case.attributes
    assert "Doe" not in json.dumps(case.attributes)


def test_an_odd_attribute_is_left_out_and_does_no_harm() -> None:
    ds = Dataset()
    ds.StationName = "CT1"
    tag = SERIES_TAGS["CurrentPatientLocation"]
    ds[tag] = RawDataElement(tag, "US", 3, b"odd", 0, False, True)
    assert series_attributes(ds) == {"StationName": "CT1"}
