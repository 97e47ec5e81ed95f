"""Bodies of the Open Inference Protocol v2: a request's bytes to images, an answer to bytes.

Plain functions, so that they are tested without a server. A body is one JSON object; with Triton's extension
`binary_tensor_data`, the bytes of tensors follow it in the order of the JSON: uint8 as it is, FP32 little-endian, each
element of BYTES after its length as 4 bytes, little-endian. The pydantic models are check and documentation in one.
"""

import base64
import json
import math
import re
import reprlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cifar.serve.errors import BadRequest, TooMany, check_values

MOST_IMAGES = 100_000
"""More in one request are refused before they become objects: a pixel is 3 bytes in the body, 200 as an array. The
service's own limit is lower."""

OutputName = Literal["probabilities", "label", "error"]
DEFAULT_OUTPUTS: tuple[OutputName, ...] = ("probabilities", "label")

_INT64 = 2**63 - 1
_Size = Annotated[int, Field(ge=1, le=_INT64)]


class _Part(BaseModel):
    """What it does not know it ignores, as the protocol lets clients send parameters of their own."""

    model_config = ConfigDict(strict=True)


class InputParameters(_Part):
    binary_data_size: int | None = Field(None, ge=0, le=_INT64, description="Bytes of the tensor after the JSON.")
    shared_memory_region: None = Field(None, description="Triton's extension; not supported here.")


class Input(_Part):
    name: Literal["images"]
    shape: list[_Size] = Field(min_length=1, max_length=4, description="[N, H, W, 3] of UINT8, [N] of BYTES.")
    datatype: Literal["UINT8", "BYTES"] = Field(
        description="UINT8: RGB pixels of any height and width. BYTES: encoded images, such as PNG or JPEG."
    )
    parameters: InputParameters | None = None
    data: list[Any] | None = Field(
        None, description="Pixels, flat in row-major order or nested; encoded images as base64. Or as binary data."
    )


class OutputParameters(_Part):
    binary_data: bool | None = Field(None, description="Send this output as binary data.")
    classification: None = Field(None, description="Triton's extension; not supported here.")
    shared_memory_region: None = Field(None, description="Triton's extension; not supported here.")


class Output(_Part):
    name: OutputName
    parameters: OutputParameters | None = None


class RequestParameters(_Part):
    binary_data_output: bool | None = Field(None, description="Send all outputs as binary data that do not say no.")


class InferenceRequest(_Part):
    id: str | None = Field(None, max_length=1024, description="Comes back in the answer.")
    inputs: list[Input] = Field(min_length=1, max_length=1)
    outputs: list[Output] | None = Field(
        None,
        max_length=len(get_args(OutputName)),
        description="Outputs in the order they are wanted; none: probabilities and label.",
    )
    parameters: RequestParameters | None = None


class TensorMetadata(BaseModel):
    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, str] | None = None


class OutputTensor(BaseModel):
    """One of the answer's tensors, with `data` or, as binary data, `parameters.binary_data_size`."""

    name: OutputName
    datatype: Literal["FP32", "BYTES"]
    shape: list[int]
    parameters: dict[str, int] | None = None
    data: list[float | str | None] | None = None


class InferenceResponse(BaseModel):
    id: str | None = None
    model_name: str
    model_version: str
    outputs: list[OutputTensor]


@dataclass(frozen=True, kw_only=True)
class Question:
    """A request that was understood."""

    id: str | None
    images: list[bytes | NDArray[np.uint8]]
    """Encoded images, or read-only arrays uint8 (H,W,3): where the pixels were binary, views of the body."""
    outputs: dict[OutputName, bool]
    """In the order of the answer, and whether as binary data."""


