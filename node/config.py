"""The node's configuration: one YAML file, loaded and checked once, then handed down frozen.

Every setting has a default here; `config.yaml` at the top of the repository says the same with comments and units, and
a test keeps the two equal. Unknown keys and impossible values are all reported at once, each with its line.
"""

import os
import re
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    SecretStr,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from node.config_faults import Loader, describe_all, describe_yaml_error, lines_of, written_like
from node.peers import DicomPeer, HttpServer, SourcesConfig
from node.profiles import Profile, ProfileSetting
from node.rules.settings import RulesConfig
from node.settings import AETitle, Port, Seconds, Section, check_names, is_loopback, listed, repeated
from node.targets import NotifyConfig
from node.web.settings import WebConfig


class ConfigError(Exception):
    """The configuration cannot be used; the message lists every fault with its line."""


def _parse_network(value: object) -> object:
    """The network that an address or network in CIDR notation names; an address is a network of one."""
    if not isinstance(value, str):
        return value
    try:
        return ip_network(value.strip())
    except ValueError as error:
        raise ValueError("an address is written like 10.0.0.5 or fd00::5, a network like 10.0.0.0/24") from error


Network = Annotated[IPv4Network | IPv6Network, BeforeValidator(_parse_network)]
Days = Annotated[float, Field(ge=0, allow_inf_nan=False)]


def _check_postgresql_url(value: SecretStr) -> SecretStr:
    """The URL, hidden since it may hold a password."""
    if not re.fullmatch(r"postgresql://[^/?#\s]*/[^/?#\s]+(\?\S*)?", value.get_secret_value()):
        raise ValueError("the URL of a PostgreSQL database is postgresql://USER:PASSWORD@HOST:PORT/NAME")
    return value


PostgreSQLURL = Annotated[SecretStr, AfterValidator(_check_postgresql_url)]


class Peer(Section):
    """Who may open associations: every condition that is set must hold."""

    ae_title: AETitle | None = None
    called_ae_title: AETitle | None = None
    address: Network | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self == Peer.model_construct():
            raise ValueError("an entry names ae_title, called_ae_title or address; for everyone write allow: any")
        return self


def _check_not_empty(peers: tuple[Peer, ...]) -> tuple[Peer, ...]:
    if not peers:
        raise ValueError("an empty list lets nobody in; name peers, or write allow: loopback")
    return peers


Allow = Annotated[
    Annotated[Literal["loopback", "any"], Tag("word")]
    | Annotated[tuple[Peer, ...], AfterValidator(_check_not_empty), Tag("list")],
    Discriminator(lambda value: "list" if isinstance(value, list | tuple) else "word"),
]


class ReceiveTls(Section):
    """TLS for the connections that peers make to us."""

    certificate: Path
    key: Path
    verify: Literal["required", "optional", "none"] = "required"
    client_ca: Path | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.verify != "none" and self.client_ca is None:
            raise ValueError(
                f"verify is {self.verify}, so client_ca must name the authorities of the peers' certificates; "
                "to take peers without a certificate write verify: none"
            )
        if self.verify == "none" and self.client_ca is not None:
            raise ValueError("client_ca is not used while verify is none")
        return self


