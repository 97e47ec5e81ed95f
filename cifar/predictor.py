"""uint8 images to probabilities: the one way from a model folder to an answer. No Ray: it runs where torch runs."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from cifar.calibration import Calibration
from cifar.config import Config, ConfigError, Precision, TestTimeAugmentation
from cifar.data.decode import decode, fit_square, pixels_to_decode
from cifar.loop import autocast
from cifar.machine import available_memory, keep_freed_memory, peak_memory
from cifar.model_dir import LoadedModel, load_model

SURE = 0.75
"""Margin between the two highest probabilities below which the first answer does not stand. On CIFAR-10's val 29 % of
the images are below, and more views of the others changed the accuracy by nothing (means over 49 trained networks)."""
SURE_OF_TWO = 0.4
"""The same after two views: four more views of the 12 % below gave all that four more of the 29 % gave."""
CLOSE = 0.05
"""Margin below which an answer in bfloat16 is computed anew in float32. On CIFAR-10's val (n=12,500, five networks of
recipe `fast`) the two types chose another label for six images, all with margins below 0.005; 2 % are below this."""

LARGEST_BATCH = 500
"""Images in a batch, unless its size is asked for."""
BATCH_BYTES = 1 << 30
"""What such a batch may take of the memory: all recipes answer 500 images of 32 pixels within it."""
PLANES = 4
"""What an image takes, in widest planes. In float32 on a CPU it was 2.0 to 3.5 (n=12 networks of 32 to 224 pixels), but
5.6 for a `notebook` whose third group is the widest; in bfloat16 1.4 to 2.1 (n=4)."""
FIRST_CHANNELS = 24
"""Of `cnn`'s whitening layer."""
SMALLEST_BATCH, FASTER, REPEATS = 8, 1.05, 3
"""How `choose_batch_size` goes: its first size, by how much the next has to be faster, and timings of each."""

FEW = 8
"""Images below which all views are asked for together, whatever the batch: 8 are half as fast by the image as 64."""
TOP_K = 5
"""Classes that an answer names by default."""

