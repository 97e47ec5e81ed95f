"""What a training step changes: built at step 0, compiled, written to a checkpoint and read from one."""

import copy
import dataclasses
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from cifar import transfer
from cifar.augment import derive_seed
from cifar.balance import image_losses_of
from cifar.config import Config
from cifar.context import Context
from cifar.data.loader import Batch, Loader
from cifar.data.prepared import Prepared
from cifar.distill import Teacher, load_teacher
from cifar.loop import epoch_size, train_epoch
from cifar.metrics import Totals
from cifar.model_dir import ModelInfo, save_model
from cifar.models import Classifier, build_model
from cifar.models.empty import EmptyParameters
from cifar.models.zoo import check_zoo
from cifar.optim import Averager, build_averager, build_optimizer
from cifar.selection import Selection

COMPILE_STEPS = 3
"""Steps at each size before the clock starts: CUDA graphs warm up, record and play."""
WHITENING_SAMPLE = 500
"""Images whose patches set the first layer of `cnn`: half a million patches of 12 numbers fix a 12 x 12 covariance."""


@dataclass(kw_only=True)
class Position:
    """Where a run is; goes into the checkpoint beside the tensors."""

    epoch: int = 0
    step: int = 0
    """Optimizer steps done in this epoch."""
    sums: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Loss, correct and count of this epoch so far, over all workers."""
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    train_seconds: float = 0.0
    """Wall time of training, validation and checkpoints, over all attempts; without compilation."""
    best_accuracy: float = -1.0
    """Of val; with --balance exp(-loss) over the classes."""
    epochs_without_gain: int = 0
    stopped: str = ""
    """Why training ended, or empty while it goes on."""


@dataclass(kw_only=True)
class Training:
    """The tensors that a step changes."""

    network: Classifier
    model: nn.Module
    """The network, or its compiled or distributed wrapper."""
    optimizer: torch.optim.Optimizer
    averager: Averager | None
    selection: Selection | None
    teacher: Teacher | None

    @property
    def evaluated(self) -> Classifier:
        """The network whose accuracy counts: the averaged one where there is one."""
        return self.network if self.averager is None else self.averager.model  # pyright: ignore[reportReturnType]

    def state_dict(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "averager": self.averager.state_dict() if self.averager else {},
            "selection": self.selection.state_dict() if self.selection else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        # Rates and such are the config's: a trial may go on from another one's checkpoint with its own.
        groups = [dict(group) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, configured in zip(self.optimizer.param_groups, groups, strict=True):
            group.update({name: value for name, value in configured.items() if name != "params"})
        if self.averager is not None:
            self.averager.load_state_dict(state["averager"])
        if self.selection is not None:
            self.selection.load_state_dict(state["selection"])


def epoch_sizes(config: Config) -> set[int]:
    """Sides in pixels of the images that the network gets, in training and afterwards."""
    trained = {epoch_size(config.train, config.data.image_size, epoch) for epoch in range(config.train.epochs)}
    return trained | {config.data.image_size}


def check_network(config: Config, prepared: Prepared) -> list[str]:
    """What will be trained, and what it starts from; ConfigError if it can't take the images or the weights."""
    lines = []
    if config.model.from_zoo:
        lines.append(check_zoo(config, len(prepared.classes), epoch_sizes(config)))
    if start := transfer.find_start(config):
        with EmptyParameters():
            network = build_model(config, len(prepared.classes), prepared.mean, prepared.std)
        lines.append(transfer.describe(network, start))
    if load_teacher(config, prepared, torch.device("cpu")) is not None:
        lines.append(f"teacher: {config.distill.teacher}")
    return lines


