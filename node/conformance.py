"""The DICOM conformance statement, put together from the tables that the code goes by. For `cspine conformance`.

`docs/conformance.md` is its output, and a test keeps it so. Prose here explains; what can drift is read from where it
is used.
"""

import ssl
import textwrap
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel
from pydicom import uid as uids
from pydicom.uid import UID
from pynetdicom import DEFAULT_TRANSFER_SYNTAXES
from pynetdicom.sop_class import (
    StudyRootQueryRetrieveInformationModelFind,
    StudyRootQueryRetrieveInformationModelGet,
    StudyRootQueryRetrieveInformationModelMove,
    Verification,
)

from node import commitment, tls
from node.commitment.report import FAILURE_REASONS
from node.commitment.scp import REQUESTER_MAY_RELEASE_S
from node.config import Config, ReceiveConfig
from node.implementation import IMPLEMENTATION_CLASS_UID, implementation_version_name
from node.profiles import Kind
from node.receive import status
from node.receive.access import REJECTIONS
from node.receive.contexts import CT_SOP_CLASSES, decodable_transfer_syntaxes
from node.retrieve.identifier import ABOUT_THE_QUERY, MAX_MATCHES, PATIENT_KEYS
from node.retrieve.scp import LABEL_MAP_STORAGE, LEVELS, RESULT_SOP_CLASSES, RETRIEVE_STATUSES
from node.status import STATUSES
from node.transcode import UNCOMPRESSED
from node.web import qido, rendered
from node.web.levels import IN_REQUEST, Level
from node.web.matching import TIMES

STORE_STATUSES = {
    status.SUCCESS: "the Instance is on disk and in the index, or was already, byte for byte",
    status.SOP_CLASS_NOT_SUPPORTED: "the SOP Class of the request is not that of the presentation context",
    status.OUT_OF_RESOURCES: "less than `receive.min_free_disk_mb` is free, or it cannot be written; send it later",
    status.MISMATCH: "Modality is not CT; SOP Class or Instance UID are not the announced ones; or this node made it",
    status.CANNOT_UNDERSTAND: "it cannot be parsed, is cut off, above `receive.max_instance_mb`, describes "
    "other frames than it has, or lacks a usable UID",
    status.CONFLICT: "another Instance with the same SOP Instance UID is here, or the same in another transfer syntax; "
    "the first is kept",
}

_SEGMENTATIONS = (uids.SegmentationStorage, LABEL_MAP_STORAGE)
OBJECTS: dict[Kind, tuple[str, tuple[UID, ...], str]] = {
    Kind.VERTEBRAE_SEG: ("Vertebrae, BINARY or LABELMAP", _SEGMENTATIONS, "at least one level is in view"),
    Kind.FRACTURES_SEG: (
        "Fracture regions, BINARY or LABELMAP",
        _SEGMENTATIONS,
        "at least one level is suspected and a region was marked",
    ),
    Kind.SALIENCY_MAP: (
        "Saliency (CID 217, DCM 130404), 16 bits, source grid",
        (uids.ParametricMapStorage,),
        "a level is suspected",
    ),
    Kind.KEY_OBJECTS: (
        'Key slices, "Of Interest" (DCM 113000)',
        (uids.KeyObjectSelectionDocumentStorage,),
        "a level is suspected",
    ),
    Kind.SUMMARY_IMAGES: ("Summary pages, RGB, one Instance a page", (uids.SecondaryCaptureImageStorage,), "always"),
    Kind.SUMMARY_PDF: ("Summary", (uids.EncapsulatedPDFStorage,), "always"),
    Kind.REPORT_SR: ("Report, TID 1500", (uids.Comprehensive3DSRStorage, uids.ComprehensiveSRStorage), "always"),
}
"""Of each kind of object that can be delivered by DICOM: what it is, its SOP Classes, when it is made."""


def conformance_statement() -> str:
    """The statement, in Markdown."""
    parts = (
        _overview(),
        _associations(),
        _as_scp(),
        _storage_commitment(),
        _retrieve(),
        _as_scu(),
        _objects_made(),
        _security(),
        _configuration(),
    )
    return "\n".join(line for part in parts for line in part).rstrip() + "\n"


def _table(head: str, rows: Iterable[tuple[object, ...]]) -> Iterator[str]:
    yield f"| {head} |"
    yield "|" + "---|" * (head.count("|") + 1)
    for row in rows:
        yield "| " + " | ".join(str(cell) for cell in row) + " |"
    yield ""


def _name(uid: str) -> str:
    return "Label Map Segmentation Storage" if uid == LABEL_MAP_STORAGE else UID(uid).name


