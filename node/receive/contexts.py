"""What is offered: the SOP Classes and transfer syntaxes that an association may carry."""

from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    AllTransferSyntaxes,
    CTImageStorage,
    EnhancedCTImageStorage,
    LegacyConvertedEnhancedCTImageStorage,
)

CT_SOP_CLASSES = (CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage)


def decodable_transfer_syntaxes() -> list[str]:
    """Transfer syntaxes whose pixel data can be decoded by what is installed, uncompressed first."""

    def can_decode(uid: str) -> bool:
        try:
            return bool(get_decoder(uid).is_available)
        except NotImplementedError:
            return False

    return [str(uid) for uid in AllTransferSyntaxes if can_decode(uid)]