Images: TypeAlias = NDArray[np.uint8] | Tensor


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What is said of one image."""

    label: str
    probability: float
    top_k: list[tuple[str, float]]
    """The likeliest classes and their probabilities, likeliest first."""
    abstained: bool
    """The probability is below the threshold that was asked for: better let a person look."""


class Predictor:
    """A loaded model on a device, with the test-time augmentation of its config.

    `model` is a model folder or what `load_model` gave. `device` is `auto` (a GPU when there is one) or any name that
    torch knows. `batch_size` bounds the memory; the number of images in a call does not. 0 takes 500, or as many as fit
    into a GiB where images are large or the network is wide; `choose_batch_size` measures. `precision` is as in
    training: by default bfloat16 where the device computes it natively, but float32 where the label hangs on it.
    Probabilities then differ from float32's by 0.001 in the mean, and by more where another view was asked for. They
    are calibrated where the folder has a calibration, or `calibration` gives another.
    """

    def __init__(
        self,
        model: LoadedModel | str | Path,
        device: str = "auto",
        batch_size: int = 0,
        precision: Precision = "auto",
        calibration: Calibration | None = None,
    ):
        loaded = model if isinstance(model, LoadedModel) else load_model(model)
        self.info = loaded.info
        self.metrics = loaded.metrics
        self.calibration = calibration or loaded.calibration
        self.batch_size = batch_size or default_batch_size(loaded.info.config)
        self.device = find_device(device)
        self.precision: Precision = precision
        if self.device.type == "cpu":
            keep_freed_memory()
        self._model = loaded.model.to(self.device).eval()
        torch.backends.cudnn.allow_tf32 = False

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the columns of every answer."""
        return self.info.classes

    @property
    def image_size(self) -> int:
        return self.info.config.data.image_size

    def predict(self, images: Images | Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """Probabilities float32 (N,C) of uint8 images: an array (N,H,W,3), a sequence of arrays (H,W,3), or a tensor
        (N,3,S,S) on any device. Arrays of other sizes than the model's are resized as its training images were."""
        if not isinstance(images, Tensor):
            images = self.fit(images)
        return self._forward(images, softmax=True)

    def decode(self, data: bytes) -> NDArray[np.uint8]:
        """The pixels (S,S,3) that the model takes of an encoded image; BadImage with the reason if there are none."""
        return decode(data, self.image_size, self.info.config.data.resize)

    def pixels_to_decode(self, data: bytes) -> int:
        """What `decode` will cost, from the image's header: pixels, 0 for what it will refuse at once."""
        return pixels_to_decode(data, self.image_size)

    def fit(self, images: NDArray[np.uint8] | Sequence[NDArray[np.uint8]]) -> NDArray[np.uint8]:
        """Images (H,W,3) of any size as one array (N,S,S,3) of the model's; ValueError for other shapes and types."""
        size = self.image_size
        if isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.shape[1:] == (size, size, 3):
            return images
        for image in images:
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                raise ValueError(f"images must be uint8 (H, W, 3), not {image.dtype} {tuple(image.shape)}")
        resize = self.info.config.data.resize
        fitted = [fit_square(np.ascontiguousarray(image), size, resize) for image in images]
        return np.stack(fitted) if fitted else np.empty((0, size, size, 3), np.uint8)

    def answers(self, probabilities: NDArray[np.float32], top_k: int = TOP_K, threshold: float = -1.0) -> list[Answer]:
        """What `predict` gave, (N,C), in words: the `top_k` likeliest classes, and an abstention below `threshold`;
        of -1 below the model's own."""
        threshold = self.calibration.threshold_or(threshold)
        places = np.argsort(-probabilities, axis=1, kind="stable")[:, : max(top_k, 1)]
        answers = []
        for row, order in zip(probabilities, places.tolist(), strict=True):
            named = [(self.classes[place], float(row[place])) for place in order]
            label, probability = named[0]
            answers.append(Answer(label=label, probability=probability, top_k=named, abstained=probability < threshold))
        return answers

    def logits(self, images: Images) -> NDArray[np.float32]:
        """Calibrated logits float32 (N,C), from which a loss is computed without the rounding of probabilities."""
        return self._forward(images, softmax=False)

    @torch.inference_mode()
    def features(self, images: Images) -> NDArray[np.float32]:
        """What the head gets, float32 (N,F): alike where the network takes images for alike."""
        self._check(images)
        kept: list[Tensor] = []
        hook = self._model.head.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].float().cpu()))
        try:
            for batch in self._batches(images):
                with autocast(self.precision, self.device):
                    self._model(batch)
        finally:
            hook.remove()
        return torch.cat(kept).numpy()

    def gradients(self, images: Tensor, classes: Tensor, against: Tensor) -> Tensor:
        """Of how far the logits of `classes` are above those of `against`, both int64 (B,), by the pixels: float32
        (B,3,S,S) like the images, which are floats in 0..255. All on the predictor's device, in one batch."""
        images = images.detach().requires_grad_()
        logits = self._model(images)
        margins = logits.gather(1, classes[:, None]) - logits.gather(1, against[:, None])
        return torch.autograd.grad(margins.sum(), images)[0]

    def choose_batch_size(self, seconds: float = 2.0) -> int:
        """Set `batch_size` to what answers fastest here, and return it. Answers stay the same but for rounding.

        8 random images are timed, then twice as many and so on, until that raises the images a second by less than 5 %,
        the next size might take more than half of the available memory (on a GPU: does not fit), or the time is up,
        which one size may exceed. Test-time augmentation is left out: it looks again at a part of the images.
        """
        stop_at = time.perf_counter() + seconds
        memory = available_memory() / 2 if self.device.type == "cpu" else math.inf
        self._images_per_second(1)  # what torch sets up but once is no image's
        image_bytes = at_least = _image_bytes(self.info.config)
        chosen, fastest, peak, count, more = 1, 0.0, peak_memory(), SMALLEST_BATCH, SMALLEST_BATCH
        while count * image_bytes <= memory:
            started_at = time.perf_counter()
            try:
                rate = self._images_per_second(count)
            except torch.OutOfMemoryError:
                break
            if rate < fastest * FASTER:
                break
            chosen, fastest = count, rate
            now = time.perf_counter()
            if now + 2 * (now - started_at) > stop_at:
                break
            # The peak does not grow while it stays below an earlier one of this process.
            grown, peak = peak_memory() - peak, peak_memory()
            image_bytes = max(grown / more, at_least)
            count, more = 2 * count, count
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.batch_size = chosen
        return chosen

    @torch.inference_mode()
    def _images_per_second(self, count: int) -> float:
        """Of the plain forward pass of `count` random images, from this machine's memory and back."""
        shape = (count, self.image_size, self.image_size, 3)
        images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, np.uint8)).permute(0, 3, 1, 2)
        self._model(images.to(self.device))  # in float32, as close answers are computed anew: all may be close
        seconds = []
        for _ in range(REPEATS):
            started_at = time.perf_counter()
            with autocast(self.precision, self.device):
                self._model(images.to(self.device)).softmax(1).cpu()
            seconds.append(time.perf_counter() - started_at)
        return count / min(seconds)

    @torch.inference_mode()
    def _forward(self, images: Images, softmax: bool) -> NDArray[np.float32]:
        self._check(images)
        answers = np.empty((len(images), len(self.classes)), dtype=np.float32)
        start = 0
        for batch in self._batches(images):
            logits = self._logits(batch) / self.calibration.temperature
            answers[start : start + len(batch)] = (logits.softmax(1) if softmax else logits).cpu().numpy()
            start += len(batch)
        return answers

    def _logits(self, images: Tensor) -> Tensor:
        tta = self.info.config.model.tta
        with autocast(self.precision, self.device):
            logits = mean_logits(self._ask, images, tta)
            reduced = torch.is_autocast_enabled(self.device.type)
        if reduced and len(close := _below(CLOSE, logits)):
            logits = logits.index_copy(0, close, mean_logits(self._ask, images[close], tta))
        return logits

    def _ask(self, images: Tensor) -> Tensor:
        """The network's logits (B,C), the same for an image whatever comes with it.

        Alone an image is computed by other kernels: in bfloat16 one of 256 probabilities differed, by 6e-5. Twice in a
        batch it takes 15 % longer, and does not.
        """
        if len(images) == 1 and torch.is_autocast_enabled(self.device.type):
            return self._model(torch.cat([images, images]))[:1]
        return self._model(images)

    def _batches(self, images: Images) -> Iterator[Tensor]:
        """uint8 (B,3,S,S) on the device."""
        for start in range(0, len(images), self.batch_size):
            batch = images[start : start + self.batch_size]
            if not isinstance(batch, Tensor):
                # Arrow's zero-copy arrays are read-only, which torch warns about: such a batch is copied.
                batch = torch.from_numpy(np.require(batch, requirements=["C", "W"])).permute(0, 3, 1, 2)
            yield batch.to(self.device)

    def _check(self, images: Images) -> None:
        size = self.image_size
        expected = (3, size, size) if isinstance(images, Tensor) else (size, size, 3)
        if tuple(images.shape[1:]) != expected or images.dtype not in (torch.uint8, np.uint8):
            shape = ", ".join(map(str, ("N", *expected)))
            raise ValueError(f"images must be uint8 ({shape}), not {images.dtype} {tuple(images.shape)}")


