"""What `cspine check` looks at before an administrator trusts a night to the node."""

import errno
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

from pydicom.uid import UID
from pynetdicom.sop_class import StudyRootQueryRetrieveInformationModelFind, Verification

from model import BundleError, load_pipeline
from node.config import Config, Destination, FolderDestination
from node.deliver import open_courier
from node.index import DatabaseError, Index
from node.notify.errors import NotifyError
from node.notify.trust import trusting
from node.peers import ClientTls, DicomPeer, DicomWebSource, OrthancSource
from node.process import describe_listen_error, try_write
from node.retention import size_bytes
from node.send import SendError, answers_echo
from node.service import is_running
from node.targets import Hl7Target, MailTarget, Target
from node.tls import TlsError, check_dates, check_pair, client_context, server_context

Check = tuple[str, str, str]
"""Name, problem ("" when there is none), detail."""


def run_checks(config: Config) -> Iterator[Check]:
    """One result for each thing that must be right; the configuration itself is loaded already."""
    yield "configuration", "", "valid"
    is_node_running = is_running(config.data_dir)
    yield _check_port("port", config.receive.host, config.receive.port, is_node_running)
    if config.web.enabled:
        yield _check_port("web port", config.web.host, config.web.port, is_node_running)
    yield "peers", "", _describe_allow(config)
    yield from check_certificates(config)
    yield _check_disk(config)
    yield _check_database(config)
    yield _check_model(config)
    for source in config.sources.each:
        yield _check_source(source)
    for name, peer, sop_class in _called_peers(config):
        yield _check_peer(config, name, peer, sop_class)
    for destination in config.deliver.destinations:
        yield _check_destination(config, destination)
    for target in config.notify.targets:
        yield _check_target(target)


def _check_port(name: str, host: str, port: int, is_node_running: bool) -> Check:
    where = f"{host}:{port}"
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE and is_node_running:
            return name, "", f"{where} is in use; the node is running"
        return name, f"{where} cannot be listened on: {describe_listen_error(error)}", ""
    return name, "", f"{where} is free"


def _describe_allow(config: Config) -> str:
    allow = config.receive.allow
    if allow == "loopback":
        return "this machine only (receive.allow is loopback)"
    if allow == "any":
        return "whoever reaches the port (receive.allow is any)"
    return f"only those that receive.allow names ({len(allow)})"


def check_certificates(config: Config) -> Iterator[Check]:
    """Whether keys belong to certificates and dates are right, of our ports and towards those we call."""
    contexts: list[tuple[str, Callable[[], object], list[Path]]] = []
    if (ours := config.receive.tls) is not None:
        contexts.append(("receive.tls", partial(server_context, ours), [ours.certificate]))
    if config.web.enabled and (web := config.web.tls) is not None:
        contexts.append(("web.tls", partial(check_pair, web.certificate, web.key), [web.certificate]))
    called: list[tuple[str, ClientTls | None]] = [(f"source {item.name}", item.tls) for item in config.sources.each]
    called += [(name, peer.tls) for name, peer, _ in _called_peers(config)]
    called += [
        (f"destination {item.name}", item.tls)
        for item in config.deliver.destinations
        if not isinstance(item, FolderDestination)
    ]
    for name, tls in called:
        if tls is not None:
            contexts.append((name, partial(client_context, tls), [tls.certificate] if tls.certificate else []))
    for name, make, paths in contexts:
        try:
            make()
            for path in paths:
                yield f"certificate {path.name}", *check_dates(path)
        except TlsError as error:
            yield name, str(error), ""


def _check_disk(config: Config) -> Check:
    try:
        try_write(config.data_dir)
    except OSError as error:
        return "disk", f"{config.data_dir} cannot be written: {error.strerror}", ""
    free_mb = shutil.disk_usage(config.data_dir).free // 2**20
    if free_mb < config.receive.min_free_disk_mb:
        return "disk", f"{free_mb} MB free, min_free_disk_mb is {config.receive.min_free_disk_mb}", ""
    return "disk", "", f"{config.data_dir}, {free_mb} MB free"


def _check_database(config: Config) -> Check:
    try:
        with closing(Index(config.data_dir, config.database)) as index:
            paused = ", paused: `cspine resume` has cases analysed again" if index.paused_since() is not None else ""
            return "database", "", f"{index.where}{paused}"
    except DatabaseError as error:
        return "database", str(error), ""


def _check_model(config: Config) -> Check:
    try:
        info = load_pipeline(config.analyse.bundle, config.analyse.device, config.analyse.threads).info
    except (BundleError, ValueError) as error:  # ValueError: there is no such device
        return "model", str(error), ""
    return "model", "", f"{info.name} {info.version}: {info.trained_on}"


def _check_source(source: OrthancSource | DicomWebSource) -> Check:
    name = f"source {source.name}"
    try:
        if isinstance(source, DicomWebSource):
            from node.watch import dicomweb

            return name, "", f"{source.where} {dicomweb.check_source(source)}"
        from node.watch import orthanc

        return name, "", f"{source.where} {orthanc.check_source(source)}"
    except ModuleNotFoundError as error:
        return name, f"needs {error.name}: pip install 'cspine-node[orthanc]'", ""
    except SendError as error:
        return name, str(error), ""


def _called_peers(config: Config) -> list[tuple[str, DicomPeer, UID]]:
    """Peers that the node calls beside destinations: as messages call them, and which SOP Class they must offer."""
    find = StudyRootQueryRetrieveInformationModelFind
    return [
        *((f"complete source {peer.name}", peer, find) for peer in config.complete.sources),
        *((f"retrieve peer {peer.name}", peer, Verification) for peer in config.retrieve.peers),
        *((f"commitment peer {peer.name}", peer, Verification) for peer in config.commitment.peers),
    ]


def _check_peer(config: Config, name: str, peer: DicomPeer, sop_class: UID) -> Check:
    try:
        takes_part = answers_echo(peer, sop_class, calling_ae_title=config.receive.ae_title)
    except SendError as error:
        return name, str(error), ""
    if not takes_part:
        return name, f"{peer.where} does not let {config.receive.ae_title} ask by C-FIND; allow that there", ""
    return name, "", f"{peer.where} answers C-ECHO{'' if sop_class == Verification else ' and C-FIND'}"


def _check_target(target: Target) -> Check:
    """Whether what it needs can be read; to see what it answers it must be sent something."""
    name = f"target {target.name}"
    try:
        if not isinstance(target, Hl7Target):
            target.read_secret()
        if isinstance(target, Hl7Target | MailTarget):
            trusting(target.ca_file)
    except (OSError, NotifyError) as error:
        return name, str(error), ""
    return name, "", f"not asked: `cspine notifications test {target.name}` sends it a made-up case"


def _check_destination(config: Config, destination: Destination) -> Check:
    name = f"destination {destination.name}"
    try:
        courier = open_courier(destination, config.receive.ae_title)
        try:
            said = f"{destination.where} {courier.check()}"
            if isinstance(destination, FolderDestination) and _is_beside(destination.path, config.data_dir):
                held_mb = size_bytes(destination.path) / 1e6
                said += f"; {held_mb:.0f} MB on the disk of the data folder, which retention never removes"
            return name, "", said
        finally:
            courier.close()
    except SendError as error:
        return name, str(error), ""
    except OSError as error:
        return name, f"{error.filename or destination.name}: {error.strerror}", ""


def _is_beside(folder: Path, data_dir: Path) -> bool:
    """Whether what is in the folder takes room from the data folder."""
    return folder.is_dir() and data_dir.is_dir() and folder.stat().st_dev == data_dir.stat().st_dev
