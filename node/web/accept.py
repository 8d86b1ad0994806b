"""What a client accepts, and which of what we have suits it best.

Reference: RFC 9110 12.5.1, PS3.18 8.7.
"""

from collections.abc import Iterator, Sequence
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


@dataclass(frozen=True)
class _Range:
    """One choice of an Accept header."""

    quality: float
    media_type: str
    part: str
    syntax: str

    def covers(self, choice: Choice) -> bool:
        """Whether it speaks of this representation."""
        return (
            _is_a(self.media_type, choice.offer.media_type)
            and (self.media_type != "multipart/related" or not self.part or _is_a(self.part, choice.offer.part))
            and (not choice.transfer_syntax or self.syntax in ("", "*", choice.transfer_syntax))
        )

    @property
    def precision(self) -> tuple[int, int, int]:
        """The more precise of two ranges decides (RFC 9110 12.5.1)."""
        return _precision(self.media_type), _precision(self.part), _precision(self.syntax)

    def choices(self, offers: Sequence[Offer], default_syntax: str) -> Iterator[Choice]:
        """What it asks for, the best first."""
        for offer in offers:
            syntaxes = offer.transfer_syntaxes or ("",)
            if not self.syntax:
                syntaxes = (default_syntax,) if default_syntax in syntaxes else syntaxes[:1]
            for syntax in syntaxes:
                choice = Choice(offer, syntax)
                if self.covers(choice):
                    yield choice


def choose(accept: str, offers: Sequence[Offer], *, default_syntax: str = "") -> Choice | None:
    """The offer that suits best, None if none does. No Accept header, or an empty one, accepts the first.

    default_syntax: what a client gets that names no transfer syntax, if it can be had.
    """
    ranges = [_parse(text) for text in _split(accept or "*/*")]
    choices = dict.fromkeys(choice for asked in ranges for choice in asked.choices(offers, default_syntax))
    qualities = {
        choice: max((one.precision, one.quality) for one in ranges if one.covers(choice))[1] for choice in choices
    }
    best = max(choices, key=qualities.__getitem__, default=None)  # the first of those that are as good
    return best if best is not None and qualities[best] > 0 else None


def _is_a(asked: str, given: str) -> bool:
    kind, _, sub = asked.partition("/")
    return asked in ("*/*", given) or (sub == "*" and given.startswith(kind + "/"))


def _precision(asked: str) -> int:
    """Of a media type or a transfer syntax: none, any, any of a kind, or one."""
    return 0 if not asked else 1 if asked in ("*", "*/*") else 2 if asked.endswith("/*") else 3


def _parse(text: str) -> _Range:
    media_type, parameters = parse_content_type(text)
    try:
        quality = float(parameters.get("q", "1"))
    except ValueError:
        quality = 0.0
    return _Range(
        quality=quality if 0 <= quality <= 1 else 0.0,
        media_type=media_type,
        part=parameters.get("type", "").lower(),
        syntax=parameters.get("transfer-syntax", ""),
    )


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
