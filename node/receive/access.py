"""Who may open an association, judged on its A-ASSOCIATE-RQ and the address it came from. Pure; asked by `guard.py`."""

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

from node.config import ReceiveConfig

Address = IPv4Address | IPv6Address

APPLICATION_CONTEXT = "1.2.840.10008.3.1.1.1"  # PS3.7 A.2.1, the only one there is


WRONG_APPLICATION_CONTEXT = (1, 1, 2)
CALLING_NOT_RECOGNIZED = (1, 1, 3)
CALLED_NOT_RECOGNIZED = (1, 1, 7)
LOCAL_LIMIT_EXCEEDED = (2, 3, 2)
REJECTIONS = {
    WRONG_APPLICATION_CONTEXT: "the application context is not that of DICOM",
    CALLING_NOT_RECOGNIZED: "no entry of `receive.allow` has the calling AE title and the address",
    CALLED_NOT_RECOGNIZED: "one has, and names another called AE title",
    (1, 2, 2): "the protocol version is not 1",
    LOCAL_LIMIT_EXCEEDED: "all associations are taken, or all that one address may have; try again",
}
"""Result, source and reason of an A-ASSOCIATE-RJ (PS3.8 9.3.4), and when each is sent; the fourth by pynetdicom."""


@dataclass(frozen=True, kw_only=True)
class Caller:
    """What is known of a peer before it is answered."""

    calling_ae_title: str
    called_ae_title: str
    address: Address
    application_context: str = APPLICATION_CONTEXT


@dataclass(frozen=True)
class Rejection:
    """One of `REJECTIONS`, and a sentence for the log."""

    code: tuple[int, int, int]
    message: str


def parse_address(text: str) -> Address:
    """The address that a socket names, without scope; an IPv4 address mapped into IPv6 is the IPv4 address."""
    address = ip_address(text.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def may_come_from(config: ReceiveConfig, address: Address) -> bool:
    """Whether anybody could be let in from this address, whatever the AE titles."""
    if config.allow == "any":
        return True
    if config.allow == "loopback":
        return address.is_loopback
    return any(peer.address is None or address in peer.address for peer in config.allow)


def judge(config: ReceiveConfig, caller: Caller) -> Rejection | None:
    """Why the association must be rejected, None if it may be opened."""
    if caller.application_context != APPLICATION_CONTEXT:
        return Rejection(
            WRONG_APPLICATION_CONTEXT, f"application context {caller.application_context:.64} is not that of DICOM"
        )
    if config.allow == "any":
        return None
    if config.allow == "loopback":
        if caller.address.is_loopback:
            return None
        return _unknown(caller, "receive.allow is loopback")
    at_address = [p for p in config.allow if p.address is None or caller.address in p.address]
    if not at_address:
        return _unknown(caller, f"no entry of receive.allow holds the address {caller.address}")
    calling = [p for p in at_address if p.ae_title in (None, caller.calling_ae_title)]
    if not calling:
        return _unknown(
            caller, f"no entry of receive.allow for {caller.address} names AE title {caller.calling_ae_title!r}"
        )
    if not any(p.called_ae_title in (None, caller.called_ae_title) for p in calling):
        expected = sorted({p.called_ae_title for p in calling if p.called_ae_title})
        return Rejection(
            CALLED_NOT_RECOGNIZED,
            f"it calls us {caller.called_ae_title!r}, and receive.allow expects {' or '.join(map(repr, expected))}; "
            "change either",
        )  # fmt: skip
    return None


def _unknown(caller: Caller, why: str) -> Rejection:
    entry = f"- {{ae_title: {caller.calling_ae_title!r}, address: {caller.address}}}"
    return Rejection(CALLING_NOT_RECOGNIZED, f"{why}; to let it in, add there: {entry}")
