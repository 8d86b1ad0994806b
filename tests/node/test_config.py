"""The configuration: config.yaml says what the code says, and every fault is named at once with its line."""

import re
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from node.config import (
    Config,
    ConfigError,
    Destination,
    DicomDestination,
    DicomWebDestination,
    FolderDestination,
    OrthancDestination,
    Peer,
    Source,
    load_config,
)
from node.peers import ClientTls, DicomWebSource, HttpAuth, OrthancSource

ROOT = Path(__file__).parents[2]
CONFIG_YAML = ROOT / "config.yaml"

Load = Callable[[str], Config]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Loads a configuration from text."""

    def from_text(text: str) -> Config:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path)

    return from_text


def faults(load: Load, text: str) -> list[str]:
    """The lines of the message after the first."""
    with pytest.raises(ConfigError) as refusal:
        load(text)
    first, *rest = str(refusal.value).splitlines()
    assert first.endswith(f"has {len(rest)} fault(s):")
    return [line.strip() for line in rest]


# ---- config.yaml and the code say the same ----


def test_config_yaml_gives_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIG_YAML.parent)
    assert load_config(CONFIG_YAML) == load_config(None)


def _settings(model: type[BaseModel], section: str = "") -> Iterator[str]:
    """Every setting of the model, dotted."""
    for name, field in model.model_fields.items():
        yield f"{section}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _settings(field.annotation, f"{section}{name}.")


def test_config_yaml_holds_every_setting_with_a_comment_directly_above_it() -> None:
    lines = CONFIG_YAML.read_text(encoding="utf-8").splitlines()
    place, commented, found = list[str](), set(), set()
    for above, line in zip(["", *lines], lines, strict=False):
        match = re.fullmatch(r"( *)(\w+):.*", line)
        if match is None or len(match[1]) > 4:
            continue
        place = [*place[: len(match[1]) // 2], match[2]]
        name = ".".join(place)
        found.add(name)
        if above.strip().startswith("#"):
            commented.add(name)
    assert found == set(_settings(Config))
    assert commented == found


@pytest.mark.parametrize("kind", [DicomDestination, DicomWebDestination, OrthancDestination, FolderDestination])
def test_config_yaml_shows_every_setting_of_a_destination(kind: type[BaseModel]) -> None:
    shown = set(re.findall(r"(\w+): ", CONFIG_YAML.read_text(encoding="utf-8")))
    assert set(kind.model_fields) <= shown


def test_numbers_in_settings_carry_their_unit() -> None:
    unitless = {
        "port",
        "processes",
        "backlog",
        "max_associations",
        "max_associations_per_address",
        "workers",
        "threads",
        "max_attempts",
        "min_slices",
        "max_parts",
    }
    for model in (section.annotation for section in Config.model_fields.values()):
        if isinstance(model, type) and issubclass(model, BaseModel):
            for name, field in model.model_fields.items():
                if isinstance(field.default, int | float) and not isinstance(field.default, bool):
                    units = ("_s", "_mm", "_kb", "_mb", "_gb", "_days", "_percent")
                    assert name in unitless or name.endswith(units), name


# ---- what is read ----


def test_settings_left_out_keep_their_defaults(load: Load) -> None:
    config = load("receive:\n  port: 104\n")
    assert (config.receive.port, config.receive.ae_title, config.complete.min_slices) == (104, "CSPINE", 30)


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "---\n"])
def test_an_empty_file_is_the_defaults(load: Load, tmp_path: Path, text: str) -> None:
    assert load(text).receive == Config().receive


def test_relative_paths_start_at_the_folder_of_the_file(load: Load, tmp_path: Path) -> None:
    config = load(
        "data_dir: here\nanalyse:\n  bundle: ../bundle\n"
        "deliver:\n  destinations:\n    - {name: a, type: folder, path: out}\n"
        "    - {name: b, type: folder, path: /out}\n"
    )
    paths = [d.path for d in config.deliver.destinations if isinstance(d, FolderDestination)]
    assert (config.data_dir, config.analyse.bundle) == (tmp_path / "here", tmp_path / "../bundle")
    assert paths == [tmp_path / "out", Path("/out")]


def test_without_a_file_relative_paths_start_at_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(None)
    assert config.data_dir == tmp_path / "data"
    assert [d.path for d in config.deliver.destinations if isinstance(d, FolderDestination)] == [
        tmp_path / "data" / "results"
    ]


def test_destinations_of_both_types(load: Load) -> None:
    config = load(
        "deliver:\n  destinations:\n"
        "    - {name: pacs, type: dicom, host: pacs.example.org, port: 104, ae_title: PACS}\n"
        "    - {name: out, type: folder, path: out}\n"
    )
    pacs, out = config.deliver.destinations
    assert isinstance(pacs, DicomDestination)
    assert isinstance(out, FolderDestination)
    assert pacs.timeout_s == 30


def test_no_destinations_at_all_is_allowed(load: Load) -> None:
    assert load("deliver:\n  destinations: []\n").deliver.destinations == ()


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        Config().receive.port = 1  # type: ignore[misc]


# ---- what is refused ----


def test_all_faults_are_listed_at_once_with_their_lines(load: Load) -> None:
    listed = faults(
        load,
        "data_dir: data\n"
        "colour: red\n"
        "receive:\n"
        "  port: 70000\n"
        "  ae_title: THIS_AE_TITLE_IS_TOO_LONG\n"
        "  prot: 5\n"
        "complete:\n"
        "  min_slices: many\n"
        "deliver:\n"
        "  destinations:\n"
        "    - name: pacs\n"
        "      type: dicom\n"
        "      host: pacs\n"
        "      port: 0\n"
        "    - name: out\n"
        "      type: folder\n"
        "      path: out\n"
        "      ae_title: NOT_FOR_A_FOLDER\n",
    )
    starts = [
        "line 2: colour is not a setting",
        "line 4: receive.port: must be less than or equal to 65535 (it is 70000)",
        "line 5: receive.ae_title: an AE title has 1 to 16 printable ASCII characters and no backslash (it is 'THIS",
        "line 6: receive.prot is not a setting",
        "line 8: complete.min_slices: must be a whole number",
        "line 11: deliver.destinations.0.ae_title is missing",
        "line 14: deliver.destinations.0.port: must be greater than or equal to 1 (it is 0)",
        "line 18: deliver.destinations.1.ae_title is not a setting",
    ]
    assert len(listed) == len(starts)
    for line, start in zip(listed, starts, strict=True):
        assert line.startswith(start)


def test_a_setting_given_twice_is_a_fault(load: Load) -> None:
    assert faults(load, "receive:\n  port: 104\n  host: 127.0.0.1\n  port: 105\n") == [
        "line 4: receive.port is given twice"
    ]


def test_an_unknown_type_of_destination_names_the_known_ones(load: Load) -> None:
    (line,) = faults(load, "deliver:\n  destinations:\n    - name: web\n      type: ftp\n      url: http://x\n")
    assert line == "line 4: deliver.destinations.0.type: must be dicom or dicomweb or orthanc or folder (it is 'ftp')"


def test_a_destination_without_type_is_told_so(load: Load) -> None:
    (line,) = faults(load, "deliver:\n  destinations:\n    - name: web\n      path: out\n")
    assert line == "line 3: deliver.destinations.0.type is missing"


def test_two_destinations_of_one_name_are_refused(load: Load) -> None:
    (line,) = faults(
        load,
        "deliver:\n  destinations:\n"
        "    - {name: out, type: folder, path: a}\n"
        "    - {name: out, type: folder, path: b}\n",
    )
    assert line == "line 1: deliver: two destinations share the name out; give each its own"


def test_a_longest_wait_shorter_than_the_first_is_refused(load: Load) -> None:
    (line,) = faults(load, "deliver:\n  retry_first_s: 60\n  retry_max_s: 10\n")
    assert line == "line 1: deliver: retry_max_s (10) is less than retry_first_s (60)"


def test_a_section_whose_settings_are_all_commented_out_is_a_section_left_out(load: Load) -> None:
    assert load("receive:\n  # port: 104\ncomplete:\n").receive.port == 11112


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("receive: 104\n", "line 1: receive: must be a group of settings (it is 104)"),
        ("receive: {host: ''}\n", "line 1: receive.host: string should have at least 1 character (it is '')"),
        ("receive: {ae_title: ''}\n", "line 1: receive.ae_title: an AE title has 1 to 16"),
        ("receive: {ae_title: 'A\\B'}\n", "line 1: receive.ae_title: an AE title has 1 to 16"),
        ("receive: {ae_title: KÖLN}\n", "line 1: receive.ae_title: an AE title has 1 to 16"),
        ("complete: {quiet_time_s: .inf}\n", "line 1: complete.quiet_time_s: must be a finite number"),
        ("complete: {quiet_time_s: -1}\n", "line 1: complete.quiet_time_s: must be greater than 0"),
        ("analyse: {device: tpu}\n", "line 1: analyse.device: "),
        ("analyse: {workers: 0}\n", "line 1: analyse.workers: must be greater than or equal to 1"),
        ("log_level: LOUD\n", "line 1: log_level: must be 'DEBUG', 'INFO', 'WARNING' or 'ERROR'"),
        ("on: true\n", "line 1: "),
        ("receive: {port: }\n", "line 1: receive.port: must be a whole number (it is empty)"),
        ("receive: {host: 7}\n", "line 1: receive.host: must be text; put it in quotes (it is 7)"),
        ("receive: {tls: true}\n", "line 1: receive.tls: must be a group of settings (it is true)"),
        (
            "retention: {failed_days: 2026-11-11}\n",
            "line 1: retention.failed_days: must be a number (it is 2026-11-11)",
        ),
        ("data_dir: ''\n", "line 1: data_dir: must be the path of a file or folder (it is '')"),
        ("receive: {port: true}\n", "line 1: receive.port: must be a whole number (it is true)"),
        ("analyse: {threads: true}\n", "line 1: analyse.threads: must be a whole number (it is true)"),
        ("complete: {quiet_time_s: false}\n", "line 1: complete.quiet_time_s: must be a number (it is false)"),
        ("retention: {results_days: true}\n", "line 1: retention.results_days: must be a number (it is true)"),
        ("data_dir: 5\n", "line 1: data_dir: must be the path of a file or folder (it is 5)"),
        ("deliver: {destinations: x}\n", "line 1: deliver.destinations: must be a list (it is 'x')"),
        ("deliver: {destinations: [5]}\n", "line 1: deliver.destinations.0: must be a group of settings (it is 5)"),
        ("web: {enabled: maybe}\n", "line 1: web.enabled: must be true or false (it is 'maybe')"),
        ("web: {public_url: foo}\n", "line 1: web.public_url: must be written like https://"),
        (
            "web: {trusted_proxy: {addresses: [a]}}\n",
            "line 1: web.trusted_proxy.addresses.0: 'a' does not appear to be an IPv4 or IPv6 address",
        ),
    ],
)
def test_an_impossible_value_is_refused_in_words(load: Load, text: str, expected: str) -> None:
    (line,) = faults(load, text)
    assert line.startswith(expected)
    assert "pydantic" not in line


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("receive: [\n", "is not valid YAML"),
        ("receive:\n\tport: 104\n", "line 2, column 1: port: 104 ^; indent with spaces, not with tabs"),
        ("web:\n  port: 2026-13-01\n", "there is no such date or time as 2026-13-01 in line 2, column 9"),
        ("data_dir: !!python/object:os.system x\n", "is not valid YAML"),
        ("just a sentence\n", "holds no settings; it must be lines such as `data_dir: data`"),
        ("- a\n- list\n", "holds no settings; it must be lines such as `data_dir: data`"),
    ],
)
def test_what_is_not_a_mapping_in_yaml_is_refused(load: Load, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(says)):
        load(text)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "missing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not text in UTF-8"):
        load_config(tmp_path / "binary.yaml")


def test_a_path_may_begin_with_the_home_folder(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert load("data_dir: ~/cspine\n").data_dir == Path("/home/me/cspine")


def test_the_address_of_a_target_is_refused_without_quoting_a_password(load: Load) -> None:
    target = "{name: a, type: webhook, url: 'https://me:hunter2@chat'}"
    (line,) = faults(load, f"notify: {{targets: [{target}]}}\n")
    assert line == (
        "line 1: notify.targets.0.url: must be written like https://chat.example.org/hook, without a user in it"
    )


def test_every_error_is_a_config_error(load: Load) -> None:
    """Whatever a damaged file holds, `cspine` says a sentence and no traceback."""
    whole = CONFIG_YAML.read_text(encoding="utf-8")
    for cut in range(0, len(whole), 97):
        try:
            load(whole[:cut] + "\n  : }" + whole[cut:])
        except ConfigError:
            continue


def example(after: str, before: str) -> str:
    """The list that stands as a comment between these texts of config.yaml."""
    text = CONFIG_YAML.read_text(encoding="utf-8").partition(after)[2].partition(before)[0]
    return "\n".join(f"    {line}" for line in re.findall(r"^ +#   ((?:- | +)\w+:.*)$", text, re.MULTILINE))


def test_the_examples_of_destinations_in_config_yaml_are_valid_and_whole(load: Load) -> None:
    listed = example("Any number of destinations.", "# The settings of a profile;")
    config = load(f"deliver:\n  destinations:\n{listed}\n")
    shown = yaml.safe_load(listed)
    assert [type(destination) for destination in config.deliver.destinations] == list(get_args(Destination))
    for destination, settings in zip(config.deliver.destinations, shown, strict=True):
        assert set(type(destination).model_fields) == set(settings), settings["type"]
    assert set(ClientTls.model_fields) == set(shown[0]["tls"])
    assert set(HttpAuth.model_fields) == set(shown[1]["auth"])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ("url: ftp://pacs", "url must be http(s)://HOST[:PORT][/PATH]"),
        ("url: 'https://me:hunter2@pacs'", "url must not hold a user or password; give them under auth"),
        (
            "url: 'https://pacs', auth: {type: basic, user: me}",
            "give the password or token by secret_file",
        ),
        ("url: 'https://pacs', auth: {type: basic, user: me, password: hunter2}", "auth.password is not a setting"),
        ("url: 'https://pacs', auth: {type: basic, secret_env: X}", "type basic needs a user"),
        ("url: 'https://pacs', auth: {type: bearer, user: me, secret_env: X}", "type bearer has none"),
    ],
)
def test_faults_of_a_url_or_of_credentials_are_told_without_quoting_a_secret(
    load: Load, settings: str, told: str
) -> None:
    lines = "\n".join(faults(load, f"deliver:\n  destinations:\n    - {{name: web, type: dicomweb, {settings}}}\n"))
    assert told in lines
    assert "hunter2" not in lines


def test_the_files_that_destinations_name_start_at_the_folder_of_the_file_too(load: Load, tmp_path: Path) -> None:
    config = load(
        "deliver:\n  destinations:\n"
        "    - {name: web, type: dicomweb, url: 'https://pacs', tls: {ca: ca.pem},"
        " auth: {type: bearer, secret_file: token}}\n"
    )
    (web,) = config.deliver.destinations
    assert isinstance(web, DicomWebDestination)
    assert web.tls is not None
    assert web.auth is not None
    assert (web.tls.ca, web.auth.secret_file) == (tmp_path / "ca.pem", tmp_path / "token")


def test_the_example_of_a_source_in_config_yaml_is_valid(load: Load) -> None:
    listed = example("  # Senders that can be asked", "  sources: []")
    (source,) = load(f"complete:\n  sources:\n{listed}\n").complete.sources
    assert source.sends_as == ("PACS", "PACS2")
    assert set(Source.model_fields) == set(yaml.safe_load(listed)[0])


def test_the_example_of_a_watched_orthanc_in_config_yaml_holds_the_defaults(load: Load) -> None:
    listed = example("  # Orthancs, whose changes", "  orthanc: []")
    (source,) = load(f"sources:\n  orthanc:\n{listed}\n").sources.orthanc
    assert source == OrthancSource(name="orthanc", url="http://127.0.0.1:8042")
    assert set(OrthancSource.model_fields) == set(yaml.safe_load(listed)[0])
    two = "sources:\n  orthanc: [{name: a, url: 'http://a'}]\n  dicomweb: [{name: a, url: 'http://b'}]\n"
    assert faults(load, two) == ["line 1: sources: two sources share the name a; give each its own"]


def test_the_example_of_a_watched_dicomweb_archive_in_config_yaml_holds_the_defaults(load: Load) -> None:
    listed = example("  # DICOMweb archives, which", "  dicomweb: []")
    (source,) = load(f"sources:\n  dicomweb:\n{listed}\n").sources.dicomweb
    assert source == DicomWebSource(name="pacs", url="https://pacs.example.org/dicom-web")
    assert set(DicomWebSource.model_fields) == set(yaml.safe_load(listed)[0])
    later = load("sources:\n  dicomweb: [{name: a, url: 'http://a', begin: 2026-11-01}]\n").sources.dicomweb[0]
    assert later.begin == date(2026, 11, 1)


def test_two_sources_cannot_send_with_one_ae_title(load: Load) -> None:
    source = "{name: a, sends_as: CT1, host: h, port: 104, ae_title: A}"
    assert load(f"complete:\n  sources: [{source}]\n").complete.sources[0].sends_as == ("CT1",)
    text = f"complete:\n  sources: [{source}, {source}]\n"
    assert faults(load, text) == ["line 1: complete: two sources send as CT1; only one can be asked"]


# ---- who may talk ----


@pytest.mark.parametrize(
    ("allow", "fault"),
    [
        ("nobody", "receive.allow: must be 'loopback' or 'any' (it is 'nobody')"),
        ("[]", "receive.allow: an empty list lets nobody in; name peers, or write allow: loopback"),
        ("[{}]", "receive.allow.0: an entry names ae_title, called_ae_title or address; for everyone write allow: any"),
        (
            "[{address: 10.0.0.1/24}]",
            "receive.allow.0.address: an address is written like 10.0.0.5 or fd00::5, a network like 10.0.0.0/24"
            " (it is '10.0.0.1/24')",
        ),
        ("[{ae_tittle: CT1}]", "receive.allow.0.ae_tittle is not a setting"),
    ],
)  # fmt: skip
def test_a_list_of_peers_that_cannot_be_meant_is_refused(load: Load, allow: str, fault: str) -> None:
    assert faults(load, f"receive:\n  allow: {allow}\n") == [f"line 2: {fault}"]


def test_peers_are_named_by_address_network_and_titles(load: Load) -> None:
    allow = load("receive: {allow: [{ae_title: CT1, address: 10.0.0.0/24}, {address: fd00::5}]}").receive.allow
    assert [str(peer.address) for peer in allow if isinstance(peer, Peer)] == ["10.0.0.0/24", "fd00::5/128"]


@pytest.mark.parametrize(
    ("tls", "fault"),
    [
        ("{certificate: a, key: b}", "verify is required, so client_ca must name the authorities of the peers'"),
        ("{certificate: a, key: b, verify: none, client_ca: c}", "client_ca is not used while verify is none"),
        ("{certificate: a, verify: none}", "receive.tls.key is missing"),
    ],
)
def test_tls_settings_that_contradict_each_other_are_refused(load: Load, tls: str, fault: str) -> None:
    (line,) = faults(load, f"receive:\n  tls: {tls}\n")
    assert fault in line


def test_paths_of_certificates_start_at_the_folder_of_the_file(load: Load, tmp_path: Path) -> None:
    config = load(
        "receive:\n  tls: {certificate: a.pem, key: a.key, verify: none}\n"
        "deliver:\n  destinations:\n"
        "    - {name: a, type: dicom, host: b, port: 104, ae_title: C, tls: {ca: ca.pem}}\n"
    )
    assert config.receive.tls is not None
    assert (config.receive.tls.certificate, config.receive.tls.key) == (tmp_path / "a.pem", tmp_path / "a.key")
    (pacs,) = config.deliver.destinations
    assert isinstance(pacs, DicomDestination)
    assert pacs.tls == ClientTls(ca=tmp_path / "ca.pem")


def test_the_database_is_a_postgresql_url_and_its_password_is_never_shown(load: Load) -> None:
    config = load("database: postgresql://cspine:secret@db.example.org:5432/cspine\n")
    assert config.database is not None
    assert config.database.get_secret_value().endswith("@db.example.org:5432/cspine")
    assert "secret" not in repr(config)
    with pytest.raises(ConfigError, match=r"line 1: database: the URL of a PostgreSQL database is") as raised:
        load("database: mysql://cspine:secret@db.example.org/cspine\n")
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5", "node.example.org"])
def test_a_port_for_other_machines_needs_a_list_of_them(load: Load, host: str) -> None:
    (fault,) = faults(load, f"receive:\n  host: '{host}'\n")
    assert fault.startswith(f"line 1: receive: host {host} is for other machines")
    assert "or allow: any" in fault
    assert load(f"receive: {{host: '{host}', allow: any}}").receive.host == host
    assert load(f"receive: {{host: '{host}', allow: [{{ae_title: CT1}}]}}").receive.host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.5", "::1", "localhost"])
def test_loopback_needs_no_list(load: Load, host: str) -> None:
    assert load(f"receive: {{host: '{host}'}}").receive.allow == "loopback"


def test_the_configurations_of_the_containers_are_valid(load: Load) -> None:
    """A container listens on all of its interfaces, so they must say who may talk."""
    image = load((ROOT / "container.yaml").read_text())
    assert (image.receive.allow, image.data_dir) == ("any", Path("/data"))
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    allow = load(compose["configs"]["node"]["content"]).receive.allow
    assert [peer.ae_title for peer in allow if isinstance(peer, Peer)] == ["ORTHANC", "HEALTHCHECK"]
