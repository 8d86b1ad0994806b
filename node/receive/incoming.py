"""A DICOM file that comes in pieces over HTTP, on its way into the store: its File Meta Information says what follows.

C-STORE announces that instead and needs none of this. Used by STOW-RS (`node/web/stow.py`) and by what fetches
(`node/watch/`).

Reference: PS3.10 7.1.
"""

from functools import cache

from node.index import NewInstance
from node.receive.contexts import CT_SOP_CLASSES, decodable_transfer_syntaxes
from node.receive.elements import find_elements
from node.receive.headers import Announced
from node.receive.sender import Source
from node.receive.status import CANNOT_UNDERSTAND, RefusedError
from node.receive.store import Arriving, Store

_LENGTH_BYTES = 144  # preamble, prefix, and the element that gives the length of the File Meta Information
_PREFIX_BYTES = 132  # preamble and prefix
_MAX_META_BYTES = 65536
_META_TAGS = (0x00020002, 0x00020003, 0x00020010)  # SOP Class, SOP Instance, transfer syntax
# Failure Reasons that C-STORE has no need for: it refuses the presentation context (PS3.18 table I.2-2).
_NO_SOP_CLASS, _NO_TRANSFER_SYNTAX = 0x0122, 0xC122


class IncomingFile:
    """One file, taken piece by piece. study_instance_uid: of the Study it must belong to, "" for any."""

    def __init__(self, store: Store, source: Source, study_instance_uid: str = "") -> None:
        self._store, self._source, self._study = store, source, study_instance_uid
        self._head = bytearray()
        self._arriving: Arriving | None = None
        self.announced: Announced | None = None
        self.refusal: RefusedError | None = None

    def write(self, data: memoryview) -> None:
        """Takes the next bytes; what is refused is read on and thrown away."""
        try:
            if self.refusal is not None:
                return
            if self._arriving is None:
                self._head += data
                data = self._begin()
            if self._arriving is not None:
                self._arriving.write(data)
        except RefusedError as refusal:
            self.refusal, self._arriving = refusal, None

    def _begin(self) -> memoryview:
        """Reads the File Meta Information once it is here; what has come of the dataset.

        Raises:
            RefusedError: it is no DICOM file, or is not taken.
        """
        nothing = memoryview(b"")
        if len(self._head) < _LENGTH_BYTES:
            return nothing
        end = _LENGTH_BYTES + int.from_bytes(self._head[140:144], "little")
        if self._head[128:138] != b"DICM\x02\x00\x00\x00UL" or end > _MAX_META_BYTES:
            raise RefusedError(CANNOT_UNDERSTAND, "it is not a DICOM file (PS3.10 7.1)")
        if len(self._head) < end:
            return nothing
        meta = find_elements(bytes(self._head[_PREFIX_BYTES:end]), _META_TAGS, is_implicit=False)
        sop_class, sop_instance, syntax = (_uid(meta.value(tag)) if meta else "" for tag in _META_TAGS)
        if not (sop_class and sop_instance and syntax):
            raise RefusedError(CANNOT_UNDERSTAND, "its File Meta Information lacks a UID (PS3.10 7.1)")
        self.announced = Announced(
            sop_class_uid=sop_class,
            sop_instance_uid=sop_instance,
            transfer_syntax_uid=syntax,
            study_instance_uid=self._study,
        )
        if self.announced.sop_class_uid not in CT_SOP_CLASSES:
            raise RefusedError(_NO_SOP_CLASS, "only CT is taken")
        if self.announced.transfer_syntax_uid not in _transfer_syntaxes():
            raise RefusedError(_NO_TRANSFER_SYNTAX, "its transfer syntax cannot be decoded here")
        self._arriving = self._store.begin(self.announced, self._source)
        rest = memoryview(bytes(self._head[end:]))
        self._head.clear()
        return rest

    def finish(self) -> NewInstance:
        """Makes it durable, and says what it is; called in a thread.

        Raises:
            RefusedError, OSError, SQLAlchemyError: it is not taken.
        """
        if self.refusal is not None:
            raise self.refusal
        if self._arriving is None:
            raise RefusedError(CANNOT_UNDERSTAND, "it is not a DICOM file (PS3.10 7.1)")
        return self._arriving.finish()

    def abandon(self) -> None:
        """It broke off."""
        if self._arriving is not None:
            self._arriving.abandon()


def _uid(value: bytes) -> str:
    return value.decode("ascii", "replace").rstrip("\0 ")


@cache
def _transfer_syntaxes() -> frozenset[str]:
    return frozenset(decodable_transfer_syntaxes())
