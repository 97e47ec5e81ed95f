"""The Open Inference Protocol as its public client speaks it, and as nobody should."""

import base64
import copy
import gzip
import http.client
import json
import random
import re
import socket
import struct
import threading
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
import uvicorn
from fastapi import FastAPI
from numpy.typing import NDArray
from pydantic import ValidationError
from tritonclient.utils import InferenceServerException

from cifar.data.decode import BadImage
from cifar.predictor import Predictor
from cifar.serve.errors import BadRequest, Busy, ServiceError, TooMany, UnknownVersion, explain
from cifar.serve.protocol import protocol_router
from cifar.serve.tensors import MOST_IMAGES, InferenceRequest, InferenceResponse, read_request
from tests.images import noise, png
from tests.test_predictor import loaded_model

CLASSES = ("airplane", "automobile", "naïve 鳥", "cat")
SIZE = 16
LIMIT = 20
INFER = "/v2/models/cifar10/infer"


@dataclass(frozen=True, kw_only=True)
class Served:
    name: str
    version: str
    predictor: Predictor


@dataclass(frozen=True, kw_only=True)
class Answered:
    served: Served
    probabilities: NDArray[np.float32]
    errors: list[str | None]


@dataclass
class FakeService:
    """Two versions in this process, without a queue."""

    name: str = "cifar10"
    ready: bool = True
    busy: bool = False
    served: list[Served] = field(default_factory=list)
    asked: list[str | None] = field(default_factory=list)

    def versions(self) -> list[Served]:
        return self.served

    def find(self, version: str | None) -> Served:
        by_name = {served.version: served for served in self.served}
        by_name["champion"] = self.served[0]
        if not self.ready or (version or "champion") not in by_name:
            raise UnknownVersion(f"no version {version!r}")
        return by_name[version or "champion"]

    async def predict(self, images: list[bytes | NDArray[np.uint8]], version: str | None) -> Answered:
        served = self.find(version)
        self.asked.append(version)
        if self.busy:
            raise Busy("the queue is full")
        if len(images) > LIMIT:
            raise TooMany(f"{len(images)} images, the most is {LIMIT}")
        errors: list[str | None] = [None] * len(images)
        readable = {}
        for place, image in enumerate(images):
            try:
                readable[place] = served.predictor.decode(image) if isinstance(image, bytes) else image
            except BadImage as error:
                errors[place] = str(error)
        probabilities = np.full((len(images), len(CLASSES)), np.nan, np.float32)
        probabilities[list(readable)] = served.predictor.predict(list(readable.values()))
        return Answered(served=served, probabilities=probabilities, errors=errors)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(loaded_model(SIZE, CLASSES), "cpu", precision="fp32")


@pytest.fixture(scope="module")
def _service(predictor: Predictor) -> FakeService:
    names = ("20261121-120000-abcd1234", "20261120-120000-00000000")
    return FakeService(served=[Served(name="cifar10", version=name, predictor=predictor) for name in names])


@pytest.fixture
def service(_service: FakeService) -> Iterator[FakeService]:
    """As new in each test."""
    _service.asked.clear()
    yield _service
    _service.ready, _service.busy = True, False


@pytest.fixture(scope="module")
def app(_service: FakeService) -> FastAPI:
    app = FastAPI()
    app.include_router(protocol_router(lambda: _service))
    app.add_exception_handler(ServiceError, explain)
    return app


@pytest.fixture(scope="module")
def port(app: FastAPI) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield listening.getsockname()[1]
        server.should_exit = True
        thread.join(10)


@pytest.fixture
def client(port: int) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
        yield client


