"""Requests that nobody means well: none is a 500, takes long or leaves anything behind. Without Ray."""

import base64
import json
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from PIL import Image
from schemathesis.checks import CHECKS
from schemathesis.generation import GenerationMode
from starlette.testclient import TestClient

from cifar.serve.app import make_app
from cifar.serve.config import ServeConfig
from cifar.serve.errors import MOST_VALUES
from cifar.serve.service import Service
from tests.images import bad_images, encode, png
from tests.test_serve import encoded, save

FORM = "multipart/form-data; boundary=b"
JSON = "application/json"
MEGABYTES = 4


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Service:
    model = save(tmp_path_factory.mktemp("runs") / "flowers")
    return Service(ServeConfig(model=str(model), device="cpu", precision="fp32", max_request_mb=MEGABYTES))


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(make_app(service), raise_server_exceptions=False, follow_redirects=False) as client:
        yield client


@pytest.fixture(scope="module")
def documented(service: Service, client: TestClient) -> Any:
    app = make_app(service)
    app.router.lifespan_context = lambda app: nullcontext()  # each request would start and close the service
    return schemathesis.openapi.from_asgi("/openapi.json", app)


def examples(operation: Any) -> Iterator[Any]:
    """Strategies of requests: as the document says, and, where it says anything of them, otherwise."""
    yield operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
    if operation.body:
        yield operation.as_strategy(generation_mode=GenerationMode.NEGATIVE)


def test_the_document_says_what_is_answered(documented: Any) -> None:
    # No schema says that a shape's product is the length of the data, or that base64 is an image.
    left_out = CHECKS.get_by_names(["positive_data_acceptance"])
    answered = set()

    def check(case: Any) -> None:
        if case.media_type:  # a body for a model that is not here would not be read
            case.path_parameters |= {name: NAMES[name] for name in case.path_parameters}
        answer = case.call_and_validate(excluded_checks=left_out)
        answered.add((case.path.rpartition("/")[2], answer.status_code))

    for found in documented.get_all_operations():
        for cases in examples(found.ok()):
            settings(
                max_examples=60,
                deadline=None,
                derandomize=True,
                database=None,
                phases=[Phase.generate],
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
            )(given(cases)(check))()
    assert {("predict", 200), ("predict", 400), ("predict", 422), ("infer", 200), ("infer", 400)} < answered


def part(header: bytes, data: bytes = b"x") -> bytes:
    return b"--b\r\n" + header + b"\r\n\r\n" + data + b"\r\n"


def form(header: bytes, times: int = 1) -> bytes:
    return times * part(header) + b"--b--\r\n"


def tensor(data: str = "[0,0,0]", shape: str = "[1,1,1,3]", kind: str = "UINT8", more: str = "") -> bytes:
    return f'{{"inputs":[{{"name":"images","datatype":"{kind}","shape":{shape},"data":{data}}}]{more}}}'.encode()


FILE = b'Content-Disposition: form-data; name="files"; filename="x"'
NAMED = b'Content-Disposition: form-data; name="files"; filename="\\ud800+2AA-\xff"'
NAMES = {"name": "flowers", "version": "local"}
LARGEST = 2**63 - 1
BODIES: list[tuple[str, bytes, str]] = [
    *(("/predict", body, JSON) for body in (b"", b"{", b"null", b"NaN", b"\xff\xfe{\0", b'{"images":NaN}')),
    *(
        ("/predict", body, JSON)
        for body in (b'{"images":["\\ud800"]}', b'{"images":["\xff"]}', b'{"images":["data:,"]}')
    ),
    *(("/predict", body, JSON) for body in (b"[" * 100_000, b'{"a":' * 100_000, b'{"images":' + b"9" * 5000 + b"}")),
    ("/predict", b'{"images":[' + b'"",' * 100_000 + b'""]}', JSON),
    ("/predict", json.dumps(encoded(*(data for data, _ in bad_images().values()))).encode(), JSON),
    *(
        ("/predict", form(NAMED), f"{FORM}; charset={name}")
        for name in ("undefined", "unicode_escape", "utf-7", "idna")
    ),
    *(
        ("/predict", form(NAMED), f"{FORM}; charset={name}")
        for name in ("zlib_codec", "punycode", "utf-16", "\0", "a\0b")
    ),
    ("/predict", form(b'Content-Disposition: form-data; name="files"; filename="' + b"n" * 3000 + b'"'), FORM),
    ("/predict", form(b'Content-Disposition: form-data; name="' + b"n" * 1_000_000 + b'"'), FORM),
    ("/predict", form(b"Content-Disposition: form-data"), FORM),
    ("/predict", form(b""), FORM),
    ("/predict", form(FILE, 1001), FORM),
    ("/predict", form(FILE, 50_000), FORM),
    ("/predict", form(FILE + b"\r\nContent-Type: multipart/mixed; boundary=b"), FORM),
    ("/predict", form(b"A: b\r\n" * 10_000 + FILE), FORM),
    ("/predict", part(FILE, b"\r" * 3_000_000), FORM),
    ("/predict", form(FILE), "multipart/form-data; boundary="),
    ("/predict", form(FILE), "multipart/form-data; boundary=" + 5000 * "b"),
    ("/predict", b"x", "\xff;;;="),
    ("/predict", bytes(MEGABYTES * 1_000_000 + 1), "image/png"),
    *(("/v2/models/flowers/infer", body, JSON) for body in (b"", b"{}", b"[]", tensor("[" * 10_000))),
    *(
        ("/v2/models/flowers/infer", tensor(shape=shape), JSON)
        for shape in (f"[{LARGEST},{LARGEST},{LARGEST},3]", f"[{LARGEST + 1},1,1,3]", "[-1,1,1,3]", "[0,0,0,3]", "[]")
    ),
    *(
        ("/v2/models/flowers/infer", tensor(data), JSON)
        for data in ("[1e999,0,0]", "[true,0,0]", "[256,0,0]", "[NaN,0,0]")
    ),
    *(("/v2/models/flowers/infer", tensor(data, "[1]", "BYTES"), JSON) for data in ("[null]", '["x"]', '["\\ud800"]')),
    ("/v2/models/flowers/infer", tensor(f"[{299_999 * '0,'}0]", "[100000,1,1,3]"), JSON),
    ("/v2/models/flowers/infer", tensor(more=f',"id":"{1_000_000 * "x"}"'), JSON),
    ("/v2/models/flowers/infer", tensor(more=',"id":"\\ud800"'), JSON),
    ("/v2/models/<script>/infer", tensor(), JSON),
    ("/predict?version=<script>&top_k=<script>", png(0), "image/png"),
]