def default_batch_size(config: Config) -> int:
    """500 images, or as many as a GiB of memory answers at once; at least 1."""
    return max(1, min(LARGEST_BATCH, BATCH_BYTES // _image_bytes(config)))


def _image_bytes(config: Config) -> int:
    """What an image of a batch takes in float32: some of the widest planes (C,H,W) that the network makes of it."""
    widths = config.model.widths
    sides = [max(config.data.image_size >> place, 1) for place in range(len(widths))]
    channels = [max(widths[0], FIRST_CHANNELS), *widths[1:]]
    return PLANES * 4 * max(count * side**2 for count, side in zip(channels, sides, strict=True))


def mean_logits(model: Callable[[Tensor], Tensor], images: Tensor, tta: TestTimeAugmentation) -> Tensor:
    """Logits (B,C) of uint8 images (B,3,S,S): for those of which the network is unsure, the mean over several views.

    The views are those of airbench (Jordan 2024, arXiv 2404.00498): the image and its mirror image; `shift` gives these
    a half of the weight, and a quarter each to the same a pixel towards two opposite corners, the border mirrored. To
    ask for views of unsure images alone is the idea of hiverge's cifar10-speedrun (2025).
    """
    logits = model(images)
    if tta == "none" or not len(unsure := _below(SURE, logits)):
        return logits
    images = images[unsure]
    means = (logits[unsure] + model(images.flip(-1))) / 2
    logits = logits.index_copy(0, unsure, means)
    if tta == "mirror" or not len(still := _below(SURE_OF_TWO, means)):
        return logits
    images, size = images[still], images.shape[-1]
    padded = F.pad(images.float(), (1, 1, 1, 1), mode="reflect")
    corners = [padded[..., :size, :size], padded[..., 2:, 2:]]
    views = [view for corner in corners for view in (corner, corner.flip(-1))]
    # Few images at a time leave a processor idle, so the views of a few go together; of many they need the memory.
    together = len(views) * len(images) <= len(logits) or len(images) < FEW
    found = model(torch.cat(views)).chunk(len(views)) if together else map(model, views)
    answers = means[still] / 2
    for answer in found:
        answers = answers + answer / 8
    return logits.index_copy(0, unsure[still], answers)


def _below(margin: float, logits: Tensor) -> Tensor:
    """int64 (n,): rows whose two highest probabilities are less than `margin` apart. Waits for the device."""
    highest = logits.softmax(1).topk(min(2, logits.shape[1])).values
    return (highest[:, 0] - highest[:, -1] < margin).nonzero()[:, 0]


def find_device(name: str = "auto") -> torch.device:
    """`auto`: the first GPU, else the CPU; ConfigError for a device that this machine does not have."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device {name}: not available here ({reason}); use auto or cpu") from error
    return device
