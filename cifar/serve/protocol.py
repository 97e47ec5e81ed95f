"""The Open Inference Protocol v2 over HTTP, so that its clients work unchanged. No Ray: the service is given.

It answers as KServe's specification says, with Triton's extension `binary_tensor_data`. The one input is `images`;
outputs are `probabilities` and `label`, and when asked for `error`. A request with an image that cannot be read is
refused (400), unless it asks for `error`: then the other images get their answers. Not supported: compressed requests
(415), Triton's classification and shared memory (400). Unknown parameters are ignored.
"""

import reprlib
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, Protocol

import numpy as np
from fastapi import APIRouter, Header, Request, Response
from numpy.typing import NDArray
from pydantic import BaseModel

import cifar
from cifar.serve.errors import BadRequest, Busy, Compressed, UnknownModel, UnknownVersion
from cifar.serve.tensors import (
    InferenceResponse,
    TensorMetadata,
    read_request,
    request_schema,
    write_answer,
)

HEADER_LENGTH = "Inference-Header-Content-Length"
BINARY = "application/octet-stream"


class Classes(Protocol):
    @property
    def classes(self) -> tuple[str, ...]: ...


class Served(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def predictor(self) -> Classes: ...


class Answered(Protocol):
    @property
    def served(self) -> Served: ...
    @property
    def probabilities(self) -> NDArray[np.float32]: ...
    @property
    def errors(self) -> Sequence[str | None]: ...


class Service(Protocol):
    """What the routes need of the service; Busy, UnknownVersion and TooMany come out of it."""

    @property
    def name(self) -> str: ...
    @property
    def ready(self) -> bool: ...
    def versions(self) -> Sequence[Served]: ...
    def find(self, version: str | None) -> Served: ...
    def predict(self, images: list[bytes | NDArray[np.uint8]], version: str | None) -> Awaitable[Answered]: ...


class Problem(BaseModel):
    error: str


class Live(BaseModel):
    live: bool


class Ready(BaseModel):
    """The specification calls it `live` here too; KServe's own servers say `ready`."""

    live: bool
    ready: bool


class ServerMetadata(BaseModel):
    name: str
    version: str
    extensions: list[str]


class ModelReady(BaseModel):
    name: str
    ready: bool


class ModelMetadata(BaseModel):
    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    says = {
        400: "The body is not what the protocol asks for, or an image in it cannot be read.",
        404: "No such model or version.",
        413: "More images, or more bytes, than are taken at once.",
        415: "The body is compressed.",
        503: "Not ready, or too busy: ask again after the seconds in Retry-After.",
    }
    return {status: {"model": Problem, "description": says[status]} for status in statuses}


_FINDING: dict[str, Any] = {"responses": _problems(404, 503), "response_model_exclude_none": True}
_EXAMPLE = {
    "id": "42",
    "inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, 2, 1, 3], "data": [0, 90, 200, 20, 120, 255]}],
    "outputs": [{"name": "label"}, {"name": "probabilities"}],
}
_INFERRING: dict[str, Any] = {
    "response_class": Response,
    "responses": _problems(400, 404, 413, 415, 503)
    | {
        200: {
            "model": InferenceResponse,
            "description": "JSON; with binary outputs the JSON object and their bytes after it.",
            "content": {BINARY: {"schema": {"type": "string", "format": "binary"}}},
            "headers": {HEADER_LENGTH: {"description": "Bytes of the JSON object.", "schema": {"type": "integer"}}},
        }
    },
    "openapi_extra": {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": request_schema(), "example": _EXAMPLE},
                BINARY: {"schema": {"type": "string", "format": "binary"}},
            },
        }
    },
}
_HeaderLength = Annotated[
    str | None, Header(alias=HEADER_LENGTH, description="Bytes of the JSON object when binary data follows it.")
]