def build_training(config: Config, prepared: Prepared, loader: Loader, context: Context) -> Training:
    """Network, optimizer and average at step 0; rank 0's weights are everyone's."""
    torch.manual_seed(derive_seed(config.train.seed, "weights"))
    network = build_model(config, len(prepared.classes), prepared.mean, prepared.std).to(context.device)
    network.init_from(loader.sample(WHITENING_SAMPLE))
    transfer.begin(network, config, load=context.rank == 0 and context.checkpoint is None)
    if context.world_size > 1:
        for tensor in network.state_dict().values():
            dist.broadcast(tensor, 0)
    averager = build_averager(network, config.optim)
    model: nn.Module = network
    if config.train.compile:
        # Static shapes: a resumed run compiles each size as the first run did. CUDA graphs spare a GPU the launches.
        # Not with micro-batches: the next one's graph may overwrite the gradients that the last one left.
        graphs = context.device.type == "cuda" and context.world_size == 1 and config.optim.accumulate == 1
        sizes = epoch_sizes(config)
        # Beyond the limit, 8 shapes, torch would run the others uncompiled.
        limits = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, len(sizes) + 1)
        model = torch.compile(network, dynamic=False, mode="reduce-overhead" if graphs else None)  # pyright: ignore
    if context.world_size > 1:
        # Looking for unused parameters keeps DDP from sorting its buckets anew after the first step, whereupon three or
        # more workers would add up gradients in another order than after a resume.
        # Batch norm's statistics are shared where they are used, before each evaluation.
        model = nn.parallel.DistributedDataParallel(
            model, gradient_as_bucket_view=True, find_unused_parameters=True, forward_sync_buffers=False
        )
    rates = transfer.rates(network, config.transfer)
    optimizer = build_optimizer(network, config.optim, config.train.batch_size, rates)
    selection = None
    if config.train.skip_easy and loader.chooses:
        num_images = sum(prepared.counts.values()) + prepared.quarantined  # as many as the source numbers
        selection = Selection(num_images, context.device)
    return Training(
        network=network,
        model=model,
        optimizer=optimizer,
        averager=averager,
        selection=selection,
        teacher=load_teacher(config, prepared, context.device),
    )


def compile_ahead(
    config: Config,
    training: Training,
    loader: Loader,
    context: Context,
    epochs: range,
    num_classes: int,
    augmented: bool,
) -> None:
    """Compile the network at every size that these epochs train at, by steps whose effects are then undone."""
    before = copy.deepcopy(training.state_dict())
    per_worker = config.train.batch_size // context.world_size
    sample = loader.sample(per_worker).permute(0, 2, 3, 1)  # fewer where the worker's share is smaller
    indices = torch.arange(per_worker, device=context.device)
    images = sample[indices % len(sample)].permute(0, 3, 1, 2)  # in the memory order of a loader's batch
    batch = Batch(images, torch.zeros_like(indices), indices, indices)
    for epoch in {epoch_size(config.train, config.data.image_size, epoch): epoch for epoch in epochs}.values():
        train_epoch(
            training.model,
            training.optimizer,
            None,
            [batch] * COMPILE_STEPS,
            config,
            epoch=epoch,
            start=0,
            first_step=0,
            total_steps=COMPILE_STEPS,
            num_classes=num_classes,
            rank=context.rank,
            totals=Totals.zeros(context.device),
            selection=None,
            teacher=None,
            image_losses=image_losses_of(config, [1] * num_classes, context.device),
            augmented=augmented,
            after_step=lambda steps_done: False,
        )
    training.load_state_dict(before)


def save_checkpoint(config: Config, prepared: Prepared, training: Training, position: Position) -> Path:
    """Write `model/`, `state.pt` and `position.json` to a new local folder, and return it."""
    folder = Path(tempfile.mkdtemp(prefix="cifar-checkpoint-"))
    metrics = dict(position.history[-1]) if position.history else {}
    save_model(folder / "model", training.evaluated, model_info(config, prepared, training.network), metrics)
    torch.save(training.state_dict(), folder / "state.pt")
    (folder / "position.json").write_text(json.dumps(dataclasses.asdict(position)))
    return folder


def load_checkpoint(folder: Path, training: Training) -> Position:
    """Put the checkpoint's tensors in place and return its position; reads no pickled code."""
    training.load_state_dict(torch.load(folder / "state.pt", map_location="cpu", weights_only=True))
    values = json.loads((folder / "position.json").read_text())
    return Position(**values | {"sums": tuple(values["sums"])})


def model_info(config: Config, prepared: Prepared, network: Classifier) -> ModelInfo:
    mean, std = prepared.mean, prepared.std
    if config.transfer.starts:  # with the normalisation of what it starts from
        (mean, std) = (tuple(value.flatten().tolist()) for value in (network.normalize.mean, network.normalize.std))
    return ModelInfo(
        config=config,
        classes=prepared.classes,
        mean=mean,
        std=std,
        fingerprint=prepared.fingerprint,
        source=prepared.source,
    )
