"""Settings that depend on each other: where results go by default, and two ports that must differ."""

from pathlib import Path

import pytest

from node.config import Config, ConfigError, FolderDestination, load_config


def load(folder: Path, text: str) -> Config:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("data_dir: here\n", "here/results"),
        ("data_dir: here\ndeliver: {max_attempts: 2}\n", "here/results"),
        ("data_dir: here\ndeliver: {destinations: [{name: a, type: folder, path: data/results}]}\n", "data/results"),
    ],
)
def test_results_go_to_the_data_folder_unless_a_destination_says_otherwise(
    tmp_path: Path, text: str, path: str
) -> None:
    (results,) = load(tmp_path, text).deliver.destinations
    assert isinstance(results, FolderDestination)
    assert results.path == tmp_path / path


@pytest.mark.parametrize(
    ("hosts", "is_refused"),
    [
        (("127.0.0.1", "127.0.0.1"), True),
        (("0.0.0.0", "127.0.0.1"), True),
        (("127.0.0.1", "::"), True),
        (("127.0.0.1", "127.0.0.2"), False),
    ],
)
def test_one_port_for_dicom_and_for_http_is_refused(tmp_path: Path, hosts: tuple[str, str], is_refused: bool) -> None:
    receive, web = hosts
    text = (
        f"receive: {{host: '{receive}', port: 8043, allow: any}}\n"
        f"web: {{host: '{web}', enabled: %s, allow: tokens, port: 8043}}\n"
    )
    if is_refused:
        with pytest.raises(
            ConfigError, match="line 2: web: port 8043 is that of receive, too; give one of them another"
        ):
            load(tmp_path, text % "true")
    else:
        load(tmp_path, text % "true")
    load(tmp_path, text % "false")