def protocol_router(service: Callable[[], Service]) -> APIRouter:
    """The routes under /v2; `service` is asked anew for every request."""
    router = APIRouter(prefix="/v2", tags=["Open Inference Protocol v2"])

    def service_of(name: str) -> Service:
        current = service()
        if name != current.name:
            raise UnknownModel(f"no model {reprlib.repr(name)} here; this service answers for {current.name!r}")
        return current

    def find(name: str, version: str | None) -> Served:
        current = service_of(name)
        try:
            return current.find(version)
        except UnknownVersion:
            _require_ready(current)
            raise

    def ready_of(name: str, version: str | None) -> ModelReady:
        _require_ready(service_of(name))
        return ModelReady(name=find(name, version).name, ready=True)

    def metadata_of(name: str, version: str | None) -> ModelMetadata:
        served = find(name, version)
        encoded = {"also": "BYTES [-1], encoded images such as PNG or JPEG"}
        return ModelMetadata(
            name=served.name,
            versions=[other.version for other in service().versions()],
            platform="pytorch",
            inputs=[TensorMetadata(name="images", datatype="UINT8", shape=[-1, -1, -1, 3], parameters=encoded)],
            outputs=[
                TensorMetadata(name="probabilities", datatype="FP32", shape=[-1, len(served.predictor.classes)]),
                TensorMetadata(name="label", datatype="BYTES", shape=[-1]),
                TensorMetadata(name="error", datatype="BYTES", shape=[-1]),
            ],
        )

    async def infer_with(name: str, version: str | None, request: Request, header_length: str | None) -> Response:
        current = service_of(name)
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise Compressed("compressed requests are not taken; send the body without Content-Encoding")
        question = read_request(await request.body(), header_length)
        try:
            answered = await current.predict(question.images, version)
        except UnknownVersion:
            _require_ready(current)
            raise
        if "error" not in question.outputs:
            _require_all(answered.errors)
        served = answered.served
        body, length = write_answer(
            question, served.name, served.version, served.predictor.classes, answered.probabilities, answered.errors
        )
        if length is None:
            return Response(body, media_type="application/json")
        return Response(body, media_type=BINARY, headers={HEADER_LENGTH: str(length)})

    @router.get("")
    async def server_metadata() -> ServerMetadata:
        return ServerMetadata(name="cifar", version=cifar.__version__, extensions=["binary_tensor_data"])

    @router.get("/health/live")
    async def server_live() -> Live:
        return Live(live=True)

    @router.get("/health/ready", responses=_problems(503))
    async def server_ready() -> Ready:
        _require_ready(service())
        return Ready(live=True, ready=True)

    @router.get("/models/{name}", **_FINDING)
    async def model_metadata(name: str) -> ModelMetadata:
        return metadata_of(name, None)

    @router.get("/models/{name}/versions/{version}", **_FINDING)
    async def version_metadata(name: str, version: str) -> ModelMetadata:
        return metadata_of(name, version)

    @router.get("/models/{name}/ready", **_FINDING)
    async def model_ready(name: str) -> ModelReady:
        return ready_of(name, None)

    @router.get("/models/{name}/versions/{version}/ready", **_FINDING)
    async def version_ready(name: str, version: str) -> ModelReady:
        return ready_of(name, version)

    @router.post("/models/{name}/infer", **_INFERRING)
    async def infer(name: str, request: Request, header_length: _HeaderLength = None) -> Response:
        """Label images by the version that answers by default."""
        return await infer_with(name, None, request, header_length)

    @router.post("/models/{name}/versions/{version}/infer", **_INFERRING)
    async def infer_by_version(
        name: str, version: str, request: Request, header_length: _HeaderLength = None
    ) -> Response:
        """Label images by a version, or by the one that an alias names."""
        return await infer_with(name, version, request, header_length)

    return router


def _require_ready(service: Service) -> None:
    if not service.ready:
        raise Busy(f"{service.name} is not ready yet")


def _require_all(errors: Sequence[str | None]) -> None:
    """BadRequest for the first image without an answer."""
    failed = [(place, error) for place, error in enumerate(errors) if error is not None]
    if failed:
        place, error = failed[0]
        count = f"{len(failed)} of {len(errors)} images cannot be read, the first is images[{place}]: {error}"
        raise BadRequest(f"{count}; ask for the output 'error' to have the others answered")
