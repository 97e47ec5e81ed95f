"""The HTTP interface of a Service, as a FastAPI app. It runs under Ray Serve and under any other ASGI server."""

import asyncio
import base64
import binascii
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel, Field
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

import cifar
from cifar.serve.errors import BadRequest, ServiceError, check_values, explain
from cifar.serve.keys import Guard, Keys, describe_keys
from cifar.serve.limits import Limits
from cifar.serve.page import load_page
from cifar.serve.protocol import protocol_router
from cifar.serve.service import Answered, Service

MULTIPART_BYTES = 4096
"""What a form adds to one image, at most."""
MOST_PARTS = 1000
"""Of a multipart body; the images among them are counted by the service."""
MOST_NAME = 255
"""Characters of a file's name in the answer."""


class NamedImage(NamedTuple):
    name: str | None
    data: bytes


class ImagesBody(BaseModel):
    """Encoded images as JSON."""

    images: list[str] = Field(description="Base64 of PNG, JPEG, WebP, GIF, BMP, TIFF ... files.")


class Ranked(BaseModel):
    label: str
    probability: float


class Prediction(BaseModel):
    """The answer to one image, or why there is none."""

    name: str | None = Field(default=None, description="Of the file, where the request gave one.")
    label: str | None = None
    probability: float | None = None
    top_k: list[Ranked] | None = None
    probabilities: dict[str, float] | None = None
    abstained: bool | None = Field(default=None, description="The probability is below the threshold.")
    error: str | None = None


class Predictions(BaseModel):
    model: str
    version: str
    predictions: list[Prediction]


class Problem(BaseModel):
    error: str = Field(description="One sentence that says what to do.")


class VersionCard(BaseModel):
    version: str
    aliases: list[str]
    classes: list[str]
    image_size: int
    data: str
    published_at: str | None
    numbers: dict[str, float]


class Models(BaseModel):
    name: str
    default: str
    max_image_bytes: int
    max_images: int
    top_k: int
    versions: list[VersionCard]


PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "The body is not what its content type says."},
    404: {"model": Problem, "description": "No such version is served."},
    408: {"model": Problem, "description": "The request took too long to arrive."},
    413: {"model": Problem, "description": "Too many images, or too many bytes."},
    415: {"model": Problem, "description": "Neither images, nor multipart, nor JSON."},
    422: {"model": Predictions, "description": "None of the images could be read."},
    500: {"model": Problem, "description": "The model failed."},
    503: {
        "model": Problem,
        "description": "Busy; try again.",
        "headers": {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}}},
    },
}
BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"files": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                    "required": ["files"],
                }
            },
            "image/*": {"schema": {"type": "string", "format": "binary"}},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            "application/json": {"schema": ImagesBody.model_json_schema()},
        },
    }
}


