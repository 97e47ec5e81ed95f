"""API keys: where they come from, what opens with them, and that nothing else does. Without Ray."""

import hmac
import json
import logging
import pickle
import re
import secrets
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import schemathesis
import tritonclient.http as triton
import uvicorn
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import CHECKS
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect
from tritonclient.utils import InferenceServerException

from cifar.config import ConfigError
from cifar.machine import is_loopback
from cifar.serve import keys as keys_module
from cifar.serve.app import make_app
from cifar.serve.config import ServeConfig
from cifar.serve.keys import GENERATE, HEADER, OPEN, VARIABLE, Keys, check_host, read_keys
from cifar.serve.service import Service
from jobs import serve
from tests.images import noise, png
from tests.test_serve import encoded, save

KEY, OTHER = "first-key-0123456789", "second-key-0123456789"
BEARER = {"Authorization": f"Bearer {KEY}"}
CLOSED = ("/metrics", "/models", "/v2", "/v2/models/flowers", "/v2/models/flowers/ready", "/nowhere")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ServeConfig:
    model = save(tmp_path_factory.mktemp("runs") / "flowers")
    return ServeConfig(model=str(model), device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def client(config: ServeConfig) -> Iterator[TestClient]:
    with TestClient(make_app(Service(config), keys=Keys.of([KEY, OTHER])), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def service(config: ServeConfig) -> Service:
    """The one at `port`."""
    return Service(config)


@pytest.fixture(scope="module")
def port(service: Service) -> Iterator[int]:
    """Of the service under a real server."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        app = make_app(service, keys=Keys.of([KEY]))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield listening.getsockname()[1]
        server.should_exit = True
        thread.join()
        service.close()


# Reading


def write(folder: Path, text: str | bytes, mode: int = 0o600) -> str:
    path = folder / "keys"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(mode)
    return str(path)


def test_keys_of_the_file_and_of_the_environment_are_all_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert read_keys("") is None
    file = write(tmp_path, f"# the web page\r\n{KEY}\r\n\n   {OTHER}  \n")
    monkeypatch.setenv(VARIABLE, "third-key-0123456789\n")
    keys = read_keys(file)
    assert keys is not None
    assert all(keys.admit(key.encode()) for key in (KEY, OTHER, "third-key-0123456789"))
    assert not any(keys.admit(key) for key in (b"", b"# the web page", KEY[:-1].encode(), KEY.upper().encode()))
    assert not caplog.records
    made = subprocess.run([sys.executable, *shlex.split(GENERATE)[1:]], capture_output=True, text=True, check=True)
    monkeypatch.setenv(VARIABLE, made.stdout)
    alone = read_keys("")
    assert alone is not None
    assert alone.admit(made.stdout.strip().encode())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no key"),
        ("# nothing\n\n", "holds no key"),
        (f"{KEY}\nshort-key-01234\n", "line 2: a key has 16 to 1024"),
        (KEY + " " + KEY, "line 1: a key has"),
        ("schlüssel-0123456789", "line 1: a key has"),
        (b"\xff\xfe" + KEY.encode("utf-16"), "line 1: a key has"),
        ("k" * 1025, "line 1: a key has"),
        (None, "cannot be read (No such file"),
    ],
)
def test_what_is_no_key_is_named_with_its_remedy_and_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | bytes | None, words: str
) -> None:
    file = str(tmp_path / "keys") if text is None else write(tmp_path, text)
    with pytest.raises(ConfigError, match="token_urlsafe") as raised:
        read_keys(file)
    assert f"--api-key-file {file}" in str(raised.value)
    assert words in str(raised.value)
    assert KEY not in str(raised.value)
    if isinstance(text, str) and "#" not in text and "\n" not in text:
        monkeypatch.setenv(VARIABLE, text)  # empty, too: a secret that was forgotten is no wish for an open service
        with pytest.raises(ConfigError, match=f"^{VARIABLE}: a key has"):
            read_keys("")


def test_a_folder_is_no_file_of_keys(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(str(tmp_path))


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620])
def test_a_file_that_others_can_get_at_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int
) -> None:
    with caplog.at_level(logging.WARNING, "cifar"):
        assert read_keys(write(tmp_path, KEY, mode)) is not None
    (record,) = caplog.records
    assert "chmod 600" in record.getMessage()
    assert KEY not in caplog.text


def test_no_key_leaves_the_process_that_read_it() -> None:
    keys = Keys.of([KEY])
    assert KEY.encode() not in pickle.dumps(keys)
    assert pickle.loads(pickle.dumps(keys)).admit(KEY.encode())
    assert "digest" not in repr(keys)
    assert not any("key" in name and name != "api_key_file" for name in ServeConfig.__dataclass_fields__)


# Listening


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        *((host, True) for host in ("127.0.0.1", "127.8.9.10", "::1", "localhost", "LOCALHOST")),
        *((host, False) for host in ("0.0.0.0", "::", "", "10.0.0.1", "localhost.example", "127.0.0.1.example")),
        *((host, False) for host in ("192.168.1.1", "fe80::1", "127.1")),
    ],
)
def test_other_machines_are_let_in_only_with_a_key_or_when_said(host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback
    check_host(host, Keys.of([KEY]), insecure=False)
    check_host(host, None, insecure=True)
    if loopback:
        check_host(host, None, insecure=False)
        return
    with pytest.raises(ConfigError) as raised:
        check_host(host, None, insecure=False)
    for words in (f"--host {host}", "--api-key-file", VARIABLE, "--insecure", "token_urlsafe"):
        assert words in str(raised.value)


def test_the_job_refuses_before_it_starts_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cifar.serve.run.start_ray", lambda verbose: pytest.fail("Ray was started"))
    assert serve.main(["--host", "0.0.0.0"]) == 2
    assert "error: --host 0.0.0.0: other machines could use the service" in capsys.readouterr().err
    assert serve.main(["--api-key-file", write(tmp_path, "short")]) == 2
    assert "line 1: a key has 16" in capsys.readouterr().err
    for address in ("", "127.0.0.1:1"):  # a cluster is refused as well
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert serve.main(["--host", "::"]) == 2
        assert "--host ::" in capsys.readouterr().err


# Asking


@pytest.mark.parametrize(
    "headers",
    [
        BEARER,
        {"authorization": f"bearer   {OTHER} "},
        {HEADER: OTHER},
        {HEADER: KEY, "authorization": "Basic dXNlcjpwYXNz"},  # that is for a proxy
        {HEADER: KEY, "authorization": "Bearer of-a-proxy-0123456789"},
    ],
)
def test_any_of_the_keys_opens_everything(client: TestClient, headers: dict[str, str]) -> None:
    assert client.post("/predict", json=encoded(png(0)), headers=headers).status_code == 200
    assert [client.get(path, headers=headers).status_code for path in CLOSED] == [200] * 5 + [404]


WRONG: list[list[tuple[bytes, bytes]]] = [
    [],
    [(b"x-api-key", b"")],
    [(b"x-api-key", KEY[:-1].encode())],
    [(b"x-api-key", KEY.encode() + b"x")],
    [(b"x-api-key", f"{KEY}, {KEY}".encode())],
    [(b"x-api-key", f"Bearer {KEY}".encode())],
    [(b"x-api-key", KEY.encode()), (b"X-API-Key", KEY.encode())],
    [(b"x-api-key", b"\xff\xfe\x80" + KEY.encode())],
    [(b"x-api-key", b"k" * 60_000)],
    [(b"api-key", KEY.encode())],
    [(b"cookie", f"x-api-key={KEY}".encode())],
    [(b"authorization", KEY.encode())],
    [(b"authorization", b"Bearer")],
    [(b"authorization", b"Bearer ")],
    [(b"authorization", f"Basic {KEY}".encode())],
    [(b"authorization", "Bearer schlüssel-0123456789".encode("latin-1"))],
    [(b"authorization", f"Bearer {KEY}".encode()), (b"authorization", b"Bearer nothing")],
    [(b"authorization", b"Bearer " + Keys.of([KEY]).digests[0])],
    [(b"authorization", b"Bearer " + Keys.of([KEY]).digests[0].hex().encode())],
]


@pytest.mark.parametrize("place", range(len(WRONG)))
def test_without_a_key_there_is_one_sentence_for_everything(
    client: TestClient, caplog: pytest.LogCaptureFixture, place: int
) -> None:
    requests = [("GET", path) for path in CLOSED]
    requests += [("POST", path) for path in ("/predict", "/v2/models/flowers/infer", "/", "/healthz", "/docs")]
    requests += [("OPTIONS", "/predict"), ("DELETE", "/models"), ("GET", f"/predict?{HEADER}={KEY}")]
    for method, path in requests:
        answer = client.request(method, path, headers=WRONG[place])
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), path
        assert answer.headers["connection"] == "close"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert list(answer.json()) == ["error"]
        assert "'Authorization: Bearer KEY' or 'X-API-Key: KEY'" in answer.json()["error"]
        assert KEY not in answer.text
    assert not caplog.records


def test_what_is_open_is_open_and_shows_the_docs_whole(client: TestClient) -> None:
    for path in OPEN:
        assert client.get(path).status_code == 200, path
        assert client.get(path, headers={HEADER: "wrong"}).status_code == 200, path
    shown = re.findall(r'(?:src|href)="([^"]*)"', client.get("/docs").text)
    assert {*shown, "/docs", "/openapi.json", "/", "/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"} == OPEN


@pytest.mark.parametrize(
    "path",
    [
        *("/healthz/../metrics", "/healthz%2f..%2fmetrics", "//metrics", "/metrics/", "/Metrics", "/metrics%00"),
        *("/docs/../models", "/static-offline-docs/../models", "/%6detrics", "/;/metrics", "/healthz;/../metrics"),
    ],
)
def test_no_spelling_of_a_path_leads_around_the_key(client: TestClient, path: str) -> None:
    assert client.get(f"http://testserver{path}").status_code == 401


def test_a_prefix_of_the_route_changes_nothing(config: ServeConfig) -> None:
    with TestClient(make_app(Service(config), keys=Keys.of([KEY])), root_path="/cifar") as client:
        assert client.get("/cifar/healthz").status_code == 200
        assert client.get("/cifar/metrics").status_code == 401
        assert client.get("/cifar/metrics", headers=BEARER).status_code == 200


def test_no_websocket_without_a_key(client: TestClient) -> None:
    with pytest.raises(WebSocketDisconnect) as raised, client.websocket_connect("/healthz"):
        pass
    assert raised.value.code == 1008


def test_refusals_are_counted_in_one_series(client: TestClient) -> None:
    def count() -> float:
        (line,) = re.findall(
            r'cifar_requests_total\{.*route="other",status="401"\} (.*)', client.get("/metrics", headers=BEARER).text
        )
        return float(line)

    client.get("/models")
    before = count()
    for number in range(20):
        client.get(f"/nowhere/{number}")
    assert count() == before + 20


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []
    real = hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return real(one, other)

    monkeypatch.setattr(keys_module.hmac, "compare_digest", compare)
    known = [secrets.token_urlsafe(size) for size in range(16, 66)]
    keys = Keys.of(known)
    for key in (known[0], known[-1], "nothing"):
        compared.clear()
        keys.admit(key.encode())
        assert compared == [(32, 32)] * 50, "digests of one length, and no end at the first that is right"


def test_a_thousand_keys_take_no_time() -> None:
    keys = Keys.of(secrets.token_urlsafe(32) for _ in range(1000))
    started_at = time.process_time()
    for _ in range(100):
        assert not keys.admit(b"nothing")
    assert time.process_time() - started_at < 0.2


# Bodies, under a real server


def exchange(port: int, head: str, more: bytes = b"") -> tuple[bytes, float]:
    """All that comes back until the server closes the connection, and the seconds it took.

    A connection closed on a body that nobody read is reset (RFC 1122, 4.2.2.13); what had come before it is the answer.
    """
    started_at = time.perf_counter()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + more)
        parts = []
        with suppress(ConnectionResetError):
            while part := connection.recv(65536):
                parts.append(part)
    return b"".join(parts), time.perf_counter() - started_at


@pytest.mark.parametrize("path", ["/predict", "/v2/models/flowers/infer", "/metrics"])
@pytest.mark.parametrize("length", ["Content-Length: 30000000", "Transfer-Encoding: chunked"])
def test_a_body_without_a_key_is_not_waited_for(port: int, service: Service, path: str, length: str) -> None:
    answer, seconds = exchange(port, f"POST {path} HTTP/1.1\nHost: x\nContent-Type: image/png\n{length}")
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert seconds < 2
    assert service.metrics.body._value.get() == 0


def test_no_body_is_asked_for_without_a_key(port: int) -> None:
    head = "POST /predict HTTP/1.1\nHost: x\nContent-Length: 9\nContent-Type: image/png\nExpect: 100-continue"
    answer, _ = exchange(port, head)
    assert answer.startswith(b"HTTP/1.1 401 ")
    answer, _ = exchange(port, f"{head}\nConnection: close\n{HEADER}: {KEY}", b"no image!")
    assert answer.startswith(b"HTTP/1.1 100 ")
    assert b"HTTP/1.1 422 " in answer


def test_an_open_page_takes_no_body_either(port: int, service: Service) -> None:
    """Else whoever has no key could take the room that others' requests need."""
    for path in ("/healthz", "/docs"):
        head = f"GET {path} HTTP/1.1\nHost: x\nConnection: close\nContent-Length: 30000000"
        answer, seconds = exchange(port, head, bytes(100_000))
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert seconds < 2
        assert service.metrics.body._value.get() == 0


def test_hostile_headers_are_no_failure(port: int) -> None:
    for value in (b"\x80" * 50, b"Bearer \xff", b"k" * 30_000, b"Bearer " + b" " * 30_000):
        for name in (b"Authorization", b"X-API-Key"):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
                connection.sendall(b"GET /models HTTP/1.1\r\nHost: x\r\n" + name + b": " + value + b"\r\n\r\n")
                assert connection.recv(12)[9:] == b"401"


def test_clients_of_the_open_inference_protocol_send_it_in_a_header(port: int) -> None:
    images = np.stack([noise(0, 16)])
    tensor = triton.InferInput("images", [*images.shape], "UINT8")
    tensor.set_data_from_numpy(images)
    client = triton.InferenceServerClient(f"127.0.0.1:{port}")
    assert client.is_server_live()
    assert client.is_server_ready()
    with pytest.raises(InferenceServerException, match="needs an API key"):
        client.infer("flowers", [tensor])
    for headers in ({HEADER: KEY}, {"Authorization": f"Bearer {KEY}"}):
        answer = client.infer("flowers", [tensor], headers=headers)
        probabilities = answer.as_numpy("probabilities")
        assert probabilities is not None
        assert probabilities.shape == (1, 3)
    client.close()


# The document


def test_the_document_says_what_needs_a_key(client: TestClient, config: ServeConfig) -> None:
    document = client.get("/openapi.json").json()
    assert document["components"]["securitySchemes"] == {
        "bearer": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": HEADER},
    }
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert ("security" in operation) == ("401" in operation["responses"]) == (path not in OPEN)
    open_service = make_app(Service(config)).openapi()
    assert "securitySchemes" not in open_service["components"]
    assert "401" not in json.dumps(open_service["paths"])


def test_what_the_document_says_of_keys_is_so(config: ServeConfig) -> None:
    """schemathesis asks each operation with the key, without it and with another."""
    app: Any = make_app(Service(config), keys=Keys.of([KEY]))
    app.router.lifespan_context = lambda app: nullcontext()
    documented: Any = schemathesis.openapi.from_asgi("/openapi.json", app)
    left_out = CHECKS.get_by_names(["positive_data_acceptance"])
    statuses = set()

    def check(case: Any) -> None:
        answer = case.call_and_validate(headers=BEARER | {HEADER: KEY}, excluded_checks=left_out)
        statuses.add(answer.status_code)
        assert case.call(headers={HEADER: OTHER}).status_code in ((200,) if case.path in OPEN else (401,))

    for found in documented.get_all_operations():
        examples = settings(
            max_examples=5,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        )
        examples(given(found.ok().as_strategy())(check))()
    assert 200 in statuses
    assert 401 not in statuses
