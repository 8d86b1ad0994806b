"""What a client accepts, and which of what we have suits it best.

Reference: RFC 9110 12.5.1, PS3.18 8.7.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from node.web.multipart import parse_content_type


@dataclass(frozen=True, kw_only=True)
class Offer:
    """A representation that can be given. part: of multipart/related, the media type of its parts.

    transfer_syntaxes: that it can be given in, the one it is stored in first; none where there is no such thing.
    """

    media_type: str
    part: str = ""
    transfer_syntaxes: tuple[str, ...] = field(default=())


@dataclass(frozen=True)
class Choice:
    """An offer and the transfer syntax to give it in, "" where there is none."""

    offer: Offer
    transfer_syntax: str


def choose(accept: str, offers: Sequence[Offer], *, default_syntax: str = "") -> Choice | None:
    """The offer that suits best, None if none does. No Accept header, or an empty one, accepts the first.

    default_syntax: what a client gets that names no transfer syntax, if it can be had.
    """
    wanted = [_parse(text) for text in _split(accept or "*/*")]
    best: tuple[float, Choice] | None = None
    for quality, media_type, parameters in wanted:
        if quality <= 0:
            continue
        for offer in offers:
            if not _is_a(media_type, offer.media_type):
                continue
            part = parameters.get("type", "")
            if media_type == "multipart/related" and part and not _is_a(part.lower(), offer.part):
                continue
            syntax = _syntax(parameters.get("transfer-syntax", ""), offer, default_syntax)
            if syntax is None:
                continue
            if best is None or quality > best[0]:
                best = quality, Choice(offer, syntax)
            break
    return best[1] if best else None


def _syntax(asked: str, offer: Offer, default: str) -> str | None:
    """The transfer syntax to give an offer in; None if what is asked for cannot be had."""
    if not offer.transfer_syntaxes:
        return ""
    if asked == "*":
        return offer.transfer_syntaxes[0]
    if asked:
        return asked if asked in offer.transfer_syntaxes else None
    return default if default in offer.transfer_syntaxes else offer.transfer_syntaxes[0]


def _is_a(asked: str, given: str) -> bool:
    kind, _, sub = asked.partition("/")
    return asked in ("*/*", given) or (sub == "*" and given.startswith(kind + "/"))


def _parse(text: str) -> tuple[float, str, dict[str, str]]:
    media_type, parameters = parse_content_type(text)
    try:
        quality = float(parameters.get("q", "1"))
    except ValueError:
        quality = 0.0
    return (quality if 0 <= quality <= 1 else 0.0), media_type, parameters


def _split(accept: str) -> list[str]:
    """The choices of an Accept header: at commas, but not in quotes."""
    choices, quoted = [""], False
    for character in accept:
        if character == '"':
            quoted = not quoted
        if character == "," and not quoted:
            choices.append("")
        else:
            choices[-1] += character
    return [choice for choice in choices if choice.strip()]
