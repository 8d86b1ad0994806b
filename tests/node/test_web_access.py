"""Who may do what over HTTP: loopback, tokens, the word of a proxy, other origins."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests
from click.testing import CliRunner

from node.cli import main
from node.config import Config
from node.index import Index
from node.web.settings import TrustedProxy, WebConfig
from node.web.tokens import Tokens
from tests.web_server import WebServer

Serve = Callable[..., WebServer]

ALLOWED = 204  # a search that is let through, of a node that holds nothing


@pytest.fixture
def serve(index: Index) -> Iterator[Serve]:
    servers: list[WebServer] = []

    def start(**settings: object) -> WebServer:
        servers.append(WebServer(Config(web=WebConfig(**settings)), index))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def test_on_loopback_nobody_needs_a_token(serve: Serve) -> None:
    server = serve()
    assert server.get("/studies").status_code == ALLOWED
    nobody = {"Authorization": "Bearer None"}  # as the command line of dicomweb-client sends
    assert requests.get(f"{server.url}/studies", headers=nobody).status_code == ALLOWED


@pytest.mark.parametrize(
    "host", ["evil.example:8043", "evil.example", "127.0.0.1.evil.example", "user@evil.example", "["]
)
def test_where_no_token_is_asked_for_only_our_own_names_are_answered(serve: Serve, host: str) -> None:
    """A page of evil.example may have that name resolved to 127.0.0.1, and is then of the same origin."""
    server = serve(public_url="https://ct.example/node")
    answer = requests.get(f"{server.url}/studies", headers={"Host": host})
    assert answer.status_code == 421
    assert "web.public_url" in answer.json()["error"]
    assert requests.post(f"{server.url}/studies", headers={"Host": host}).status_code == 421
    assert requests.get(server.root, headers={"Host": host}).status_code == 421
    for ours in (f"localhost:{server.port}", "LOCALHOST", "127.0.0.1:1", f"[::1]:{server.port}", "ct.example"):
        assert requests.get(f"{server.url}/studies", headers={"Host": ours}).status_code == ALLOWED


def test_who_says_who_he_is_may_call_the_node_by_any_name(serve: Serve) -> None:
    by_name = {"Host": "ct.example"}
    server = serve(allow="tokens")
    secret = {"Authorization": f"Bearer {server.tokens.make('viewer', ('read',))}"}
    assert requests.get(f"{server.url}/studies", headers=by_name | secret).status_code == ALLOWED
    proxied = serve(trusted_proxy=TrustedProxy(addresses=("127.0.0.1",)))
    assert requests.get(f"{proxied.url}/studies", headers=by_name | {"X-Remote-User": "eva"}).status_code == ALLOWED


def test_the_address_that_the_node_listens_on_is_a_name_of_it(serve: Serve) -> None:
    assert requests.get(f"{serve(host='127.0.0.7').url}/studies", headers={"Host": "127.0.0.7"}).status_code == ALLOWED


def test_with_tokens_everybody_needs_one(serve: Serve) -> None:
    server = serve(allow="tokens")
    answer = server.get("/studies")
    assert answer.status_code == 401
    challenges = answer.raw.headers.getlist("WWW-Authenticate")
    assert challenges == ['Basic realm="C-Spine Node", charset="UTF-8"', "Bearer"]
    secret = server.tokens.make("viewer", ("read",))
    assert requests.get(f"{server.url}/studies", headers={"Authorization": f"Bearer {secret}"}).status_code == ALLOWED
    assert requests.get(f"{server.url}/studies", auth=("anyone", secret)).status_code == ALLOWED
    assert requests.get(f"{server.root}/viewer", auth=("anyone", "wrong")).status_code == 401
    assert requests.get(f"{server.url}/studies", headers={"Authorization": "Bearer "}).status_code == 401
    assert requests.get(f"{server.url}/studies", headers={"Authorization": "Basic !"}).status_code == 401


def test_a_token_allows_what_it_was_made_for(serve: Serve) -> None:
    server = serve(allow="tokens")
    secret = server.tokens.make("viewer", ("read",))
    answer = requests.post(f"{server.url}/studies", headers={"Authorization": f"Bearer {secret}"})
    assert answer.status_code == 403
    assert "no right to store" in answer.json()["error"]


def test_a_removed_token_is_refused_at_once(serve: Serve) -> None:
    server = serve(allow="tokens")
    headers = {"Authorization": f"Bearer {server.tokens.make('viewer', ('read',))}"}
    assert requests.get(f"{server.url}/studies", headers=headers).status_code == ALLOWED
    assert server.tokens.remove("viewer")
    assert requests.get(f"{server.url}/studies", headers=headers).status_code == 401


def test_a_damaged_file_of_tokens_lets_nobody_in_and_the_log_names_it(
    serve: Serve, index: Index, caplog: pytest.LogCaptureFixture
) -> None:
    secret = Tokens(index.data_dir).make("viewer", ("read",))
    server = serve(allow="tokens")
    (index.data_dir / "web-tokens.json").write_text("[{", encoding="utf-8")
    answer = requests.get(f"{server.url}/studies", headers={"Authorization": f"Bearer {secret}"})
    assert answer.status_code == 503
    assert str(index.data_dir) not in answer.text
    assert f"{index.data_dir / 'web-tokens.json'} is damaged; remove it and make the tokens anew" in caplog.text
    assert requests.get(f"{server.url}/studies").status_code == 401


def test_only_a_hash_of_a_token_is_kept_and_only_we_can_read_it(tmp_path: Path) -> None:
    secret = Tokens(tmp_path).make("viewer", ("read",))
    file = tmp_path / "web-tokens.json"
    assert secret not in file.read_text()
    assert file.stat().st_mode & 0o077 == 0


def test_a_proxy_is_believed_and_nobody_else(serve: Serve) -> None:
    believed = serve(trusted_proxy=TrustedProxy(addresses=("127.0.0.1",), user_header="X-User"))
    assert requests.get(f"{believed.url}/studies", headers={"X-User": "eva"}).status_code == ALLOWED
    assert requests.get(f"{believed.url}/studies").status_code == 401
    assert requests.post(f"{believed.url}/studies", headers={"X-User": "eva"}).status_code == 403
    other = serve(trusted_proxy=TrustedProxy(addresses=("10.0.0.1",), user_header="X-User"))
    assert requests.get(f"{other.url}/studies", headers={"X-User": "eva"}).status_code == 401


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="this machine does not listen on IPv4 and IPv6 at once")
def test_a_proxy_is_believed_where_the_node_listens_on_every_address(index: Index) -> None:
    web = WebConfig(host="::", trusted_proxy=TrustedProxy(addresses=("127.0.0.1",)))
    listening = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    server = WebServer(Config(web=web), index, listening)
    try:
        assert requests.get(f"{server.url}/studies", headers={"X-Remote-User": "eva"}).status_code == ALLOWED
        assert requests.get(f"{server.url}/studies").status_code == 401
    finally:
        server.stop()


def test_a_header_that_names_another_address_changes_nothing(serve: Serve) -> None:
    """Proxies set X-Forwarded-For to their client's address; anyone may set it to the proxy's."""
    believed = serve(trusted_proxy=TrustedProxy(addresses=("127.0.0.1",)))
    named = {"X-Remote-User": "eva", "X-Forwarded-For": "192.0.2.7"}
    assert requests.get(f"{believed.url}/studies", headers=named).status_code == ALLOWED
    other = serve(trusted_proxy=TrustedProxy(addresses=("10.0.0.1",)))
    named["X-Forwarded-For"] = "10.0.0.1"
    assert requests.get(f"{other.url}/studies", headers=named).status_code == 401


def test_pages_of_other_origins_get_nothing_unless_named(serve: Serve) -> None:
    closed = requests.get(f"{serve().url}/studies", headers={"Origin": "https://evil.example"})
    assert "Access-Control-Allow-Origin" not in closed.headers
    server = serve(cors_origins=("https://viewer.example",))
    named = requests.get(f"{server.url}/studies", headers={"Origin": "https://viewer.example"})
    assert named.headers["Access-Control-Allow-Origin"] == "https://viewer.example"
    asked = {"Origin": "https://viewer.example", "Access-Control-Request-Method": "GET"}
    assert requests.options(f"{server.url}/studies", headers=asked).status_code == 204


def test_an_address_for_other_machines_must_be_closed() -> None:
    with pytest.raises(ValueError, match="cspine token make"):
        WebConfig(host="0.0.0.0")
    WebConfig(host="0.0.0.0", allow="tokens")


def test_tokens_are_made_listed_and_removed_by_command(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("data_dir: data\n")

    def cspine(*arguments: str) -> tuple[int, str]:
        done = CliRunner().invoke(main, ["token", *arguments, "--config", str(config)])
        return done.exit_code, done.output

    status, secret = cspine("make", "pacs", "--right", "store")
    assert status == 0
    token = Tokens(tmp_path / "data").find(secret.strip())
    assert token is not None
    assert (token.name, token.rights) == ("pacs", ("store",))
    assert cspine("list")[1].startswith("pacs  store  20")
    assert cspine("remove", "pacs") == (0, "pacs is removed.\n")
    status, said = cspine("remove", "pacs")
    assert status == 1
    assert "no token 'pacs'" in said
