"""Person names (PN), which can be written in several ways."""


def shortest_name(name: str) -> str:
    """A name without the delimiters and spaces that may end it and its component groups: `Doe^Jane^^^==` is `Doe^Jane`.

    Reference: PS3.5 table 6.2-1 and 6.2.1 (trailing null components and component groups, and their delimiters, may be
    omitted; padding with spaces does not count).
    """
    return "=".join(group.rstrip("^ ") for group in name.split("=")).rstrip("=")