def _named(*found: str) -> list[tuple[str, str]]:
    return [(_name(uid), uid) for uid in found]


def _prose(*paragraphs: str) -> Iterator[str]:
    for paragraph in paragraphs:
        yield from textwrap.wrap(" ".join(paragraph.split()), 140, break_on_hyphens=False, break_long_words=False)
        yield ""


def _overview() -> Iterator[str]:
    yield from ("# DICOM conformance statement", "")
    yield from _prose(
        f"""C-Spine Node {version("cspine-node")}, structured after PS3.2. `cspine conformance` writes this file from
        the code; after a change run `make conformance`. Research software, not a medical device."""
    )
    yield from ("## 1 Overview", "")
    delivered = sorted({_name(uid) for _, classes, _ in OBJECTS.values() for uid in classes})
    yield from _table(
        "Network service | SCU | SCP",
        [
            ("Verification", "yes", "yes"),
            ("CT, Enhanced CT, Legacy Converted Enhanced CT Image Storage", "`cspine send`", "yes"),
            (", ".join(delivered), "to destinations whose profile asks for it", "no"),
            ("Storage Commitment Push Model", "to destinations with `verify: storage-commitment`", "yes"),
            (
                "Study Root Query/Retrieve, FIND",
                "to `complete.sources`, destinations with `verify: query`, and by `cspine fetch`",
                "with `retrieve.enabled`",
            ),
            ("Study Root Query/Retrieve, GET and MOVE", "`cspine fetch`", "with `retrieve.enabled`"),
            ("Patient Root Query/Retrieve, FIND, GET and MOVE", "no", "with `retrieve.enabled`"),
            ("DICOMweb Store (PS3.18 10.5)", "to destinations of `type: dicomweb`", "with `web.enabled`"),
            (
                "DICOMweb Search and Retrieve (PS3.18 10.6, 10.4)",
                "from `sources.dicomweb`; Search to destinations with `verify: query`",
                "with `web.enabled`",
            ),
        ],
    )
    yield from _prose(
        """The node stores nothing but CT, so that its own results can never come back to it. It offers no worklist
        or media service."""
    )


def _associations() -> Iterator[str]:
    defaults = ReceiveConfig()
    yield from ("## 2 Associations that the node accepts", "")
    rows = {
        "AE title": "`receive.ae_title`; the called one is compared only where an entry of `receive.allow` names one",
        "Address and port": "`receive.host`, `receive.port`: only this machine until set; TLS or plain, not both",
        "Who may call": "`receive.allow`, by AE titles and addresses, see [security.md](security.md)",
        "Associations at a time": "`receive.max_associations` over all receiver processes; of one address "
        "`receive.max_associations_per_address`",
        "Time to ask for one": "`receive.associate_timeout_s`, from the connection to the end of the A-ASSOCIATE-RQ",
        "Time for each PDU": "`receive.network_timeout_s`",
        "Maximum PDU": f"{defaults.max_pdu_kb} KB or `receive.max_pdu_kb`; a longer one ends the association",
        "Implementation Class UID": str(IMPLEMENTATION_CLASS_UID),
        "Implementation Version Name": implementation_version_name(),
    }
    yield from _table("What | How", rows.items())
    yield from _prose("An association that is not accepted is rejected with (PS3.8 9.3.4):")
    yield from _table("Result | Source | Reason | When", [(*code, when) for code, when in REJECTIONS.items()])
    yield from ("### 2.1 Extended negotiation", "")
    answers = {
        "Role selection": "the peer is granted the role of the SCU only; who wants to be only the SCP gets no context. "
        "With `retrieve.enabled` it is granted the role of the SCP of what section 5 lists, for C-GET. "
        "Of storage commitment it is granted both: a destination reports as the SCP",
        "Asynchronous operations window": "1, 1",
        "SOP Class extended, SOP Class common extended": "ignored, as PS3.7 D.3.3.5 and D.3.3.6 provide",
        "User identity": "ignored: accepted without a response (PS3.7 D.3.3.7)",
    }
    yield from _table("Item | Answer", answers.items())


