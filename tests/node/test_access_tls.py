"""The receiver under TLS: dcmtk with and without certificates, and handshakes that do not end."""

import os
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from node.config import Config
from node.implementation import make_ae
from node.index import Index
from node.peers import ClientTls
from node.tls import client_context
from tests.certificates import Authority, Files
from tests.factories import make_ct_series
from tests.node.calling import connect, is_closed, is_quiet, let_pass
from tests.raw_scu import ON_OPEN
from tests.waiting import wait_until

# pynetdicom leaves the socket of a refused connection open.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <:ResourceWarning")


needs_dcmtk = pytest.mark.skipif(
    not Path("/usr/bin/storescu").exists(), reason="dcmtk is not installed (apt-get install dcmtk)"
)


@pytest.fixture(scope="module")
def node_files(authority: Authority) -> Files:
    return authority.sign("node")


def tls_settings(files: Files, **given: Any) -> dict[str, Any]:
    return {"certificate": files.certificate, "key": files.key, **given}


def dcmtk(config: Config, *options: object, paths: tuple[Path, ...] = ()) -> subprocess.CompletedProcess[str]:
    tool = "storescu" if paths else "echoscu"
    command = [f"/usr/bin/{tool}", "-aet", "CT1", "-aec", "CSPINE", *map(str, options), "127.0.0.1"]
    return subprocess.run(
        [*command, str(config.receive.port), *map(str, paths)],
        env=os.environ | {"TCP_NODELAY": "1"}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@needs_dcmtk
def test_dcmtk_stores_under_tls_with_a_client_certificate_and_is_refused_without(
    start: Callable[..., Config], authority: Authority, node_files: Files, index: Index, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    config = start(tls=tls_settings(node_files, client_ca=authority.certificate))
    paths = tuple(make_ct_series(tmp_path / "sent", num_slices=5))
    theirs = authority.sign("ct")
    done = dcmtk(config, "+tls", theirs.key, theirs.certificate, "+cf", authority.certificate, paths=paths)
    assert done.returncode == 0, done.stderr
    assert [case.num_instances for case in index.cases()] == [5]

    def refused(*options: object) -> str:
        caplog.clear()
        assert dcmtk(config, *options).returncode != 0
        wait_until(lambda: "action=connection-refused" in caplog.text)
        return caplog.text.partition("address=127.0.0.1: ")[2].splitlines()[0]

    stranger = Authority(tmp_path, name="another").sign("stranger")
    late = authority.sign("late", days=(-20, -1))
    assert refused("+tla", "-ic").startswith("it shows no certificate of its own")
    assert refused("+tls", stranger.key, stranger.certificate, "-ic").startswith("its certificate cannot be trusted")
    assert refused("+tls", late.key, late.certificate, "-ic").endswith("certificate has expired")
    assert refused().startswith("it speaks plain DICOM")


@needs_dcmtk
@pytest.mark.parametrize("verify", ["none", "optional"])
def test_without_a_client_certificate_a_peer_is_let_in_if_none_is_required(
    start: Callable[..., Config], authority: Authority, node_files: Files, verify: str
) -> None:
    client_ca = {} if verify == "none" else {"client_ca": authority.certificate}
    config = start(tls=tls_settings(node_files, verify=verify, **client_ca))
    assert dcmtk(config, "+tla", "+cf", authority.certificate).returncode == 0


@needs_dcmtk
def test_a_handshake_that_does_not_end_holds_up_nobody_and_is_cut_off(
    start: Callable[..., Config], authority: Authority, node_files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = start(tls=tls_settings(node_files, verify="none"), associate_timeout_s=1000)
    with closing(connect(config, "127.0.0.2")) as silent:
        assert dcmtk(config, "+tla", "+cf", authority.certificate).returncode == 0
        assert is_quiet(silent)  # it was not waited for
        let_pass(1000, monkeypatch)
        assert is_closed(silent)


@needs_dcmtk
def test_a_renewed_certificate_is_used_for_the_next_association_and_running_ones_go_on(
    start: Callable[..., Config], tmp_path: Path
) -> None:
    authority, renewed = Authority(tmp_path / "a", name="first"), Authority(tmp_path / "b", name="second")
    files = authority.sign("node")
    config = start(tls=tls_settings(files, verify="none"))
    ae = make_ae("CT1")
    ae.add_requested_context(CTImageStorage, ExplicitVRLittleEndian)
    context = client_context(ClientTls(ca=authority.certificate))
    running = ae.associate("127.0.0.1", config.receive.port, tls_args=(context, "127.0.0.1"), evt_handlers=ON_OPEN)
    assert running.is_established
    new = renewed.sign("node")
    for old_path, new_path in ((files.key, new.key), (files.certificate, new.certificate)):
        new_path.replace(old_path)
    assert dcmtk(config, "+tla", "+cf", renewed.certificate).returncode == 0
    assert dcmtk(config, "+tla", "+cf", authority.certificate).returncode != 0
    (path,) = make_ct_series(tmp_path / "sent", num_slices=1)
    assert running.send_c_store(path).Status == 0
    running.release()