def ask(
    port: int, body: bytes | dict[str, Any], headers: dict[str, str] | None = None, path: str = INFER
) -> tuple[int, http.client.HTTPMessage, bytes]:
    """Without the client, which sends nothing wrong."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, data, headers or {})
    answer = connection.getresponse()
    found = answer.status, answer.headers, answer.read()
    connection.close()
    return found


def pixels(count: int = 3, side: int = SIZE) -> NDArray[np.uint8]:
    return np.stack([noise(seed, side) for seed in range(count)])


def tensor(data: Any, datatype: str, binary: bool = True) -> triton.InferInput:
    array = data if isinstance(data, np.ndarray) else np.array(data, np.object_)
    given = triton.InferInput("images", list(array.shape), datatype)
    return given.set_data_from_numpy(array, binary_data=binary)


def wanted(*names: str, binary: bool = True) -> list[triton.InferRequestedOutput]:
    return [triton.InferRequestedOutput(name, binary_data=binary) for name in names]


def numbers(result: Any, name: str) -> NDArray[Any]:
    found = result.as_numpy(name)
    assert found is not None
    return found


def uint8(shape: list[Any], data: Any) -> dict[str, Any]:
    return {"inputs": [{"name": "images", "datatype": "UINT8", "shape": shape, "data": data}]}


def labels(probabilities: NDArray[np.float32]) -> list[str]:
    return [CLASSES[place] for place in probabilities.argmax(1)]


def test_the_client_finds_the_server_the_model_and_its_versions(
    client: triton.InferenceServerClient, service: FakeService
) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("cifar10")
    assert client.is_model_ready("cifar10", "champion")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    for version in ("", "champion", service.served[1].version):
        found = client.get_model_metadata("cifar10", version)
        assert found["versions"] == [served.version for served in service.served]
        assert (found["name"], found["platform"]) == ("cifar10", "pytorch")
        (images,) = found["inputs"]
        assert (images["name"], images["datatype"], images["shape"]) == ("images", "UINT8", [-1, -1, -1, 3])
        assert [(output["name"], output["datatype"], output["shape"]) for output in found["outputs"]] == [
            ("probabilities", "FP32", [-1, 4]),
            ("label", "BYTES", [-1]),
            ("error", "BYTES", [-1]),
        ]


def test_an_unknown_model_or_version_is_not_found(client: triton.InferenceServerClient, service: FakeService) -> None:
    assert not client.is_model_ready("cifar10", "nonsense")
    for name, version, reason in (("cifar10", "nonsense", "no version 'nonsense'"), ("mnist", "", "no model 'mnist'")):
        with pytest.raises(InferenceServerException, match=reason) as caught:
            client.get_model_metadata(name, version)
        assert caught.value.status() == "404"
        with pytest.raises(InferenceServerException, match=reason) as caught:
            client.infer(name, [tensor(pixels(), "UINT8")], version)
        assert caught.value.status() == "404"


def test_a_service_that_loads_is_live_and_asks_to_come_back(
    client: triton.InferenceServerClient, service: FakeService, port: int
) -> None:
    service.ready = False
    assert client.is_server_live()
    assert not client.is_server_ready()
    assert not client.is_model_ready("cifar10")
    with pytest.raises(InferenceServerException, match="not ready"):
        client.get_model_metadata("cifar10")
    status, headers, _ = ask(port, uint8([1, 1, 1, 3], [1, 2, 3]))
    assert (status, headers["Retry-After"]) == (503, "1")


def test_a_full_queue_asks_to_come_back(service: FakeService, port: int) -> None:
    service.busy = True
    status, headers, body = ask(port, uint8([1, 1, 1, 3], [1, 2, 3]))
    assert (status, headers["Retry-After"], json.loads(body)) == (503, "1", {"error": "the queue is full"})


@pytest.mark.parametrize("binary_input", [True, False])
@pytest.mark.parametrize("binary_output", [True, False])
def test_pixels_get_the_predictors_answers(
    client: triton.InferenceServerClient, predictor: Predictor, binary_input: bool, binary_output: bool
) -> None:
    expected = predictor.predict(pixels())
    outputs = wanted("probabilities", "label", binary=binary_output)
    result = client.infer("cifar10", [tensor(pixels(), "UINT8", binary_input)], outputs=outputs)
    np.testing.assert_array_equal(numbers(result, "probabilities"), expected)
    found = numbers(result, "label").tolist()
    assert [label.decode() if binary_output else label for label in found] == labels(expected)


def test_pixels_of_another_size_are_resized_as_the_predictor_does(
    client: triton.InferenceServerClient, predictor: Predictor
) -> None:
    others = np.random.default_rng(0).integers(0, 256, (2, 40, 24, 3), dtype=np.uint8)
    result = client.infer("cifar10", [tensor(others, "UINT8")])
    np.testing.assert_array_equal(numbers(result, "probabilities"), predictor.predict(others))


def test_encoded_images_get_the_answers_of_their_pixels(
    client: triton.InferenceServerClient, predictor: Predictor
) -> None:
    """Raw after their lengths as binary data, base64 in JSON."""
    files = [png(seed, side) for seed, side in enumerate((16, 40, 9))]
    expected = predictor.predict([predictor.decode(data) for data in files])
    texts = [base64.b64encode(data).decode() for data in files]
    for given in (tensor(files, "BYTES"), tensor(texts, "BYTES", binary=False)):
        result = client.infer("cifar10", [given])
        np.testing.assert_array_equal(numbers(result, "probabilities"), expected)
        assert [label.decode() for label in numbers(result, "label")] == labels(expected)


def test_the_answer_names_the_version_that_answered_and_the_request(
    client: triton.InferenceServerClient, service: FakeService
) -> None:
    newest, older = (served.version for served in service.served)
    for version, expected in (("", newest), ("champion", newest), (older, older)):
        answer = client.infer("cifar10", [tensor(pixels(), "UINT8")], version, request_id="é 7").get_response()
        assert (answer["model_name"], answer["model_version"], answer["id"]) == ("cifar10", expected, "é 7")
    assert "id" not in client.infer("cifar10", [tensor(pixels(), "UINT8")]).get_response()
    assert service.asked == [None, "champion", older, None]


def test_outputs_come_as_and_in_the_order_they_were_asked_for(port: int, service: FakeService) -> None:
    """One as binary data among others as JSON, and the request's default beneath the output's own word."""
    request = uint8([1, 1, 1, 3], [1, 2, 3])
    request["parameters"] = {"binary_data_output": True}
    request["outputs"] = [{"name": "label", "parameters": {"binary_data": False}}, {"name": "probabilities"}]
    status, headers, body = ask(port, request)
    length = int(headers["Inference-Header-Content-Length"])
    label, probabilities = json.loads(body[:length])["outputs"]
    assert (status, headers["Content-Type"]) == (200, "application/octet-stream")
    assert (label["name"], label["datatype"], label["shape"]) == ("label", "BYTES", [1])
    assert probabilities["name"] == "probabilities"
    assert probabilities["parameters"]["binary_data_size"] == len(body) - length == 16
    assert label["data"] == labels(np.frombuffer(body[length:], "<f4")[None])
    del request["outputs"], request["parameters"]
    status, headers, body = ask(port, request)
    assert (status, headers["Content-Type"]) == (200, "application/json")
    assert "Inference-Header-Content-Length" not in headers
    assert [output["name"] for output in json.loads(body)["outputs"]] == ["probabilities", "label"]


def test_nested_pixels_are_those_of_the_flat_list(port: int, service: FakeService) -> None:
    flat, nested = (
        ask(port, uint8(list(pixels().shape), data)) for data in (pixels().ravel().tolist(), pixels().tolist())
    )
    assert flat[0] == 200
    assert flat[2] == nested[2]


def test_an_unreadable_image_refuses_the_request_and_says_which(
    client: triton.InferenceServerClient, service: FakeService
) -> None:
    with pytest.raises(
        InferenceServerException, match=r"1 of 3 images .*images\[1\]: not an image; .*'error'"
    ) as caught:
        client.infer("cifar10", [tensor([png(0), b"nonsense", png(1)], "BYTES")])
    assert caught.value.status() == "400"


@pytest.mark.parametrize("binary", [True, False])
def test_who_asks_for_errors_gets_the_answers_of_the_other_images(
    client: triton.InferenceServerClient, predictor: Predictor, binary: bool
) -> None:
    """JSON has no NaN: there it is null, which the client reads as NaN."""
    outputs = wanted("error", "probabilities", "label", binary=binary)
    result = client.infer("cifar10", [tensor([png(0), b"nonsense", b""], "BYTES")], outputs=outputs)
    probabilities = numbers(result, "probabilities")
    np.testing.assert_array_equal(probabilities[:1], predictor.predict([predictor.decode(png(0))]))
    assert np.isnan(probabilities[1:]).all()
    texts = {name: numbers(result, name).tolist() for name in ("error", "label")}
    if binary:
        texts = {name: [text.decode() for text in found] for name, found in texts.items()}
    assert texts["error"] == ["", "not an image", "empty file"]
    assert texts["label"] == [*labels(probabilities[:1]), "", ""]


def test_more_images_than_the_service_takes_are_too_many(port: int, service: FakeService) -> None:
    assert ask(port, uint8([LIMIT + 1, 1, 1, 3], [7] * 3 * (LIMIT + 1)))[0] == 413
    count = MOST_IMAGES + 1
    for datatype, shape in (("UINT8", [count, 1, 1, 3]), ("BYTES", [count])):
        status, _, body = ask(
            port, *binary_request(shape, datatype, bytes(3 * count if datatype == "UINT8" else 4 * count))
        )
        assert (status, str(count) in json.loads(body)["error"]) == (413, True)
    assert service.asked == [None]


def test_a_compressed_request_is_refused(client: triton.InferenceServerClient, service: FakeService, port: int) -> None:
    for algorithm in ("gzip", "deflate"):
        with pytest.raises(InferenceServerException, match="without Content-Encoding") as caught:
            client.infer("cifar10", [tensor(pixels(), "UINT8")], request_compression_algorithm=algorithm)
        assert caught.value.status() == "415"
    assert ask(port, gzip.compress(b"{}"), {"Content-Encoding": "GZIP"})[1]["Accept-Encoding"] == "identity"
    client.infer("cifar10", [tensor(pixels(), "UINT8")], response_compression_algorithm="gzip")


def test_binary_pixels_are_views_of_the_body() -> None:
    body, headers = binary_request([2, 4, 5, 3], "UINT8", bytes(range(120)))
    images = read_request(body, headers["Inference-Header-Content-Length"]).images
    whole = np.frombuffer(body, np.uint8)
    assert all(isinstance(image, np.ndarray) and np.shares_memory(image, whole) for image in images)
    np.testing.assert_array_equal(np.stack(images), np.arange(120).reshape(2, 4, 5, 3))


def binary_request(shape: list[int], datatype: str, raw: bytes, **changes: Any) -> tuple[bytes, dict[str, str]]:
    given = {"name": "images", "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": len(raw)}}
    header = json.dumps({"inputs": [given | changes]}).encode()
    return header + raw, {"Inference-Header-Content-Length": str(len(header))}


PIXEL = uint8([1, 1, 1, 3], [1, 2, 3])


def changed(**changes: Any) -> dict[str, Any]:
    """PIXEL with another input."""
    return {"inputs": [PIXEL["inputs"][0] | changes]}


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (b"", "Invalid JSON"),
        (b"\xff{}", "Invalid JSON"),
        (b"[" * 100_000, "recursion limit"),
        (b"7", "should be an object"),
        ({}, "inputs: Field required"),
        ({"inputs": []}, "inputs: .*at least 1"),
        ({"inputs": PIXEL["inputs"] * 2}, "inputs: .*at most 1"),
        (PIXEL | {"id": 7}, "id: .*string"),
        (PIXEL | {"parameters": []}, "parameters: .*object"),
        (PIXEL | {"parameters": {"binary_data_output": 1}}, "binary_data_output: .*boolean"),
        (PIXEL | {"outputs": [{"name": "top_k"}]}, r"outputs\[0\].name: .*'probabilities'"),
        (PIXEL | {"outputs": [{"name": "label"}] * 2}, r"outputs\[1\].name: label is asked for twice"),
        (
            PIXEL | {"outputs": [{"name": "label", "parameters": {"classification": 2}}]},
            r"outputs\[0\].parameters.classification",
        ),
        (changed(name="input0"), r"inputs\[0\].name: .*'images'"),
        (changed(datatype="FP32"), "pixels are uint8; send UINT8"),
        (changed(shape=[1, 3]), r"\[1, 3\], but UINT8 images are \[N, H, W, 3\]"),
        (changed(shape=[1, 3, 1, 1]), r"\[N, H, W, 3\]"),
        (changed(shape=[-1, -1, -1, 3]), r"shape\[0\]: .*greater"),
        (changed(shape=[10**9, 0, 10**9, 3], data=[]), r"shape\[1\]: .*greater"),
        (changed(shape=[True, 1, 1, 3]), r"shape\[0\]: .*integer"),
        (changed(shape=[1.0, 1, 1, 3]), r"shape\[0\]: .*integer"),
        (changed(shape=[10**30, 1, 1, 3]), r"shape\[0\]: .*less"),
        (changed(shape=[10**9, 10**9, 10**9, 3]), "the data has 3"),
        (changed(data=[1, 2]), "asks for 3 elements, the data has 2"),
        (changed(data=None), "give one of data and"),
        (changed(parameters={"binary_data_size": 3}), "give one of data and"),
        (changed(parameters={"shared_memory_region": "r"}), "shared_memory_region"),
        (changed(data=[1, 2, 256]), "whole numbers from 0 to 255"),
        (changed(data=[1, 2, -1]), "whole numbers from 0 to 255"),
        (changed(data=[1, 2, 3.0]), "whole numbers from 0 to 255"),
        (changed(data=[1, 2, True]), "whole numbers from 0 to 255"),
        (changed(data=[1, 2, "3"]), "whole numbers from 0 to 255"),
        (changed(data=[[[[1, 2, 3]]], 4]), "not nested as the shape"),
        (changed(data=[[[[1, 2]]]]), "not nested as the shape"),
        (changed(data=[[[[1, 2, [3]]]]]), "whole numbers from 0 to 255"),
        (changed(datatype="BYTES", shape=[1, 1], data=["AA=="]), r"BYTES images are \[N\]"),
        (changed(datatype="BYTES", shape=[2], data=["AA=="]), "asks for 2 elements, the data has 1"),
        (changed(datatype="BYTES", shape=[2], data=["AA==", "é"]), r"data\[1\]: .*base64"),
        (changed(datatype="BYTES", shape=[1], data=["AA!=="]), r"data\[0\]: .*base64"),
        (changed(datatype="BYTES", shape=[1], data=[7]), r"data\[0\]: .*base64"),
        (changed(data=None, parameters={"binary_data_size": 3}), "3 bytes .* announced, but 0 follow"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(
    port: int, service: FakeService, request_: bytes | dict[str, Any], reason: str
) -> None:
    status, headers, body = ask(port, request_)
    check_refusal(status, headers, body, reason)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (binary_request([1, 1, 1, 3], "UINT8", b"12"), "asks for 3 elements, the data has 2"),
        (binary_request([10**9, 10**9, 10**9, 3], "UINT8", b"123"), "the data has 3"),
        (binary_request([1, 1, 1, 3], "UINT8", b"123", parameters={"binary_data_size": 2}), "2 bytes .* but 3 follow"),
        (binary_request([1, 1, 1, 3], "UINT8", b"123", parameters={"binary_data_size": -3}), "greater than or equal"),
        (binary_request([1, 1, 1, 3], "UINT8", b"123", parameters={"binary_data_size": True}), "integer"),
        (binary_request([1, 1, 1, 3], "UINT8", b"123", parameters=None, data=[1, 2, 3]), "0 bytes .* but 3 follow"),
        (binary_request([10**9], "BYTES", b"\0\0\0\0"), "1000000000 elements .* do not fit into 4 bytes"),
        (binary_request([1], "BYTES", struct.pack("<I", 5) + b"1234"), "element 0 ends beyond the tensor's 8 bytes"),
        (binary_request([2], "BYTES", struct.pack("<I", 2) + b"12" + b"\1\0"), "element 1 ends beyond"),
        (binary_request([1], "BYTES", struct.pack("<I", 2) + b"123"), "1 bytes are left after 1 elements"),
    ],
)
def test_what_is_wrong_with_binary_data_is_said_in_a_sentence(
    port: int, service: FakeService, body: tuple[bytes, dict[str, str]], reason: str
) -> None:
    check_refusal(*ask(port, *body), reason)


@pytest.mark.parametrize("length", ["-1", "", "1e2", "²", "9" * 5000, "10000", "0", "+5"])
def test_a_header_length_that_is_none_is_refused(port: int, service: FakeService, length: str) -> None:
    body = json.dumps(PIXEL).encode()
    check_refusal(*ask(port, body, {"Inference-Header-Content-Length": length}))


def check_refusal(status: int, headers: http.client.HTTPMessage, body: bytes, reason: str = "") -> None:
    assert (status, headers["Content-Type"]) == (400, "application/json"), body
    problem = json.loads(body)
    assert problem.keys() == {"error"}
    assert re.search(reason, problem["error"]), problem
    assert problem["error"].isprintable()
    assert len(problem["error"]) < 300


@pytest.mark.parametrize("datatype", ["UINT8", "BYTES"])
@pytest.mark.parametrize("binary", [True, False])
def test_a_shape_allocates_nothing(datatype: str, binary: bool) -> None:
    shape = [2**20, 2**10, 2**10, 3] if datatype == "UINT8" else [2**40]
    body, headers = binary_request(shape, datatype, b"\0\0\0\0")
    if not binary:
        body, headers = json.dumps(changed(datatype=datatype, shape=shape)).encode(), {}
    tracemalloc.start()
    try:
        with pytest.raises(BadRequest):
            read_request(body, headers.get("Inference-Header-Content-Length"))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "request_", [{"inputs": [{}] * 1000}, PIXEL | {"outputs": [7] * 1000}, changed(shape=["1"] * 1000)]
)
def test_a_long_list_of_what_is_wrong_is_not_looked_into(request_: dict[str, Any]) -> None:
    """Or a body of a few MiB would become millions of errors."""
    with pytest.raises(ValidationError) as caught:
        InferenceRequest.model_validate_json(json.dumps(request_))
    assert caught.value.error_count() < 10


NASTY: list[Any] = [
    None, True, 0, -1, 1, 3, 2**31, 2**63, 10**400, 1.5, "", "images", "UINT8", "BYTES", "FP32", "\0", "鳥" * 50,
    [], {}, [[]], [1, 1, 1, 3], [-1, 3], [0], ["AA=="], {"binary_data_size": 3}, {"name": "error"},
]  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in a JSON value with each of its keys."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [found for key in keys for found in places(value[key])]


def mutated_json(request: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    request = copy.deepcopy(request)
    for _ in range(rng.randint(1, 3)):
        container, key = rng.choice(places(request) or [(request, "inputs")])
        match rng.randrange(4):
            case 0:
                del container[key]
            case 1 if isinstance(container, list):
                container.append(container[key])
            case _:
                container[key] = copy.deepcopy(rng.choice(NASTY))
    return request


def mutated_bytes(body: bytes, rng: random.Random) -> bytes:
    changed = bytearray(body)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(changed) + 1)
        changed[start : start + rng.choice([0, 1, 1, 5, 1000])] = rng.choice(
            [
                b"",
                b"\0",
                b"\xff",
                b"[",
                b"{",
                b'"',
                b"9",
                b"-",
                b",",
                "é".encode(),
                b"\\ud800",
                rng.randbytes(4),
                b"[" * 999,
            ]
        )
    return bytes(changed)


def test_no_mutation_of_a_request_is_an_error_of_the_server(port: int, service: FakeService) -> None:
    """Right answers or one sentence, on seeded mutations of the JSON, of the bytes and of the header."""
    rng = random.Random(0)
    encoded = [png(seed, 4) for seed in range(2)]
    output = [{"name": "label", "parameters": {"binary_data": True}}, {"name": "error"}]
    text = [base64.b64encode(data).decode() for data in encoded]
    small = pixels(2, 2)
    elements = b"".join(struct.pack("<I", len(data)) + data for data in encoded)
    seeds: list[tuple[dict[str, Any], bytes]] = [
        (uint8([2, 2, 2, 3], small.tolist()) | {"id": "a", "outputs": output}, b""),
        (changed(datatype="BYTES", shape=[2], data=text) | {"parameters": {"binary_data_output": True}}, b""),
        (changed(shape=[2, 2, 2, 3], data=None, parameters={"binary_data_size": 24}), small.tobytes()),
        (
            changed(datatype="BYTES", shape=[2], data=None, parameters={"binary_data_size": len(elements)})
            | {"outputs": output},
            elements,
        ),
    ]
    statuses = []
    for turn in range(400):
        request, data = seeds[turn % len(seeds)]
        kind = rng.choice(["none", "json", "json", "bytes", "bytes", "length"]) if turn >= len(seeds) else "none"
        header = json.dumps(mutated_json(request, rng) if kind == "json" else request).encode()
        body = header + data
        length = str(len(header) + (rng.randint(-len(header), 50) if kind == "length" else 0))
        if kind == "bytes":
            body = mutated_bytes(body, rng)
        headers = {"Inference-Header-Content-Length": length} if data or kind == "length" else {}
        status, answered, found = ask(port, body, headers)
        statuses.append(status)
        if status == 200:
            InferenceResponse.model_validate_json(
                found[: int(answered.get("Inference-Header-Content-Length", len(found)))]
            )
        else:
            check_refusal(status, answered, found)
        assert kind != "none" or status == 200, found
    assert 50 < statuses.count(200) < 200


def test_every_status_and_content_type_is_documented(app: FastAPI, port: int, service: FakeService) -> None:
    """And the example is one."""
    routes = app.openapi()["paths"]
    assert len(routes) == 9
    for path in (INFER.replace("cifar10", "{name}"), "/v2/models/{name}/versions/{version}/infer"):
        route = routes[path]["post"]
        assert {"200", "400", "404", "413", "415", "503"} <= route["responses"].keys()
        assert {*route["requestBody"]["content"]} == {"application/json", "application/octet-stream"}
        assert {*route["responses"]["200"]["content"]} == {"application/json", "application/octet-stream"}
        documented = route["requestBody"]["content"]["application/json"]
        assert ask(port, documented["example"])[0] == 200
        schema = documented["schema"]
        assert schema["required"] == ["inputs"]
        assert "$ref" not in json.dumps(schema)
        assert "Inference-Header-Content-Length" in [parameter["name"] for parameter in route["parameters"]]