@pytest.mark.parametrize("place", range(len(BODIES)))
def test_a_hostile_body_is_refused_in_one_sentence_and_at_once(place: int, client: TestClient) -> None:
    path, body, kind = BODIES[place]
    started_at = time.process_time()
    answer = client.post(path, content=body, headers=[(b"content-type", kind.encode("latin-1"))])
    assert time.process_time() - started_at < 2
    assert 200 <= answer.status_code < 500, answer.text[:500]
    assert answer.headers["content-type"].startswith(JSON)
    assert answer.headers["x-content-type-options"] == "nosniff"
    found = answer.json()
    if answer.status_code not in (200, 422):
        assert list(found) == ["error"]
        assert 0 < len(found["error"]) < 1000
        assert "\n" not in found["error"]


def test_what_the_client_names_is_answered_short(client: TestClient) -> None:
    header = b'Content-Disposition: form-data; name="files"; filename="' + b"n" * 3000 + b'"'
    (one,) = client.post("/predict", content=form(header), headers={"content-type": FORM}).json()["predictions"]
    assert len(one["name"]) == 255
    answer = client.post("/predict?version=" + 5000 * "v", content=png(0))
    assert answer.status_code == 404
    assert len(answer.json()["error"]) < 200


@pytest.mark.parametrize("body", [b'{"images":[' + MOST_VALUES * b'"",' + b'""]}', tensor(f"[{MOST_VALUES * '0,'}0]")])
def test_json_that_would_take_seconds_is_not_read(body: bytes, client: TestClient) -> None:
    path = "/predict" if body.startswith(b'{"images"') else "/v2/models/flowers/infer"
    answer = client.post(path, content=body, headers={"content-type": JSON})
    assert answer.status_code == 413
    assert f"the most is {MOST_VALUES}" in answer.json()["error"]


def test_images_of_many_pixels_are_refused_before_they_are_decoded(client: TestClient, service: Service) -> None:
    """89 megapixels in 3 kB took 0.6 s to 3 s and up to 1.7 GB."""
    image = encode(Image.new("1", (9000, 9000)), "tiff", compression="group4")
    assert len(image) < 10_000
    for body in (encoded(image), encoded(*20 * [encode(Image.new("1", (1500, 1500)))])):
        answer = client.post("/predict", json=body)
        assert answer.status_code == 413
        assert "megapixels together; a request may hold 32" in answer.json()["error"]
    item = base64.b64encode(image).decode()
    answer = client.post("/v2/models/flowers/infer", content=tensor(f'["{item}"]', "[1]", "BYTES"))
    assert answer.status_code == 413
    assert client.post("/predict", json=encoded(encode(Image.new("RGB", (2500, 2000))))).status_code == 200
    assert service._decoding == 0


def test_nothing_names_the_host_that_a_request_gave(client: TestClient) -> None:
    answer = client.get("/models/", headers={"host": "elsewhere.example"})
    assert answer.status_code == 404
    assert "location" not in answer.headers


def test_other_origins_are_not_let_in(client: TestClient) -> None:
    headers = {"origin": "https://elsewhere.example", "access-control-request-method": "POST"}
    assert "access-control-allow-origin" not in client.options("/predict", headers=headers).headers
    assert "access-control-allow-origin" not in client.get("/models", headers=headers).headers


def test_requests_make_no_time_series_of_their_own(client: TestClient) -> None:
    for number in range(50):
        client.post(f"/predict?version=v{number}", content=png(0))
        client.get(f"/v2/models/m{number}/versions/v{number}/ready")
        client.get(f"/nowhere/{number}")
    text = client.get("/metrics").text
    assert 'route="other",status="404"' in text
    assert 'route="/v2/models/{name}/versions/{version}/ready"' in text
    assert not any(name in text for name in ("v49", "m49", "nowhere"))


def test_what_nobody_foresaw_is_a_sentence_too(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Service, "find", lambda *_: 1 / 0)
    answer = client.get("/v2/models/flowers")
    assert answer.status_code == 500
    assert answer.json() == {"error": "the service failed; its log says why"}


def test_nothing_is_left_and_nothing_was_logged(
    client: TestClient, service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    for path, body, kind in BODIES[::3]:
        client.post(path, content=body, headers=[(b"content-type", kind.encode("latin-1"))])
    assert not caplog.records
    assert (service._queue.size, service._decoding, service._tasks) == (0, 0, set())
    assert 'cifar_request_bytes{replica="local"} 0.0' in client.get("/metrics").text
    assert client.post("/predict", content=png(0)).status_code == 200


def test_paths_of_files_are_no_routes(client: TestClient) -> None:
    root = Path(__file__).parent.as_posix()
    for path in (f"/{root}/images.py", "/..%2f..%2fetc/passwd", "//etc/passwd", "/%00"):
        assert client.get(path).status_code == 404
