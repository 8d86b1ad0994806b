"""What of a received Instance is kept for its whole Series."""

import json
from io import BytesIO
from pathlib import Path

import pytest
from pydicom import Dataset, dcmread
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag

from node.config import Config
from node.index import Index
from node.receive.attributes import SERIES_TAGS, series_attributes
from node.receive.store import Received, Store
from tests.factories import make_ct_series


def test_a_received_series_has_the_attributes_of_its_first_instance(index: Index, tmp_path: Path) -> None:
    def edit(number: int, ds: Dataset) -> None:
        ds.PatientName = "Doe^Jane"
        ds.RequestedProcedurePriority = "STAT"
        ds.ConvolutionKernel = ["Br64", "3"]
        ds.KVP = 120 + number
        ds.SliceThickness = "1.0"
        ds.StationName = ""

    for path in make_ct_series(tmp_path / "sent", num_slices=2, edit=edit):
        encoded = path.read_bytes()
        ds = dcmread(BytesIO(encoded))
        received = Received(
            encoded=encoded,
            sop_class_uid=ds.SOPClassUID,
            sop_instance_uid=ds.SOPInstanceUID,
            calling_ae_title="SCANNER",
            association_id=lambda: index.open_association("SCANNER"),
        )
        Store(Config(), index).put(received)
    (case,) = index.cases()
    expected = {"RequestedProcedurePriority": "STAT", "ConvolutionKernel": ["Br64", "3"], "KVP": 120.0}
    assert {key: case.attributes.get(key) for key in expected} == expected
    assert case.attributes["SliceThickness"] == 1.0
    assert "StationName" not in case.attributes
    assert "Doe" not in json.dumps(case.attributes)


@pytest.mark.parametrize("raw", [b"not a number", b"1\\x", b"NaN", b"\xff\xfe", b"1E999"])
def test_an_odd_attribute_is_left_out_and_does_no_harm(raw: bytes) -> None:
    ds = Dataset()
    ds.StationName = "CT1"
    ds[SERIES_TAGS["KVP"]] = RawDataElement(Tag("KVP"), "DS", len(raw), raw, 0, False, True)
    assert series_attributes(ds) == {"StationName": "CT1"}
