"""What the documents say is there is there."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest
from pydicom.uid import UID

from node.receive.contexts import CT_SOP_CLASSES, decodable_transfer_syntaxes

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("*/*.md")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text())
    missing = [link for link in links if not (document.parent / link).exists()]
    assert not missing


def test_the_conformance_statement_lists_what_the_receiver_takes() -> None:
    text = (ROOT / "docs" / "conformance.md").read_text()
    for uid in (*CT_SOP_CLASSES, *decodable_transfer_syntaxes()):
        assert f"| {UID(uid).name} | {uid} |" in text
    assert f"C-Spine Node {version('cspine-node')}," in text


def test_the_changelog_knows_this_version() -> None:
    assert f"## {version('cspine-node')} " in (ROOT / "CHANGELOG.md").read_text()