class ReceiveConfig(Section):
    """The C-STORE SCP."""

    ae_title: AETitle = "CSPINE"
    host: str = Field(default="127.0.0.1", min_length=1)  # empty would be every interface
    port: Port = 11112
    allow: Allow = "loopback"
    tls: ReceiveTls | None = None
    processes: int = Field(default=2, ge=1, le=64)
    backlog: int = Field(default=128, ge=1, le=65535)
    max_associations: int = Field(default=64, ge=1, le=1000)
    max_associations_per_address: int = Field(default=32, ge=1, le=1000)
    associate_timeout_s: Seconds = 5.0
    max_pdu_kb: int = Field(default=1024, ge=16, le=1024 * 1024)
    max_instance_mb: int = Field(default=2048, ge=1, le=1024 * 1024)
    network_timeout_s: Seconds = 60.0
    min_free_disk_mb: int = Field(default=1024, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.allow == "loopback" and not is_loopback(self.host):
            raise ValueError(
                f"host {self.host} is for other machines, and allow is loopback, which lets none of them in; write "
                "allow: [{ae_title: CT1, address: 10.0.0.0/24}] with the titles and addresses of yours, or allow: any"
            )
        return self


class Source(DicomPeer):
    """A sender that can be asked by C-FIND how many Instances a Series has. sends_as: its calling AE titles."""

    sends_as: Annotated[tuple[AETitle, ...], BeforeValidator(listed), Field(min_length=1)]
    timeout_s: Seconds = 3.0


class CompleteConfig(Section):
    """When a Series is whole, and whether it can be analysed."""

    quiet_time_s: Seconds = 30.0
    min_slices: int = Field(default=30, ge=3)
    max_spacing_mm: float = Field(default=5.0, gt=0, le=20)
    sources: tuple[Source, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if twice := repeated(title for source in self.sources for title in source.sends_as):
            raise ValueError(f"two sources send as {twice}; only one can be asked")
        return self


Pattern = Annotated[str, Field(min_length=1)]
"""A text in which * stands for any characters and ? for one."""


class PriorityConfig(Section):
    """Which cases are analysed before the others."""

    stat_ae_titles: tuple[AETitle, ...] = ()
    stat_procedure_priorities: tuple[Pattern, ...] = ("STAT", "HIGH")
    stat_departments: tuple[Pattern, ...] = ()
    stat_stations: tuple[Pattern, ...] = ()
    stat_locations: tuple[Pattern, ...] = ()
    max_routine_wait_s: Seconds = 3600.0


class CommitmentConfig(Section):
    """Where requesters of storage commitment listen for reports once they have ended their association."""

    peers: tuple[DicomPeer, ...] = ()


class RetrieveConfig(Section):
    """Query and retrieve: whether we answer, and whom we know."""

    enabled: bool = False
    peers: tuple[DicomPeer, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_names("peers", (peer.name for peer in self.peers))
        check_names("peers", (peer.ae_title for peer in self.peers), "AE title")
        return self


class TimeoutsConfig(Section):
    """How long each step of an analysis may take, by the names that `analyse_series` gives them."""

    read: Seconds = 120.0
    segment: Seconds = 300.0
    classify: Seconds = 300.0
    encode: Seconds = 120.0


class AnalyseConfig(Section):
    """The worker processes that run the model."""

    bundle: Path | None = None
    device: Annotated[str, written_like(r"auto|cpu|cuda(:\d+)?", "auto, cpu, cuda or cuda:1")] = "auto"
    workers: int = Field(default=1, ge=1, le=64)
    threads: int | None = Field(default=None, ge=1, le=256)
    timeouts_s: TimeoutsConfig = TimeoutsConfig()
    max_attempts: int = Field(default=3, ge=1, le=100)


class DicomDestination(DicomPeer):
    """A Storage SCP that gets the results by C-STORE."""

    type: Literal["dicom"]
    verify: Literal["query", "storage-commitment", "none"] = "query"
    verify_timeout_s: Seconds = 300.0
    profile: ProfileSetting = Profile()


class _HttpDestination(HttpServer):
    verify: Literal["query", "none"] = "query"
    verify_timeout_s: Seconds = 300.0
    profile: ProfileSetting = Profile()


class DicomWebDestination(_HttpDestination):
    """A DICOMweb server that gets the results by STOW-RS."""

    type: Literal["dicomweb"]


class OrthancDestination(_HttpDestination):
    """An Orthanc that gets the results over its REST API."""

    type: Literal["orthanc"]
    source_metadata: int | None = Field(default=None, ge=1024, le=65535)
    label: Annotated[str, written_like(r"[A-Za-z0-9_-]{1,64}", "c-spine_1, in at most 64 characters")] | None = None
    replace: bool = False


class FolderDestination(Section):
    """A folder that gets one sub-folder per result set: `<StudyInstanceUID>/<SeriesInstanceUID>/`."""

    type: Literal["folder"]
    name: str = Field(min_length=1)
    path: Path
    verify: Literal["read-back", "none"] = "read-back"
    profile: ProfileSetting = Profile()

    @property
    def where(self) -> str:
        """The destination as messages call it."""
        return str(self.path)


Destination = DicomDestination | DicomWebDestination | OrthancDestination | FolderDestination


class DeliverConfig(Section):
    """Where results go, and how patiently."""

    retry_first_s: Seconds = 10.0
    retry_max_s: Seconds = 86400.0
    max_attempts: int = Field(default=30, ge=1)
    report_not_analysed: bool = True
    destinations: tuple[Annotated[Destination, Field(discriminator="type")], ...] = (
        FolderDestination(type="folder", name="results", path=Path("data/results")),
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_names("destinations", (destination.name for destination in self.destinations))
        if self.retry_max_s < self.retry_first_s:
            raise ValueError(f"retry_max_s ({self.retry_max_s:g}) is less than retry_first_s ({self.retry_first_s:g})")
        return self

    @property
    def profiles(self) -> tuple[Profile, ...]:
        """What the destinations want between them; what one gets by default where there is none."""
        return tuple(dict.fromkeys(destination.profile for destination in self.destinations)) or (Profile(),)


class RetentionConfig(Section):
    """What leaves the data folder, and when."""

    originals_days: Days | None = 30.0
    results_days: Days | None = 90.0
    failed_days: Days | None = 30.0
    max_disk_percent: float | None = Field(default=80.0, gt=0, le=100)
    max_disk_gb: float | None = Field(default=None, gt=0, allow_inf_nan=False)


class Config(Section):
    """Everything that can be set."""

    data_dir: Path = Path("data")
    database: PostgreSQLURL | None = None
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    receive: ReceiveConfig = ReceiveConfig()
    sources: SourcesConfig = SourcesConfig()
    commitment: CommitmentConfig = CommitmentConfig()
    retrieve: RetrieveConfig = RetrieveConfig()
    complete: CompleteConfig = CompleteConfig()
    rules: RulesConfig = RulesConfig()
    priority: PriorityConfig = PriorityConfig()
    analyse: AnalyseConfig = AnalyseConfig()
    deliver: DeliverConfig = DeliverConfig()
    notify: NotifyConfig = NotifyConfig()
    web: WebConfig = WebConfig()
    retention: RetentionConfig = RetentionConfig()

    @field_validator("web")
    @classmethod
    def _check_web(cls, web: WebConfig, info: ValidationInfo) -> WebConfig:
        receive = info.data.get("receive")  # None where it has faults of its own
        if web.enabled and receive is not None and receive.port == web.port:
            hosts = {web.host, receive.host}
            if len(hosts) == 1 or hosts & {"0.0.0.0", "::"}:
                raise ValueError(f"port {web.port} is that of receive, too; give one of them another")
        return web


def load_config(path: Path | None = None) -> Config:
    """The configuration in `path`, or the defaults when it is None. Relative paths in it start at its folder.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or holds unknown keys or impossible values (all are listed).
    """
    if path is None:
        return _anchored(Config(), Path.cwd())
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"The configuration {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"The configuration {path} is not text in UTF-8; save it as such.") from error
    try:
        root = yaml.compose(text, Loader=Loader)
        lines, faults = lines_of(root)
        values = yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"The configuration {path} is not valid YAML: {describe_yaml_error(error)}.") from error
    if values is not None and not isinstance(values, dict):
        raise ConfigError(
            f"The configuration {path} holds no settings; it must be lines such as `data_dir: data`, as in config.yaml."
        )
    config = None
    try:
        # A section with nothing in it, say because all of it is commented out, is a section left out.
        config = Config.model_validate({key: value for key, value in (values or {}).items() if value is not None})
    except ValidationError as error:
        faults += describe_all(error.errors(), lines)
    if config is None or faults:
        listed = "".join(f"\n  line {line}: {message}" for line, message in sorted(faults))
        raise ConfigError(f"The configuration {path} has {len(faults)} fault(s):{listed}")
    return _anchored(config, path.resolve().parent)


def _anchored(config: Config, folder: Path) -> Config:
    """The configuration with every relative path made absolute from `folder`."""
    if "destinations" not in config.deliver.model_fields_set:
        results = config.deliver.destinations[0].model_copy(update={"path": config.data_dir / "results"})
        deliver = config.deliver.model_copy(update={"destinations": (results,)})
        config = config.model_copy(update={"deliver": deliver})
    anchored: Config = _anchor(config, folder)
    return anchored


def _anchor(value: Any, folder: Path) -> Any:
    """The value, with every relative path in it made absolute from `folder`."""
    if isinstance(value, Path):
        return folder / os.path.expanduser(value)  # noqa: PTH111 - that of Path raises where a ~ is nobody's
    if isinstance(value, tuple):
        return tuple(_anchor(item, folder) for item in value)
    if isinstance(value, BaseModel):
        fields = {name: getattr(value, name) for name in type(value).model_fields}
        return value.model_copy(update={name: _anchor(item, folder) for name, item in fields.items()})
    return value
