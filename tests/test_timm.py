"""timm's networks: the same way as torchvision's, from training to an answer, where the extra is installed."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cifar.config import Config, ConfigError, DataConfig, ModelConfig, OptimConfig, TransferConfig
from cifar.evaluate import evaluate
from cifar.models import build_model
from cifar.models.zoo import check_zoo
from cifar.predictor import Predictor
from cifar.train import fit

timm = pytest.importorskip("timm")


def config_of(name: str, size: int, **model: object) -> Config:
    return Config(data=DataConfig(image_size=size), model=ModelConfig(model=f"timm/{name}", **model))  # pyright: ignore


@pytest.mark.parametrize(
    ("name", "small"),
    [
        ("resnet18", "3x3 with stride 1"),
        ("vit_tiny_patch16_224", "4x4 with stride 4"),
        ("convnext_atto", "2x2 with stride 2"),
        ("mobilenetv3_small_050", "3x3 with stride 1"),
        ("efficientnet_b0", "3x3 with stride 1"),
        ("swin_tiny_patch4_window7_224", "2x2 with stride 2"),
    ],
)
def test_they_are_fitted_to_small_images(name: str, small: str) -> None:
    assert check_zoo(config_of(name, 32), 5, [32]).endswith(f"first layer {small}")
    assert not check_zoo(config_of(name, 224), 5, [224]).endswith(f"first layer {small}")
    network = build_model(config_of(name, 32), 5, (120.0, 110.0, 100.0), (60.0, 61.0, 62.0)).eval()
    assert network(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 5)
    assert len(network.blocks) > 4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "vit_tiny_patch16_224"])
def test_they_train_save_load_and_answer(here: Config, name: str) -> None:
    config = replace(
        here,
        model=ModelConfig(model=f"timm/{name}", tta="none"),
        optim=OptimConfig(optimizer="adamw", lr=1e-3),
        train=replace(here.train, epochs=2),
    )
    run = fit(config)
    assert Path(run.path).name.startswith(f"parquet0-timm-{name}-")
    predictor = Predictor(run.model, "cpu", precision="fp32")
    assert evaluate(predictor, run.prepared, "val").accuracy == pytest.approx(run.history[-1]["val_accuracy"], abs=0.1)
    assert fit(config).history == run.history


def test_weights_of_timm_by_their_own_names(here: Config, tmp_path: Path) -> None:
    theirs = timm.create_model("mobilenetv3_small_050")
    save_file(
        {name: value.contiguous() for name, value in theirs.state_dict().items()}, tmp_path / "theirs.safetensors"
    )
    run = fit(
        replace(
            here,
            model=ModelConfig(model="timm/mobilenetv3_small_050", tta="none"),
            transfer=TransferConfig(weights=str(tmp_path / "theirs.safetensors"), train_blocks=0),
            optim=OptimConfig(optimizer="adamw", lr=1e-3),
            train=replace(here.train, epochs=1),
        )
    )
    found = load_file(Path(run.model) / "model.safetensors")
    assert torch.equal(
        found["network.body.blocks.0.0.conv_dw.weight"], theirs.state_dict()["blocks.0.0.conv_dw.weight"]
    )


def test_what_cannot_be_had_is_one_clear_error(here: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--model timm/resnet19: timm has no such network; use timm/resnet"):
        fit(replace(here, model=ModelConfig(model="timm/resnet19")))
    with pytest.raises(ConfigError, match=r"--model 'timm/\.\./x'"):
        ModelConfig(model="timm/../x")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    pretrained = replace(
        here,
        model=ModelConfig(model="timm/mobilenetv3_small_050", tta="none"),
        transfer=TransferConfig(pretrained=True),
        optim=OptimConfig(optimizer="adamw"),
    )
    with pytest.raises(ConfigError, match=r"--pretrained: the weights of timm/mobile.* name the file by --weights"):
        fit(pretrained)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"--model timm/resnet18: timm is missing; pip install 'cifar\[timm\]'"):
        fit(replace(here, model=ModelConfig(model="timm/resnet18", tta="none")))