def _as_scp() -> Iterator[str]:
    yield from ("## 3 As Storage and Verification SCP", "")
    yield from _table("SOP Class | UID", _named(Verification, *CT_SOP_CLASSES))
    yield from ("### 3.1 Transfer syntaxes for CT", "")
    yield from _prose(
        """In this order of preference. Those of JPEG, JPEG-LS, JPEG 2000 and RLE are taken because the installed codecs
        can decode them."""
    )
    yield from _table("Transfer syntax | UID", _named(*decodable_transfer_syntaxes()))
    yield from _prose(
        """Nothing is decoded on receipt. JPEG Extended with 12 bits is taken and then refused by the analysis with the
        reason, since its only codec is GPL-licensed and not installed. Enhanced CT may come as a concatenation; several
        stacks are read if they continue each other in space."""
    )
    yield from ("### 3.2 C-STORE statuses", "")
    yield from _table(
        "Status | Meaning here", [(f"0x{code:04X}", meaning) for code, meaning in sorted(STORE_STATUSES.items())]
    )
    yield from _prose(
        """The Error Comment says which. Instances are kept as they came. SOPClassUID and SOPInstanceUID missing from
        the dataset are taken from the request, a missing Modality is taken as CT. Source Instances in any character set
        pydicom knows are read.""",
        """What was refused with 0xC111, by STOW-RS too, is counted at the case of the Instance that is here: `cspine
        cases` and the case list say how many times, when last, and from which calling AE title (for STOW-RS, STOW-RS).
        One that is sent again counts again.""",
        """Instances are kept as long as `retention` says, by default 30 days after their results are delivered, less
        when the disk fills: the node is no archive. One that was purged is new when it is sent again.""",
    )


def _storage_commitment() -> Iterator[str]:
    yield from ("## 4 As Storage Commitment SCP", "")
    yield from _table("SOP Class | UID", _named(commitment.SOP_CLASS))
    syntaxes = ", ".join(UID(syntax).name for syntax in DEFAULT_TRANSFER_SYNTAXES)
    yield from _prose(
        f"""Transfer syntaxes: {syntaxes}. N-ACTION is noted in the database before it is answered; what is held is
        judged when the report is made. An Instance is committed if it is in the index, its file is on disk and its SOP
        Class is the one asked about. It is kept as long as `retention` says, and no longer.""",
        f"""{REQUESTER_MAY_RELEASE_S:g} s after its answer the N-EVENT-REPORT goes over the requester's association if
        that still stands, else over a new one to the host and port that `commitment.peers`, a destination or a source
        has for its AE title. On that one the node proposes itself as SCP (role selection: SCU 0, SCP 1). A report that
        does not arrive is tried again as a delivery is (section 6).""",
    )
    yield from _table("N-ACTION status | When", [(f"0x{c:04X}", t) for c, t in commitment.COMMITMENT_STATUSES.items()])
    yield from _table("Failure Reason | When", [(f"0x{code:04X}", when) for code, when in FAILURE_REASONS.items()])


def _retrieve() -> Iterator[str]:
    yield from ("## 5 As Query/Retrieve SCP", "")
    yield from _prose("Only with `retrieve.enabled`, and off by default: answers name patients.")
    yield from _table(
        "SOP Class | UID | Levels", [(_name(model), model, ", ".join(levels)) for model, levels in LEVELS.items()]
    )
    yield from _prose(
        """Matched, at their level and below; a value, several UIDs or codes, `*` and `?`, and ranges of dates and
        times. Names are matched as a whole or by one of their component groups, whatever the case of A to Z and the
        delimiters at their end (Doe^Jane^^^ is Doe^Jane); of everything else the case counts."""
    )
    patient = ", ".join(PATIENT_KEYS)
    study = ", ".join(k for k in Level.STUDY.keywords if k not in (*PATIENT_KEYS, *ABOUT_THE_QUERY))
    rows = [("PATIENT", patient), ("STUDY", f"{study}, ModalitiesInStudy")]
    rows += [(name, ", ".join(level.keywords)) for name, level in (("SERIES", Level.SERIES), ("IMAGE", Level.INSTANCE))]
    yield from _table("Level | Attributes", rows)
    yield from _prose(
        f"""Every other attribute asked for is answered from the first Instance, and not matched (status 0xFF01);
        what NumberOfPatientRelatedStudies and the like of a Patient, a Study and a Series ask for is counted, and
        InstanceAvailability is ONLINE. No unique key of a higher level is needed. Answers are in ISO_IR 192, at most
        {MAX_MATCHES:,}. What arrives is found at once.""",
        """C-GET and C-MOVE give out received CT and the node's results, by the unique key of the level, which may be a
        list of UIDs. Each Instance goes in the transfer syntax it is in, or uncompressed to who does not take that one.
        C-MOVE sends to `retrieve.peers` only, by the AE title there, over an association of its own.""",
    )
    yield from _table(
        "Status | When", [(f"0x{code:04X}", meaning) for code, meaning in sorted(RETRIEVE_STATUSES.items())]
    )
    yield from _prose("Given out, besides CT, to a peer that proposes itself as SCP:")
    yield from _table("SOP Class | UID", _named(*RESULT_SOP_CLASSES))
    yield from _as_origin_server()