def read_request(body: bytes, header_length: str | None) -> Question:
    """The images and wishes in a body, of which the first `header_length` bytes are JSON (without: all).

    BadRequest with a sentence for everything malformed, TooMany above MOST_IMAGES. Memory follows the bytes that came,
    whatever the shape says.
    """
    length = len(body)
    if header_length is not None:
        if not re.fullmatch("[0-9]{1,18}", header_length) or int(header_length) > len(body):
            given = reprlib.repr(header_length)
            raise BadRequest(
                f"Inference-Header-Content-Length: {given} is no length within a body of {len(body)} bytes"
            )
        length = int(header_length)
    check_values(body[:length])
    try:
        request = InferenceRequest.model_validate_json(body[:length])
    except ValidationError as error:
        raise BadRequest(_sentence(error)) from None
    return Question(
        id=request.id,
        images=_images(request.inputs[0], memoryview(body)[length:]),
        outputs=_outputs(request),
    )


def write_answer(
    question: Question,
    name: str,
    version: str,
    classes: Sequence[str],
    probabilities: NDArray[np.float32],
    errors: Sequence[str | None],
) -> tuple[bytes, int | None]:
    """The body, and the length of its JSON part if binary data follows it.

    Of an image without an answer the label is empty, and the probabilities (N,C) are NaN; in JSON, which has no NaN,
    null. The error of an image with an answer is empty.
    """
    columns: dict[OutputName, NDArray[np.float32] | list[str]] = {
        "probabilities": probabilities,
        "label": _labels(classes, probabilities, errors),
        "error": [error or "" for error in errors],
    }
    tensors, binary = [], []
    for output, as_binary in question.outputs.items():
        values = columns[output]
        numbers = isinstance(values, np.ndarray)
        tensor: dict[str, Any] = {"name": output, "datatype": "FP32" if numbers else "BYTES", "shape": [len(errors)]}
        if numbers:
            tensor["shape"].append(len(classes))
        if as_binary:
            binary.append(_raw(values))
            tensor["parameters"] = {"binary_data_size": len(binary[-1])}
        else:
            tensor["data"] = _numbers(values) if numbers else values
        tensors.append(tensor)
    answer = {"model_name": name, "model_version": version, "outputs": tensors}
    if question.id is not None:
        answer["id"] = question.id
    header = json.dumps(answer, allow_nan=False).encode()
    return b"".join([header, *binary]), len(header) if binary else None


