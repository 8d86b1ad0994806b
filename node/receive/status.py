"""How a C-STORE is answered when it is not taken."""

# C-STORE statuses (PS3.4 B.2.3)
SUCCESS = 0x0000
SOP_CLASS_NOT_SUPPORTED = 0x0122  # PS3.7 C.4.10
OUT_OF_RESOURCES = 0xA700
MISMATCH = 0xA900
CANNOT_UNDERSTAND = 0xC000
CONFLICT = 0xC111


class RefusedError(Exception):
    """An Instance is not taken: the C-STORE status and a sentence for the sender."""

    def __init__(self, status: int, comment: str) -> None:
        super().__init__(comment)
        self.status = status