def _as_origin_server() -> Iterator[str]:
    yield from ("### 5.1 As DICOMweb origin server", "")
    yield from _prose(
        f"""Only with `web.enabled`. Search (PS3.18 10.6) matches what section 5 lists, given by keyword or tag, dates
        and times as they stand, with a Warning where the query names a TimezoneOffsetFromUTC; and of a Series and its
        Instances {" and ".join(IN_REQUEST)} (or `00400275.00400009`).
        Ranges of {" and of ".join(f"{date} and {time}" for date, time in TIMES.items())} that have the same form are
        one of moments (combined datetime matching, which C-FIND does not negotiate). An attribute that cannot be
        matched is an error (400); a parameter that is no attribute, or a private one, is ignored with a Warning.
        emptyvaluematching and multiplevaluematching are supported, fuzzymatching is answered literally with a Warning.
        includefield names any attribute of the first Instance, or `all`: of an Instance all but bulk data, of a Study
        or Series those of its level (modules of patient, study, series, equipment and frame of reference). A page has
        {qido.DEFAULT_LIMIT:,} matches, on request up to {qido.MAX_LIMIT:,}, with includefield=all at most
        {qido.DEFAULT_LIMIT:,}; a Warning says how many are left. What finds nothing is answered by 204. Answers are in
        `application/dicom+json`, called `application/json` for who accepts only that.""",
        f"""Retrieve (10.4) gives Instances as they are stored or in Explicit VR Little Endian, frames and pixels as
        bulk data as they are compressed or as little-endian octets. Of bulk data each compressed frame is a part,
        decoded or native pixels are one. Rendered resources are {" or ".join(rendered.MEDIA_TYPES)}: one picture (of a
        Study or a Series its middle slice), or with `multipart/related` all of them; several frames only so.
        Parameters: window with {", ".join(rendered.FUNCTIONS)}, viewport with a region of the source, quality (that of
        the JPEG encoder); annotation and iccprofile draw nothing and are answered with a Warning.""",
        """Store (10.5) takes `multipart/related; type="application/dicom"`, not encoded. A part of another type is
        among the Other Failures; Failure Reasons are the statuses of section 3.2, and 0x0122 for another SOP Class.
        An answer that is an error and has a Referenced SOP Sequence names what was stored before the request broke.""",
        """DELETE, which the Standard does not have, removes a Study, or a received Series with what was made of it;
        what was made, and an Instance, goes only with its Series. Retrieve Capabilities (8.9) is not offered: OPTIONS
        tells the methods of an address.""",
    )


def _as_scu() -> Iterator[str]:
    yield from ("## 6 As SCU", "")
    delivered = {uid for _, classes, _ in OBJECTS.values() for uid in classes}
    yield from _table(
        "SOP Class | UID",
        _named(
            Verification,
            *sorted(delivered),
            StudyRootQueryRetrieveInformationModelFind,
            StudyRootQueryRetrieveInformationModelGet,
            StudyRootQueryRetrieveInformationModelMove,
            commitment.SOP_CLASS,
        ),
    )
    fallback = " or ".join(UID(uid).name for uid in UNCOMPRESSED)
    yield from _prose(
        f"""One association for each case and destination; calling AE title `receive.ae_title`. Each object is proposed
        in the transfer syntax it is in; where the peer does not take that it goes out as {fallback}. A rejection that
        the peer calls permanent, or a refused SOP Class, ends the delivery; what may pass is tried again, after
        `deliver.retry_first_s`, then twice as long each time up to `deliver.retry_max_s`, at most
        `deliver.max_attempts` times. What a destination took is not sent again with what it did not take.""",
        """A delivery is done when the destination, asked afterwards, has every object. With `verify: query` it is asked
        by C-FIND at IMAGE level, Study and Series Instance UID given, for each SOP Instance UID, over an association of
        its own. With `verify: storage-commitment` it is asked by N-ACTION; the N-EVENT-REPORT may come over that
        association, which the node keeps for up to 3 s, or over a new one to `receive.port`, where the destination is
        the SCP, at any time until the node asks again (after `verify_timeout_s`, then longer). What is not found within
        `verify_timeout_s`, or not committed to, is sent again.""",
        """As Query SCU the node asks the peers of `complete.sources`, at SERIES level and with both unique keys, for
        NumberOfSeriesRelatedInstances, each time over an association of its own.""",
        """`cspine fetch` asks one of `retrieve.peers` by C-FIND, at STUDY level by AccessionNumber, StudyInstanceUID or
        PatientID, then at SERIES level for CT, and fetches each Series by C-GET or C-MOVE at SERIES level. For C-GET it
        proposes itself as SCP of the CT classes of section 3, each transfer syntax in a presentation context of its
        own, and answers C-STORE as section 3.2 says; C-MOVE names `receive.ae_title` as the destination.""",
        """DICOMweb: all objects of a case go in one Store request (`multipart/related` with its length), and one
        each if that is answered by 413. The Referenced, Failed and Other Failures SOP Sequences of an answer in
        `application/dicom+json` are read. Search asks for each SOP Instance UID under its Study and Series.""",
        """Of `sources.dicomweb` it searches for Series with Modality CT and a range of StudyDate, and for the Instances
        of each, 200 at a time; asks for the metadata of one Instance; and retrieves a Series, or its Instances one by
        one, with `transfer-syntax=*`, and without where that is answered by 400 or 406. See
        [dicomweb.md](dicomweb.md).""",
        "A status that answers C-STORE, or a Failure Reason of Store or of storage commitment, means:",
    )
    yield from _table(
        "Status | Meaning | The object counts as",
        [
            (
                f"0x{row.first:04X}" + (f" to 0x{row.last:04X}" if row.last != row.first else ""),
                row.meaning,
                row.outcome,
            )
            for row in STATUSES
        ],
    )