def make_app(service: Service, gather: Callable[[], Awaitable[str]] | None = None, keys: Keys | None = None) -> FastAPI:
    """The app that answers for `service`, to those who have one of `keys`; without keys, to all.

    `gather` gives the metrics of all replicas, without it those of this one.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        following = asyncio.create_task(service.follow())
        yield
        following.cancel()
        service.close()

    # FastAPI's own page of documentation loads its scripts from elsewhere: offline it stays empty.
    app = FastAPIOffline(
        redoc_url=None,
        title="cifar",
        version=cifar.__version__,
        description="Classifies images by a published model.",
        lifespan=lifespan,
        redirect_slashes=False,  # a redirect names the host that the request gave, whoever's that is
    )
    limits = {"max_bytes": service.config.max_request_bytes, "seconds": service.config.request_seconds}
    app.add_middleware(Limits, **limits, metrics=service.metrics)
    if keys is not None:
        app.add_middleware(Guard, keys=keys, metrics=service.metrics)  # the last one is the first to be asked
        describe_keys(app)
    app.include_router(_routes(service, gather))
    app.include_router(protocol_router(lambda: service))
    app.add_exception_handler(ServiceError, explain)
    app.add_exception_handler(RequestValidationError, _explain_validation)
    app.add_exception_handler(HTTPException, _explain_http)
    app.add_exception_handler(Exception, _explain_failure)
    return app


def _explain_validation(request: Request, error: Any) -> JSONResponse:
    sentence = "; ".join(f"{problem['loc'][-1]}: {problem['msg']}" for problem in error.errors())
    return JSONResponse({"error": sentence}, 400)


def _explain_failure(request: Request, error: Any) -> JSONResponse:
    """What nobody foresaw; the server logs it."""
    return JSONResponse({"error": "the service failed; its log says why"}, 500)


def _explain_http(request: Request, error: Any) -> JSONResponse:
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


def _routes(service: Service, gather: Callable[[], Awaitable[str]] | None) -> APIRouter:
    routes = APIRouter()

    @routes.post("/predict", response_model=Predictions, responses=PROBLEMS, openapi_extra=BODY)
    async def predict(
        request: Request,
        version: str | None = Query(default=None, description="A version or an alias; without it the service chooses."),
        top_k: int = Query(default=service.config.top_k, ge=1, le=1000, description="Classes to list."),
    ) -> Response:
        """Classify one image or many: multipart files, a raw image body, or JSON with base64.

        One image that cannot be read has its own error beside the others' answers.
        """
        started_at = time.perf_counter()
        images = await read_images(request)
        answered = await service.predict([image.data for image in images], version)
        content = to_json(answered, [image.name for image in images], top_k, service.config.threshold)
        status = 200 if None in answered.errors else 422
        milliseconds = 1000 * (time.perf_counter() - started_at)
        return JSONResponse(content, status, headers={"Server-Timing": f"predict;dur={milliseconds:.1f}"})

    @routes.get("/models", response_model=Models)
    async def models() -> Response:
        """The versions that are served, and the limits of a request."""
        selection = service.selection
        cards = []
        for served in selection.served.values():
            info = served.predictor.info
            aliases = [alias for alias, version in selection.aliases.items() if version == served.version]
            card = VersionCard(
                version=served.version,
                aliases=aliases,
                classes=list(info.classes),
                image_size=served.predictor.image_size,
                data=info.source,
                published_at=served.published_at,
                numbers=served.numbers,
            )
            cards.append(card)
        found = Models(
            name=service.name,
            default=selection.default.version,
            max_image_bytes=service.config.max_request_bytes - MULTIPART_BYTES,
            max_images=service.config.max_images,
            top_k=service.config.top_k,
            versions=cards,
        )
        return JSONResponse(found.model_dump())

    @routes.get("/healthz", response_class=PlainTextResponse)
    async def healthz() -> str:
        """The process is alive."""
        return "ok"

    @routes.get("/readyz", response_class=PlainTextResponse, responses={503: {"description": "The queue is full."}})
    async def readyz() -> Response:
        """The model is loaded and the queue has room."""
        if service.ready:
            return PlainTextResponse("ready")
        return PlainTextResponse("busy", 503, headers={"Retry-After": "1"})

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """In the text format of Prometheus."""
        text = await gather() if gather else service.metrics.text()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @routes.get("/", response_class=HTMLResponse)
    async def page() -> Response:
        """The web page."""
        html, headers = load_page()
        return HTMLResponse(html, headers=headers)

    return routes


async def read_images(request: Request) -> list[NamedImage]:
    """The images of a request by its content type."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        try:
            async with request.form(max_files=MOST_PARTS, max_fields=MOST_PARTS) as form:
                parts = [part for _, part in form.multi_items() if isinstance(part, UploadFile)]
                images = [NamedImage(file_name(part), await part.read()) for part in parts]
        except (LookupError, ValueError):  # a charset that is none
            raise BadRequest("the form cannot be read; send it as UTF-8") from None
        if not images:
            raise BadRequest("no files in the form; send each image as a file")
        return images
    body = await request.body()
    if kind == "application/json":
        check_values(body)
        return [NamedImage(None, data) for data in from_json(body)]
    if not body:
        raise BadRequest("an empty body; send an image, a form with files, or JSON with images as base64")
    return [NamedImage(None, body)]


def file_name(part: UploadFile) -> str | None:
    """As it can be answered: no longer than file systems allow, and without half characters."""
    name = part.filename
    return None if name is None else name[:MOST_NAME].encode(errors="replace").decode()


def from_json(body: bytes) -> list[bytes]:
    """Encoded images of a JSON body; BadRequest says what is wrong with it."""
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"not JSON: {error}") from None
    images = values.get("images") if isinstance(values, dict) else None
    if not isinstance(images, list) or not images or not all(isinstance(image, str) for image in images):
        raise BadRequest('JSON must be {"images": ["<base64>", ...]} with at least one image')
    found = []
    for place, image in enumerate(images):
        try:
            # A browser's FileReader puts this before what it encodes.
            found.append(
                base64.b64decode(image.partition(",")[2] if image.startswith("data:") else image, validate=True)
            )
        except (binascii.Error, ValueError):
            raise BadRequest(f"images[{place}] is not base64") from None
    return found


def to_json(answered: Answered, names: list[str | None], top_k: int, threshold: float) -> dict[str, Any]:
    """The body of an answer, as `Predictions` describes it."""
    predictor = answered.served.predictor
    predictions = []
    answers = predictor.answers(answered.probabilities, top_k, threshold)
    for name, error, row, answer in zip(names, answered.errors, answered.probabilities, answers, strict=True):
        named = {} if name is None else {"name": name}
        if error is not None:
            predictions.append(named | {"error": error})
            continue
        values = {
            "label": answer.label,
            "probability": answer.probability,
            "top_k": [{"label": label, "probability": value} for label, value in answer.top_k],
            "probabilities": dict(zip(predictor.classes, row.tolist(), strict=True)),
            "abstained": answer.abstained,
        }
        predictions.append(named | values)
    return {"model": answered.served.name, "version": answered.served.version, "predictions": predictions}