def request_schema() -> dict[str, Any]:
    """JSON schema of a request without references, which have no place to point to in an OpenAPI path."""
    schema = InferenceRequest.model_json_schema()
    parts = schema.pop("$defs")

    def resolved(value: Any) -> Any:
        if isinstance(value, list):
            return [resolved(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "$ref" in value:
            return resolved(parts[value["$ref"].rpartition("/")[2]])
        return {key: resolved(item) for key, item in value.items()}

    return resolved(schema)


def _sentence(error: ValidationError) -> str:
    """The first thing wrong: its place and what should be there."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).removeprefix(".")
    if place.endswith(".datatype"):
        return f"{place}: pixels are uint8; send UINT8 [N, H, W, 3], or BYTES [N] of encoded images"
    return f"{place}: {first['msg']}" if place else first["msg"]


def _outputs(request: InferenceRequest) -> dict[OutputName, bool]:
    default = bool(request.parameters and request.parameters.binary_data_output)
    if not request.outputs:
        return dict.fromkeys(DEFAULT_OUTPUTS, default)
    wanted: dict[OutputName, bool] = {}
    for place, output in enumerate(request.outputs):
        if output.name in wanted:
            raise BadRequest(f"outputs[{place}].name: {output.name} is asked for twice")
        own = output.parameters.binary_data if output.parameters else None
        wanted[output.name] = default if own is None else own
    return wanted


def _images(tensor: Input, raw: memoryview) -> list[bytes | NDArray[np.uint8]]:
    """`raw` is what follows the JSON."""
    shape = tensor.shape
    if tensor.datatype == "UINT8" and (len(shape) != 4 or shape[3] != 3):
        raise BadRequest(f"inputs[0].shape: {shape}, but UINT8 images are [N, H, W, 3]")
    if tensor.datatype == "BYTES" and len(shape) != 1:
        raise BadRequest(f"inputs[0].shape: {shape}, but BYTES images are [N]")
    size = tensor.parameters.binary_data_size if tensor.parameters else None
    if (size is None) == (tensor.data is None):
        raise BadRequest("inputs[0]: give one of data and parameters.binary_data_size")
    if len(raw) != (size or 0):
        where = "the JSON object, whose length the header Inference-Header-Content-Length gives"
        raise BadRequest(f"inputs[0]: {size or 0} bytes of binary data are announced, but {len(raw)} follow {where}")
    if tensor.datatype == "BYTES":
        return _from_base64(tensor.data, shape[0]) if tensor.data is not None else _elements(raw, shape[0])
    pixels = _listed_pixels(tensor.data, shape) if tensor.data is not None else raw
    if len(pixels) != math.prod(shape):
        raise _mismatch(shape, math.prod(shape), len(pixels))
    _check_count(shape[0])
    return list(np.frombuffer(pixels, np.uint8).reshape(shape))


def _listed_pixels(data: list[Any], shape: list[int]) -> bytes:
    """Numbers of a flat list, or of one nested as the shape says."""
    if data and isinstance(data[0], list):
        level = [data]
        for size in shape:
            if not all(type(row) is list and len(row) == size for row in level):
                raise BadRequest(f"inputs[0].data: not nested as the shape {shape} says")
            level = [item for row in level for item in row]
        data = level
    # A bool is an int to bytes(), but no pixel.
    if set(map(type, data)) <= {int}:
        try:
            return bytes(data)
        except ValueError:
            pass
    raise BadRequest("inputs[0].data: pixels are whole numbers from 0 to 255")


def _from_base64(data: list[Any], count: int) -> list[bytes | NDArray[np.uint8]]:
    if len(data) != count:
        raise _mismatch([count], count, len(data))
    _check_count(count)
    images: list[bytes | NDArray[np.uint8]] = []
    for place, text in enumerate(data):
        try:
            images.append(base64.b64decode(text, validate=True))
        except (TypeError, ValueError):
            raise BadRequest(f"inputs[0].data[{place}]: an encoded image in JSON is a base64 string") from None
    return images


def _elements(raw: memoryview, count: int) -> list[bytes | NDArray[np.uint8]]:
    """The elements of a BYTES tensor."""
    if 4 * count > len(raw):
        raise BadRequest(f"inputs[0]: {count} elements with their lengths do not fit into {len(raw)} bytes")
    _check_count(count)
    elements: list[bytes | NDArray[np.uint8]] = []
    end = 0
    for place in range(count):
        start = end + 4
        end = start + int.from_bytes(raw[end:start], "little")
        if end > len(raw):
            raise BadRequest(f"inputs[0]: element {place} ends beyond the tensor's {len(raw)} bytes")
        elements.append(bytes(raw[start:end]))
    if end != len(raw):
        raise BadRequest(f"inputs[0]: {len(raw) - end} bytes are left after {count} elements")
    return elements


def _check_count(count: int) -> None:
    if count > MOST_IMAGES:
        raise TooMany(f"{count} images in one request; the most is {MOST_IMAGES}")


def _mismatch(shape: list[int], expected: int, found: int) -> BadRequest:
    return BadRequest(f"inputs[0]: the shape {shape} asks for {expected} elements, the data has {found}")


def _labels(classes: Sequence[str], probabilities: NDArray[np.float32], errors: Sequence[str | None]) -> list[str]:
    likeliest: list[int] = probabilities.argmax(1).tolist()
    return [classes[place] if error is None else "" for place, error in zip(likeliest, errors, strict=True)]


def _numbers(probabilities: NDArray[np.float32]) -> list[float | None]:
    """In row-major order, null for NaN."""
    return [None if math.isnan(number) else number for number in probabilities.ravel().tolist()]


def _raw(values: NDArray[np.float32] | list[str]) -> bytes:
    if isinstance(values, np.ndarray):
        return values.astype("<f4").tobytes()
    elements = [text.encode() for text in values]
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)