def _objects_made() -> Iterator[str]:
    yield from ("## 7 Objects made", "")
    kinds = [kind for kind in Kind if kind is not Kind.FINDINGS_JSON]  # that one is for folders
    yield from _table(
        "In a profile | Object | SOP Class | Made when it is asked for and",
        [
            (f"`{kind}`", what, " or ".join(map(_name, classes)), when)
            for kind in kinds
            for what, classes, when in [OBJECTS[kind]]
        ],
    )
    yield from _prose(
        """Their forms, file names and Series are in [objects.md](objects.md). Patient and study attributes are copied
        from the source Instances. Series, SOP Instance and Tracking UIDs are derived (2.25, PS3.5 B.2) from the set of
        source SOP Instance UIDs and the model's name and version: a repeat replaces itself. Segments are on the source
        grid, refer to their source Instances and frames, and leave empty frames out. Contributing Equipment (DCM
        109102), algorithm identification and Tracking UIDs follow IHE AI Results. The report has a group for the
        patient and for each of C1..C7, negatives included; it is preliminary and not verified.""",
        """Every summary page bears "AI result, research use, not reviewed" and names no patient; Burned In Annotation
        is YES all the same, since text is burnt in. Slices are shown as stored; orientation marks come from the
        direction cosines. A voxel of the saliency map is the probability that it belongs to a fracture, times the
        attention its slice received as a share of the most attended slice of its level (0 to 1).""",
        """Objects are written in the Specific Character Set of the source where that is a single value that highdicom
        knows and our own texts need only ASCII, else in ISO_IR 192.""",
    )


def _security() -> Iterator[str]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.restrict(context)
    names = sorted(str(cipher["name"]) for cipher in context.get_ciphers())
    yield from ("## 8 Security", "")
    yield from _prose(
        f"""TLS as SCP (`receive.tls`) and SCU (`tls` of a destination, source or peer), after the BCP 195 RFC 8996,
        9325 TLS Secure Transport Connection Profile (PS3.15 B.12): TLS 1.2 and 1.3, no renegotiation, no compression,
        RSA keys from 2048 bits. Client certificates: `receive.tls.verify`. As SCU the peer's certificate and name are
        always checked. Cipher suites: {", ".join(names)}.""",
        "How to open, close and encrypt the port: [security.md](security.md).",
    )


def _configuration() -> Iterator[str]:
    yield from ("## 9 Configuration", "")
    yield from _prose("What of the network can be set in [config.yaml](../config.yaml), with its default:")
    config = Config()
    rows: list[tuple[str, str]] = []
    for section in ("receive", "sources", "commitment", "retrieve", "complete", "deliver", "web"):
        rows += _settings(section, getattr(config, section))
    yield from _table("Setting | Default", [row for row in rows if row[0] != "`deliver.destinations`"])


def _settings(section: str, values: BaseModel) -> list[tuple[str, str]]:
    def shown(value: Any) -> str:
        if value is None:
            return "null"
        return f"{value:g}" if isinstance(value, float) else str(list(value) if isinstance(value, tuple) else value)

    return [(f"`{section}.{name}`", shown(getattr(values, name))) for name in type(values).model_fields]
