"""Transfer learning: what is loaded, what is frozen, and what trains at which rate."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch import nn
from torchvision import models

from cifar import transfer
from cifar.checkpoints import Checkpoints
from cifar.config import Config, ConfigError, DataConfig, ModelConfig, OptimConfig, TransferConfig
from cifar.evaluate import evaluate
from cifar.local import LocalContext
from cifar.model_dir import load_model
from cifar.models import Classifier, build_model
from cifar.optim import build_optimizer
from cifar.predictor import Predictor
from cifar.train import Run, fit
from tests.images import encode

MEAN, STD = (120.0, 110.0, 100.0), (60.0, 61.0, 62.0)
MOBILENET = Config(data=DataConfig(image_size=32), model=ModelConfig(model="mobilenet_v2"))


def build(config: Config = MOBILENET, num_classes: int = 5) -> Classifier:
    torch.manual_seed(0)
    return build_model(config, num_classes, MEAN, STD)


def transferring(config: Config, **values: Any) -> Config:
    """A run of two epochs of nine steps."""
    return replace(
        config,
        model=ModelConfig(model="mobilenet_v2"),
        transfer=TransferConfig(**values),
        optim=OptimConfig(optimizer="adam", lr=0.001),
        train=replace(config.train, epochs=2),
    )


def weights_of(run: Run) -> dict[str, torch.Tensor]:
    return load_file(Path(run.model) / "model.safetensors")


def save_weights(folder: Path, network: nn.Module) -> Path:
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, folder / "given.safetensors")
    return folder / "given.safetensors"


def test_the_last_three_blocks_of_mobilenet_are_keras_last_twenty_layers() -> None:
    """Of Keras' 20: block_15 of 9, block_16 of 8, and the last convolution with its norm and ReLU."""
    network = build()
    assert len(network.blocks) == 19
    frozen = {id(parameter) for parameter in network.freeze(3)}
    kept = [name for name, parameter in network.body.named_parameters() if id(parameter) not in frozen]
    assert {name.split(".")[1] for name in kept} == {"16", "17", "18"}


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "vit_b_16", "convnext_tiny", "swin_t", "wrn_10_1"])
def test_every_weight_of_a_body_is_frozen_or_trains(name: str) -> None:
    network = build(replace(MOBILENET, model=ModelConfig(model=name)))
    counts = [len(network.freeze(trained)) for trained in range(len(network.blocks) + 1)]
    assert counts[0] == len(list(network.body.parameters()))
    assert counts[-1] == 0
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) == len(counts)


@pytest.mark.parametrize("trained", [0, 3])
def test_frozen_blocks_stay_as_they_were_and_so_do_their_statistics(here: Config, tmp_path: Path, trained: int) -> None:
    given = save_weights(tmp_path, build(num_classes=4))
    run = fit(transferring(here, weights=str(given), train_blocks=trained))
    before, after = load_file(given), weights_of(run)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    blocks = {name.split(".")[3] for name in changed if "head" not in name and "normalize" not in name}
    assert blocks == {"16", "17", "18"} if trained else not blocks
    assert "network.head.weight" in changed


def test_blocks_are_set_free_one_by_one(here: Config, tmp_path: Path) -> None:
    given = save_weights(tmp_path, build(num_classes=4))
    run = fit(transferring(here, weights=str(given), unfreeze_epochs=1))
    before, after = load_file(given), weights_of(run)
    changed = {name.split(".")[3] for name in after if "body" in name and not torch.equal(after[name], before[name])}
    assert changed <= {"18"}, "the last block in the second epoch"
    last = Checkpoints(f"{run.path}/checkpoints").last()
    assert last is not None
    final = load_file(last / "model/model.safetensors")
    assert not torch.equal(final["network.body.features.18.0.weight"], before["network.body.features.18.0.weight"])


