"""What a client accepts: the most precise range that speaks of a form decides how good it is (RFC 9110 12.5.1)."""

import pytest

from node.web import accept as accepting
from node.web.accept import Choice, Offer, choose

JPEG, PNG = Offer(media_type="image/jpeg"), Offer(media_type="image/png")
DICOM = Offer(media_type="multipart/related", part="application/dicom", transfer_syntaxes=("1.4.80", "1.2.1"))
OCTETS = Offer(media_type="multipart/related", part="application/octet-stream", transfer_syntaxes=("1.2.1",))


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", JPEG),
        ("*/*", JPEG),
        ("image/jpeg;q=0, */*", PNG),
        ("*/*, image/jpeg;q=0", PNG),
        ("image/*;q=0, */*", None),
        ("image/*;q=0, image/png, */*", PNG),
        ("image/*;q=0.9, image/jpeg;q=0.1", PNG),
        ("image/png;q=0.2, image/jpeg;q=0.1", PNG),
        ("image/png, image/jpeg", PNG),
        ("*/*;q=0", None),
        ("*/*;q=2", None),
        ("text/html", None),
    ],
)
def test_the_most_precise_range_decides(accept: str, expected: Offer | None) -> None:
    assert choose(accept, [JPEG, PNG]) == (expected and Choice(expected, ""))


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", Choice(DICOM, "1.2.1")),
        ("multipart/related", Choice(DICOM, "1.2.1")),
        ('multipart/related; type="application/dicom"; transfer-syntax=*', Choice(DICOM, "1.4.80")),
        ('multipart/related; type="Application/DICOM"; transfer-syntax=1.4.80', Choice(DICOM, "1.4.80")),
        ('multipart/related; type="application/dicom"; transfer-syntax=1.4.81', None),
        (
            "multipart/related; type=application/dicom; transfer-syntax=*, "
            "multipart/related; type=application/dicom; transfer-syntax=1.4.80; q=0",
            Choice(DICOM, "1.2.1"),
        ),
        (
            "multipart/related; type=application/dicom; q=0.5, "
            "multipart/related; type=application/dicom; transfer-syntax=1.4.80",
            Choice(DICOM, "1.4.80"),
        ),
        ("multipart/related; type=application/dicom; q=0, */*", Choice(OCTETS, "1.2.1")),
    ],
)
def test_transfer_syntaxes_are_part_of_a_range(accept: str, expected: Choice | None) -> None:
    assert choose(accept, [DICOM, OCTETS], default_syntax="1.2.1") == expected


def test_a_form_is_judged_once_however_often_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    judged = []
    covers = accepting._Range.covers

    def count(asked: accepting._Range, choice: Choice) -> bool:
        judged.append(choice)
        return covers(asked, choice)

    monkeypatch.setattr(accepting._Range, "covers", count)
    num = 400  # an address of 64 KB has room for 16,000
    assert choose(",".join(["*/*"] * num), [JPEG, PNG]) == Choice(JPEG, "")
    assert len(judged) <= 4 * num
