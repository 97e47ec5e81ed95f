"""A model as one file that runs without this package: for ONNX Runtime, or as a torch.export program.

Input `images`: uint8 (N,3,S,S), RGB, of any N. Planes first, as runtimes, converters and model collections of exported
networks have it; an array (H,W,3) becomes one by `transpose(2, 0, 1)`. Output `probabilities`: float32 (N,C), in the
order of the class names. Normalisation, calibration and softmax are inside; decoding and resizing are not. The
file's metadata say what an image has to become first.

The network is asked once: test-time augmentation looks again at images that it is unsure of, and which these are no
fixed graph can know. A program of torch is for the CPU; `torch.export.passes.move_to_device_pass` moves it.
"""

import copy
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import cifar
from cifar.config import ConfigError, RunFailed
from cifar.model_dir import LoadedModel
from cifar.models import Classifier
from cifar.predictor import Predictor

LIMIT = 1e-4
"""Largest difference of a probability from the Predictor's; both compute in float32, by other kernels."""
BATCH_SIZES = (1, 2, 5, 32)
ONNX_BYTES = 2**31
"""One file of ONNX holds less."""
METADATA = "metadata.json"
"""Among the extra files of a program of torch."""

Format: TypeAlias = Literal["onnx", "torch"]


@dataclass(frozen=True, kw_only=True)
class Exported:
    data: bytes
    """The file."""
    metadata: dict[str, Any]
    """What it says of itself: in ONNX a property for each, JSON unless it is text; for torch a JSON object."""
    difference: float
    """Largest absolute difference of a probability from the Predictor's."""
    images: int
    """Compared to find it."""


def export(model: LoadedModel, kind: Format, version: str) -> Exported:
    """Export, and compare the file's answers with the Predictor's.

    ConfigError when ONNX is not installed or cannot hold the weights; RunFailed when the answers differ by more than
    1e-4. `version` is what the file calls the model.
    """
    metadata = describe(model, version)
    data, answer = (to_onnx if kind == "onnx" else to_torch)(model, metadata)
    difference, images = compare(answer, model)
    if not difference <= LIMIT:  # a NaN is no agreement
        raise RunFailed(f"the exported file's probabilities differ by {difference:.1e} from the model's; not written")
    return Exported(data=data, metadata=metadata, difference=difference, images=images)


def describe(model: LoadedModel, version: str) -> dict[str, Any]:
    """What a user of the file needs to know."""
    info = model.info
    return {
        "version": version,
        "classes": list(info.classes),
        "image_size": info.config.data.image_size,
        "resize": info.config.data.resize,
        "channels": "RGB",
        "tta": "none",
        "threshold": model.calibration.threshold,
        "cifar": cifar.__version__,
    }


Answer: TypeAlias = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""Images (N,3,S,S) to probabilities (N,C), by an exported file."""


def to_onnx(model: LoadedModel, metadata: dict[str, Any]) -> tuple[bytes, Answer]:
    """The file, and what it answers in ONNX Runtime."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401, torch needs it
        from onnx import ModelProto
    except ImportError as error:
        raise ConfigError(
            f"--format onnx: {error.name or error} is missing; pip install 'cifar[export]', or use --format torch"
        ) from error
    weights = sum(value.nbytes for value in model.model.state_dict().values())
    if weights >= ONNX_BYTES:
        raise ConfigError(f"--format onnx: {weights / 1e9:.1f} GB of weights, one file holds 2; use --format torch")
    program = torch.onnx.export(
        *_network(model),
        input_names=["images"],
        output_names=["probabilities"],
        dynamic_shapes=_any_number(),
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    assert program is not None
    file: ModelProto = program.model_proto
    graph = file.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]  # torch's notes for debugging, with paths of this machine
    for key, value in metadata.items():
        file.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    data = file.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return data, lambda images: np.asarray(session.run(["probabilities"], {"images": images})[0])


def to_torch(model: LoadedModel, metadata: dict[str, Any]) -> tuple[bytes, Answer]:
    """The file, and what it answers when it is read back."""
    program = torch.export.export(*_network(model), dynamic_shapes=_any_number())
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # paths of this machine
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={METADATA: json.dumps(metadata)})
    file.seek(0)
    again = torch.export.load(file).module()
    return file.getvalue(), lambda images: again(torch.from_numpy(images)).numpy()


class _Probabilities(nn.Module):
    def __init__(self, model: Classifier, temperature: float):
        super().__init__()
        self.model = model
        self.temperature = temperature

    def forward(self, images: Tensor) -> Tensor:
        return (self.model(images) / self.temperature).softmax(1)


def _network(model: LoadedModel) -> tuple[nn.Module, tuple[Tensor]]:
    """What is exported, and an example of its input: two images, since one would be taken for a constant."""
    size = model.info.config.data.image_size
    # A copy, because torch saves contiguous weights alone without a warning; that costs no time when they are used.
    network = copy.deepcopy(model.model).to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
    probabilities = _Probabilities(network, model.calibration.temperature).eval().requires_grad_(False)
    return probabilities, (torch.zeros(2, 3, size, size, dtype=torch.uint8),)


def _any_number() -> dict[str, Any]:
    return {"images": {0: torch.export.Dim("N")}}


def compare(answer: Answer, model: LoadedModel) -> tuple[float, int]:
    """Largest difference from the Predictor's probabilities, without test-time augmentation, and of how many images.

    They are random ones in batches of several sizes, black, white, and each channel alone.
    """
    config = model.info.config
    plain = replace(config, model=replace(config.model, tta="none"))
    predictor = Predictor(replace(model, info=replace(model.info, config=plain)), "cpu", precision="fp32")
    size, rng = config.data.image_size, np.random.default_rng(0)
    batches = [rng.integers(0, 256, (count, 3, size, size), dtype=np.uint8) for count in BATCH_SIZES]
    colours = np.array([(0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255)], np.uint8)
    batches.append(np.tile(colours[:, :, None, None], (1, 1, size, size)))
    differences = [np.abs(answer(images) - predictor.predict(torch.from_numpy(images))).max() for images in batches]
    return float(np.max(differences)), sum(map(len, batches))