def test_what_is_set_free_is_the_same_after_a_resume(here: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout within the network, too: its draws are the step's."""
    config = transferring(here, unfreeze_epochs=1)
    whole = fit(replace(config, run=replace(config.run, name="whole")))
    report = LocalContext.report

    def break_off(self: LocalContext, metrics: dict[str, Any], checkpoint: Path | None) -> None:
        report(self, metrics, checkpoint)
        raise KeyboardInterrupt

    config = replace(config, run=replace(config.run, name="parts"))
    with monkeypatch.context() as patch:
        patch.setattr(LocalContext, "report", break_off)
        with pytest.raises(KeyboardInterrupt):
            fit(config)
    resumed = fit(config)
    assert [row["val_loss"] for row in resumed.history] == [row["val_loss"] for row in whole.history]
    assert all(torch.equal(value, weights_of(resumed)[name]) for name, value in weights_of(whole).items())


def test_each_block_learns_slower_than_the_one_behind_it() -> None:
    network = build()
    config = TransferConfig(layer_decay=0.5)
    optimizer = build_optimizer(
        network, OptimConfig(optimizer="adamw", lr=0.1, weight_decay=0.01), 1, transfer.rates(network, config)
    )
    rate = {id(p): group["peak_lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rate[id(network.head.weight)] == 0.1
    for behind, block in enumerate(reversed(network.blocks), 1):
        found = {rate[id(parameter)] for module in block for parameter in module.parameters()}
        assert list(found) == [pytest.approx(0.1 * 0.5**behind)]
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert all(decays[id(p)] == (0.01 if p.ndim > 1 else 0) for p in network.parameters())


def test_weights_of_torchvision_by_their_own_names(here: Config, tmp_path: Path) -> None:
    theirs = models.mobilenet_v2(num_classes=1000)
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "theirs.pth")
    config = transferring(here, weights=str(tmp_path / "theirs.pth"), train_blocks=0)
    after = weights_of(fit(config))
    assert torch.equal(
        after["network.body.features.3.conv.0.0.weight"], theirs.state_dict()["features.3.conv.0.0.weight"]
    )


def test_a_model_folder_goes_on_to_other_classes(here: Config, caplog: pytest.LogCaptureFixture) -> None:
    """With the normalisation that its weights know."""
    first = fit(replace(transferring(here), run=replace(here.run, name="first")))
    info = load_model(first.model).info
    start = transfer.find_start(replace(MOBILENET, transfer=TransferConfig(weights=first.model)))
    assert start is not None
    text = transfer.describe(build(num_classes=7), start)
    assert text.endswith("; network.head.weight, network.head.bias begin anew")
    with caplog.at_level("INFO", "cifar"):
        second = fit(transferring(here, weights=first.model, train_blocks=0))
    assert f"tensors of {first.model}" in caplog.text
    assert load_model(second.model).info.mean == pytest.approx(info.mean)


def test_weights_that_will_not_do_are_refused_before_training(here: Config, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "ran").touch, ())

    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Attack()))
    torch.save({"a": Attack()}, tmp_path / "evil2.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    torch.save(models.resnet18().state_dict(), tmp_path / "resnet.pth")
    for name, message in (
        ("none.pth", "not found"),
        ("evil.pth", "neither safetensors nor"),
        ("evil2.pth", "neither safetensors nor"),
        ("list.pth", "holds more than tensors by name"),
        ("resnet.pth", r"none of its 122 tensors fits; give its --model"),
    ):
        with pytest.raises(ConfigError, match=f"--weights {tmp_path / name}: {message}"):
            fit(transferring(here, weights=str(tmp_path / name)))
    assert not Path(here.run.storage).exists()
    assert not (tmp_path / "ran").exists()


def test_pretrained_weights_come_from_the_hub_cache(
    here: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    config = transferring(here, pretrained=True, train_blocks=0)
    with pytest.raises(ConfigError, match="cannot be fetched") as refused:
        fit(config)
    (place,) = [Path(word.rstrip(",")) for word in str(refused.value).split() if word.startswith(str(tmp_path))]
    theirs = models.mobilenet_v2()
    place.parent.mkdir(parents=True, exist_ok=True)
    torch.save(theirs.state_dict(), place)
    run = fit(config)
    assert torch.equal(weights_of(run)["network.body.features.0.0.weight"], theirs.state_dict()["features.0.0.weight"])
    assert load_model(run.model).info.mean == pytest.approx((123.675, 116.28, 103.53))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"transfer": TransferConfig(pretrained=True)}, "--pretrained .*cnn; use a --model of torchvision's"),
        ({"transfer": TransferConfig(layer_decay=0.9)}, "--optimizer muon: .*use adamw or sgd"),
        ({"transfer": TransferConfig(unfreeze_epochs=2)}, "--optimizer muon: .*use adamw or sgd"),
    ],
)
def test_what_cannot_go_together_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config(**values)


@pytest.mark.slow
def test_transfer_from_half_of_the_classes_to_the_other_beats_training_from_scratch(
    here: Config, tmp_path: Path
) -> None:
    """At equal steps, by every seed: MobileNetV2 on the digits 0 to 4, then on 5 to 9."""
    low, high = (str(write_digits(tmp_path / str(first), range(first, first + 5))) for first in (0, 5))
    config = replace(
        here,
        data=DataConfig(image_size=16),
        augment=replace(here.augment, flip="none", crop_padding=1),
        model=ModelConfig(model="mobilenet_v2", tta="none"),
        optim=OptimConfig(optimizer="adam", lr=2e-3),
        train=replace(here.train, epochs=8, batch_size=32, scales=(1.0,)),
    )
    config = replace(config, data=replace(config.data, data=low), run=replace(config.run, name="low"))
    start = fit(config)
    assert start.history[-1]["val_accuracy"] > 0.8
    config = replace(config, data=replace(config.data, data=high), train=replace(config.train, epochs=2))
    for seed in (1, 2, 3):
        found = {}
        for name, weights in (("scratch", ""), ("transfer", start.model)):
            run = fit(
                replace(
                    config,
                    transfer=TransferConfig(weights=weights),
                    train=replace(config.train, seed=seed),
                    run=replace(config.run, name=f"{name}-{seed}"),
                )
            )
            test = evaluate(Predictor(run.model, "cpu"), run.prepared).accuracy
            # Train too: in a fresh network batch norm's statistics, which test goes by, lag behind so early.
            found[name] = np.array([test, run.history[-1]["train_accuracy"]])
        assert (found["transfer"] > found["scratch"] + 0.1).all()


def write_digits(folder: Path, labels: range) -> Path:
    """scikit-learn's digits of these labels, as Parquet with `img` and `label`."""
    digits: Any = load_digits()
    rows = [
        {"img": encode(Image.fromarray((image * 15.9).astype(np.uint8)).resize((16, 16))), "label": str(label)}
        for image, label in zip(digits.images, digits.target, strict=True)
        if label in labels
    ]
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), folder / "digits.parquet")
    return folder
