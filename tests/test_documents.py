"""What the documents say is there is there."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from pydicom.uid import (
    UID,
    AllTransferSyntaxes,
    CTImageStorage,
    ImplicitVRLittleEndian,
    MRImageStorage,
    SegmentationStorage,
)
from pynetdicom import AE
from pynetdicom.sop_class import StorageCommitmentPushModel, Verification

from node.config import Config, load_config
from node.conformance import OBJECTS, STORE_STATUSES, conformance_statement
from node.index import Index
from node.peers import ClientTls, DicomPeer
from node.profiles import Kind
from node.receive import status
from node.receive.contexts import CT_SOP_CLASSES
from node.send import SendError
from node.tls import check_dates
from node.web import viewer
from tests.raw_scu import echo
from tests.receiver import listening

# pynetdicom leaves the socket of a refused connection open.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <:ResourceWarning")

ROOT = Path(__file__).parents[1]
GET_OHIF = "node/web/get_ohif.sh"
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("*/*.md")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text())
    missing = [link for link in links if not (document.parent / link).exists()]
    assert not missing


def test_the_conformance_statement_is_what_the_code_says() -> None:
    written = (ROOT / "docs" / "conformance.md").read_text()
    assert written == conformance_statement(), (
        "docs/conformance.md is not of today's code: run `make conformance` (cspine conformance > docs/conformance.md)"
    )


def test_the_conformance_statement_explains_every_status_of_c_store() -> None:
    assert set(STORE_STATUSES) == {
        code for name, code in vars(status).items() if name.isupper() and code in range(65536)
    }


def test_the_conformance_statement_lists_what_the_receiver_takes(
    make_config: Callable[..., Config], index: Index
) -> None:
    sections = conformance_statement().split("\n## ")
    listed = re.findall(r"\| ([0-9.]+) \|$", "".join(sections[3:5]), re.MULTILINE)
    sop_classes = [uid for uid in listed if UID(uid).type == "SOP Class"]
    syntaxes = [uid for uid in listed if UID(uid).type == "Transfer Syntax"]
    ae = AE(ae_title="CT1")
    for sop_class in (Verification, StorageCommitmentPushModel, *CT_SOP_CLASSES, MRImageStorage, SegmentationStorage):
        ae.add_requested_context(sop_class, [ImplicitVRLittleEndian])
    for syntax in AllTransferSyntaxes:
        ae.add_requested_context(CTImageStorage, [syntax])
    with listening(make_config(), index, grace_s=0.2) as config:
        association = ae.associate("127.0.0.1", config.receive.port)
        accepted = association.accepted_contexts
        association.release()
    assert {c.abstract_syntax for c in accepted} == set(sop_classes)
    assert {c.transfer_syntax[0] for c in accepted if c.abstract_syntax == CTImageStorage} == set(syntaxes)


def test_the_conformance_statement_knows_every_object_that_can_be_delivered() -> None:
    assert set(OBJECTS) == set(Kind) - {Kind.FINDINGS_JSON}


def openssl_recipe() -> str:
    """The shell commands of docs/security.md that make certificates."""
    text = (ROOT / "docs" / "security.md").read_text()
    (recipe,) = (block for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) if "openssl req" in block)
    return str(recipe)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl command")
def test_the_recipe_for_certificates_makes_a_port_that_takes_only_those_it_signed(
    make_config: Callable[..., Config], index: Index, tmp_path: Path
) -> None:
    recipe = openssl_recipe().replace("node.example.org", "localhost")
    subprocess.run(["sh", "-euc", recipe], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    tls = {"certificate": tmp_path / "node.pem", "key": tmp_path / "node.key", "client_ca": tmp_path / "ca.pem"}
    config = make_config(receive={"tls": tls})
    ours = {"ca": tmp_path / "ca.pem", "certificate": tmp_path / "ct1.pem", "key": tmp_path / "ct1.key"}
    with listening(config, index, grace_s=0.2):
        peer = DicomPeer(name="node", host="localhost", port=config.receive.port, ae_title="CSPINE")
        echo(peer.model_copy(update={"tls": ClientTls(**ours)}), calling_ae_title="CT1")
        with pytest.raises(SendError):
            echo(peer.model_copy(update={"tls": ClientTls(ca=ours["ca"])}), calling_ae_title="CT1")
    assert "WARNING" not in check_dates(tmp_path / "node.pem")[1]


def test_every_configuration_in_the_security_guide_is_valid(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "security.md").read_text()
    examples = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert len(examples) >= 3
    for example in examples:
        path = tmp_path / "config.yaml"
        path.write_text(example)
        load_config(path)


def test_the_changelog_knows_this_version() -> None:
    assert f"## {version('cspine-node')} " in (ROOT / "CHANGELOG.md").read_text()


# ---- the container ----


def test_the_node_of_the_compose_file_publishes_what_it_serves(tmp_path: Path) -> None:
    node = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    path = tmp_path / "config.yaml"
    path.write_text(node["configs"]["node"]["content"])
    web = load_config(path).web
    assert (web.enabled, web.allow) == (True, "tokens")
    assert node["services"]["node"]["ports"] == [f"127.0.0.1:{web.port}:{web.port}"]


def test_the_image_holds_the_viewer_that_is_tested_where_the_node_looks_for_it() -> None:
    dockerfile, makefile = ((ROOT / name).read_text() for name in ("Dockerfile", "Makefile"))
    (version,) = re.findall(r"^version=(.*)$", (ROOT / GET_OHIF).read_text(), re.MULTILINE)
    assert "sh get_ohif.sh /viewer\n" in dockerfile
    assert f"sh {GET_OHIF} .viewer\n" in makefile
    assert version not in dockerfile + makefile
    (place,) = re.findall(r"^COPY --from=viewer \S+ (.*)$", dockerfile, re.MULTILINE)
    assert Path(place) in viewer.PLACES


def test_a_viewer_that_was_exchanged_on_its_way_is_not_installed(tmp_path: Path) -> None:
    (version,) = re.findall(r"^version=(.*)$", (ROOT / GET_OHIF).read_text(), re.MULTILINE)
    npm = tmp_path / "bin/npm"
    npm.parent.mkdir()
    npm.write_text(f"#!/bin/sh\necho anything > ohif-app-{version}.tgz\n")
    npm.chmod(0o755)
    (tmp_path / "viewer").mkdir()
    (tmp_path / "viewer/index.html").write_text("the old one")
    environment = os.environ | {"PATH": f"{npm.parent}:{os.environ['PATH']}"}
    command = ["sh", str(ROOT / GET_OHIF), "viewer"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "it was exchanged or damaged" in done.stderr
    assert (tmp_path / "viewer/index.html").read_text() == "the old one"


def test_what_the_image_is_made_of_is_sent_to_the_builder() -> None:
    dockerfile, sent = (ROOT / "Dockerfile").read_text(), (ROOT / ".dockerignore").read_text().split()
    copied = " ".join(re.findall(r"^COPY (?:--chmod=\S+ )?((?!-).*) \S+$", dockerfile, re.MULTILINE)).split()
    assert {"container.yaml", "pyproject.toml", "model"} <= set(copied)
    assert [name for name in copied if f"!{name.split('/')[0]}" not in sent or not (ROOT / name).exists()] == []
