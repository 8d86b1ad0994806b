"""TLS as a client, and what is said of certificates; as a server it is asked in test_access_tls.py."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from node.check import check_certificates
from node.config import Config, DeliverConfig, DicomDestination, ReceiveConfig, ReceiveTls
from node.peers import ClientTls
from node.send import SendError, send_files
from node.tls import ServerTls, TlsError, check_dates, client_context, server_context
from tests.certificates import Authority
from tests.factories import make_ct_series
from tests.ports import free_port
from tests.raw_scu import echo
from tests.waiting import wait_until

# pynetdicom leaves the socket of a refused connection open.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <:ResourceWarning")

needs_dcmtk = pytest.mark.skipif(
    not Path("/usr/bin/storescp").exists(), reason="dcmtk is not installed (apt-get install dcmtk)"
)


@contextmanager
def storescp(folder: Path, *options: str) -> Iterator[int]:
    """dcmtk as a Storage SCP under TLS; its port."""
    folder.mkdir()
    port = free_port()
    command = ["/usr/bin/storescp", "-od", str(folder), *options, str(port)]
    with subprocess.Popen(command, env=os.environ | {"TCP_NODELAY": "1"}, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: f":{port:04X} 00000000:0000 0A" in Path("/proc/net/tcp").read_text())  # listens
            yield port
        finally:
            process.kill()


def destination(port: int, tls: ClientTls | None) -> DicomDestination:
    return DicomDestination(
        type="dicom", name="pacs", host="127.0.0.1", port=port, ae_title="PACS", timeout_s=30, tls=tls
    )


# ---- as a client ----


@needs_dcmtk
def test_instances_go_to_dcmtk_under_tls_with_a_client_certificate(authority: Authority, tmp_path: Path) -> None:
    theirs, ours = authority.sign("pacs"), authority.sign("node")
    sent = make_ct_series(tmp_path / "sent", num_slices=3)
    secured = ("+tls", str(theirs.key), str(theirs.certificate), "+cf", str(authority.certificate), "-rc")
    with storescp(tmp_path / "stored", *secured) as port:
        tls = ClientTls(ca=authority.certificate, certificate=ours.certificate, key=ours.key)
        assert send_files(sent, destination(port, tls), calling_ae_title="CSPINE") == []
        assert len(list((tmp_path / "stored").iterdir())) == 3
        with pytest.raises(SendError, match=r"TLS: it wants a certificate of ours; give one by tls.certificate"):
            echo(destination(port, ClientTls(ca=authority.certificate)), calling_ae_title="CSPINE")


@needs_dcmtk
def test_what_keeps_us_from_a_peer_under_tls_is_said(authority: Authority, tmp_path: Path) -> None:
    theirs = authority.sign("pacs")
    other = Authority(tmp_path, name="another")
    with storescp(tmp_path / "tls", "+tls", str(theirs.key), str(theirs.certificate), "-ic") as port:
        echo(destination(port, ClientTls(ca=authority.certificate)), calling_ae_title="CSPINE")
        for tls, reason in {
            ClientTls(
                ca=other.certificate
            ): "its certificate cannot be trusted: unable to get local issuer certificate",
            ClientTls(ca=authority.certificate, server_name="pacs.example.org"): "Hostname mismatch",
            ClientTls(ca=tmp_path / "none.pem"): "none.pem cannot be read: No such file or directory",
        }.items():
            with pytest.raises(SendError, match=reason):
                echo(destination(port, tls), calling_ae_title="CSPINE")
    with (
        storescp(tmp_path / "plain") as port,
        pytest.raises(SendError, match="cannot be spoken to under TLS: it "),
    ):
        echo(destination(port, ClientTls(ca=authority.certificate)), calling_ae_title="CSPINE")


@needs_dcmtk
def test_an_expired_certificate_of_the_peer_is_named(authority: Authority, tmp_path: Path) -> None:
    theirs = authority.sign("old", days=(-20, -1))
    with (
        storescp(tmp_path / "tls", "+tls", str(theirs.key), str(theirs.certificate), "-ic") as port,
        pytest.raises(SendError, match="its certificate cannot be trusted: certificate has expired"),
    ):
        echo(destination(port, ClientTls(ca=authority.certificate)), calling_ae_title="CSPINE")


# ---- files ----


def test_files_that_cannot_be_used_are_named_with_the_reason(authority: Authority, tmp_path: Path) -> None:
    first, second = authority.sign("first"), authority.sign("second")
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    for tls, reason in (
        (
            ReceiveTls(certificate=first.certificate, key=second.key, verify="none"),
            "does not belong to the certificate",
        ),
        (
            ReceiveTls(certificate=empty, key=first.key, verify="none"),
            "both must be PEM, the key without a password$",
        ),
        (
            ReceiveTls(certificate=first.certificate, key=first.key, client_ca=empty),
            "empty.pem holds no certificates in PEM",
        ),
    ):
        with pytest.raises(TlsError, match=reason):
            server_context(tls)
    with pytest.raises(TlsError, match="none cannot be read"):
        client_context(ClientTls(ca=tmp_path / "none"))


@pytest.mark.parametrize(
    ("days", "problem", "detail"),
    [
        ((-1, 365), "", "valid until"),
        ((-1, 20.5), "", "WARNING: that is in 20 days, renew it"),
        ((-20, -1), "expired on", ""),
        ((2, 20), "is valid from", ""),
    ],
)
def test_dates_are_judged_thirty_days_ahead(
    authority: Authority, days: tuple[float, float], problem: str, detail: str
) -> None:
    said = check_dates(authority.sign("dated", days=days).certificate)
    assert (problem in said[0], detail in said[1]) == (True, True)
    assert bool(problem) == bool(said[0])
    assert ("WARNING" in said[1]) == ("WARNING" in detail)


def test_of_a_chain_the_certificate_that_ends_first_counts(authority: Authority, tmp_path: Path) -> None:
    chain = tmp_path / "chain.pem"
    old = authority.sign("old", days=(-20, -1))
    chain.write_bytes(authority.sign("new").certificate.read_bytes() + old.certificate.read_bytes())
    assert "expired on" in check_dates(chain)[0]


def test_check_looks_at_the_certificates_of_the_port_and_of_destinations(authority: Authority, tmp_path: Path) -> None:
    good, soon, late = (
        authority.sign(name, days=(-20, days)) for name, days in (("good", 99), ("soon", 9.5), ("late", -1))
    )
    tls = ReceiveTls(certificate=soon.certificate, key=soon.key, client_ca=authority.certificate)
    client = ClientTls(ca=authority.certificate, certificate=late.certificate, key=late.key)
    config = Config(
        data_dir=tmp_path,
        receive=ReceiveConfig(tls=tls),
        deliver=DeliverConfig(destinations=(destination(1, client),)),
    )
    found = {name: (problem, detail) for name, problem, detail in check_certificates(config)}
    assert "in 9 days, renew it" in found["certificate soon.pem"][1]
    assert "expired on" in found["certificate late.pem"][0]
    mixed = config.receive.model_copy(update={"tls": tls.model_copy(update={"key": good.key})})
    ((_, problem, _),) = check_certificates(config.model_copy(update={"receive": mixed, "deliver": DeliverConfig()}))
    assert "does not belong to the certificate" in problem


def test_a_changed_certificate_is_taken_and_a_broken_one_is_not(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    files = authority.sign("server")
    server = ServerTls(ReceiveTls(certificate=files.certificate, key=files.key, verify="none"))
    first = server.context()
    assert server.context() is first
    authority.sign("server")
    second = server.context()
    assert second is not first
    files.key.write_text("no key")
    assert server.context() is second
    assert server.context() is second
    assert caplog.text.count("action=certificate-not-reloaded") == 1
    authority.sign("server")
    assert server.context() not in (first, second)
    assert caplog.text.count("action=certificate-reloaded") == 2
