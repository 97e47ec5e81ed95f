"""Networks of torchvision: each fits the data, and goes all the way from training to an answer over HTTP."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient
from torch import nn
from torchvision import models

from cifar.config import Config, ConfigError, DataConfig, ModelConfig, OptimConfig, TrainConfig
from cifar.evaluate import evaluate
from cifar.model_dir import ModelInfo, load_model, save_model
from cifar.models import Classifier, build_model
from cifar.models.empty import EmptyParameters
from cifar.models.zoo import SMALL_IMAGE, check_zoo, zoo_names
from cifar.predictor import Predictor
from cifar.serve.app import make_app
from cifar.serve.config import ServeConfig
from cifar.serve.service import Service
from cifar.train import fit
from tests.images import png

FAMILIES = (
    *("resnet18", "wrn_10_2", "densenet121", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0"),
    *("vit_b_16", "convnext_tiny", "swin_t", "regnet_x_400mf", "shufflenet_v2_x0_5", "squeezenet1_1", "googlenet"),
)
MEAN, STD = (120.0, 110.0, 100.0), (60.0, 61.0, 62.0)


def config_of(name: str, size: int, **model: Any) -> Config:
    return Config(data=DataConfig(image_size=size), model=ModelConfig(model=name, **model))


def build(config: Config) -> Classifier:
    torch.manual_seed(0)
    return build_model(config, 5, MEAN, STD)


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("name", zoo_names())
def test_each_network_takes_small_images_and_photographs(name: str, size: int) -> None:
    if size == 32 and name in ("inception_v3", "maxvit_t"):
        with pytest.raises(ConfigError, match=f"--image-size 32: {name} cannot take it .*; use --image-size 224"):
            check_zoo(config_of(name, size), 5, [size])
        return
    assert re.search(r": \d+\.\d million weights", check_zoo(config_of(name, size), 5, [size]))


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "mobilenet_v2", "shufflenet_v2_x0_5"])
def test_small_images_keep_their_plane_through_the_first_layers(name: str) -> None:
    """The plane is four or two times as large as through the network's own first layers, and its last one too."""

    def last_plane(stem: str) -> int:
        planes: list[torch.Size] = []
        network = build(config_of(name, 32, stem=stem)).eval()
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda module, inputs, output: planes.append(output.shape))
        network(torch.zeros(1, 3, 32, 32))
        return planes[-1][-1]

    factor = 2 if name == "mobilenet_v2" else 4
    assert last_plane("small") == last_plane("auto") == factor * last_plane("original")


def test_photographs_get_the_network_of_torchvision() -> None:
    """Bit for bit, but for normalisation and head."""
    network = build(config_of("resnet18", SMALL_IMAGE + 32)).eval()
    torch.manual_seed(0)
    theirs = models.resnet18(num_classes=5).eval()
    body, head = network.network.body, network.head  # pyright: ignore
    theirs.fc = nn.Identity()  # pyright: ignore
    theirs.load_state_dict(body.state_dict())  # pyright: ignore
    images = torch.rand(2, 3, 96, 96) * 255
    torch.testing.assert_close(network(images), head(theirs(network.normalize(images))))


def test_a_vision_transformer_cuts_small_images_into_small_patches() -> None:
    body: Any = build(config_of("vit_b_16", 32)).network.body  # pyright: ignore
    assert (body.conv_proj.kernel_size, body.seq_length) == ((4, 4), 65)


def test_wide_resnets_have_the_weights_of_the_paper() -> None:
    """36.5 million for WRN-28-10 and 11.0 for WRN-16-8 (Zagoruyko and Komodakis 2016, table 4)."""
    for name, millions in (("wrn_28_10", 36.5), ("wrn_16_8", 11.0)):
        assert check_zoo(config_of(name, 32), 10, [20, 32]).startswith(f"{name}: {millions} million")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet19", "--model resnet19: no such network; use resnet1"),
        ("wrn_17_8", "--model wrn_17_8: no such network; use wrn_16_8"),
        ("qqq", "--model qqq: no such network; use resnet18"),
    ],
)
def test_an_unknown_name_leads_to_near_ones(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(config_of(name, 32))


def test_a_size_that_a_network_cannot_take_is_refused_before_training(here: Config) -> None:
    config = replace(here, model=ModelConfig(model="vit_b_16"), train=replace(here.train, scales=(0.5, 1.0)))
    with pytest.raises(ConfigError, match=r"--scales: images of 8 pixels: vit_b_16 cannot take it .*use --scales 1"):
        fit(config)
    assert not Path(here.run.storage).exists()
    with pytest.raises(ConfigError, match="--image-size 100: vit_b_16 cannot take it"):
        build(config_of("vit_b_16", 100))


def test_a_model_loads_as_it_was_saved(tmp_path: Path) -> None:
    """Buffers that are no weights, too: Swin has tables of positions."""
    config = config_of("swin_v2_t", 32)
    model = build(config).eval()
    info = ModelInfo(config=config, classes=tuple("abcde"), mean=MEAN, std=STD, fingerprint="f", source="digits")
    save_model(tmp_path / "model", model, info, {})
    loaded = load_model(tmp_path / "model").model
    assert not any(tensor.is_meta for tensor in (*loaded.parameters(), *loaded.buffers()))
    images = torch.rand(2, 3, 32, 32) * 255
    torch.testing.assert_close(loaded(images), model(images))
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]


def test_an_empty_network_holds_no_weights() -> None:
    with EmptyParameters():
        network = build_model(config_of("regnet_y_400mf", 32), 5, MEAN, STD)
    assert all(parameter.is_meta for parameter in network.parameters() if parameter.numel() > 1000)
    assert not torch.empty(1).is_meta


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_goes_from_training_to_an_answer(name: str, here: Config, tmp_path: Path) -> None:
    config = replace(
        here,
        model=ModelConfig(model=name),
        optim=OptimConfig(optimizer="sgd", lr=0.01),
        train=TrainConfig(epochs=1, batch_size=198, precision="fp32"),  # two steps
    )
    run = fit(config)
    assert [row["step"] for row in run.history] == [2]
    predictor = Predictor(run.model, "cpu", precision="fp32")
    evaluation = evaluate(predictor, run.prepared, "test")
    assert evaluation.count == 60
    service = Service(ServeConfig(model=run.model, store=str(tmp_path / "store"), device="cpu", precision="fp32"))
    with TestClient(make_app(service)) as client:
        body = client.post("/predict", content=png(0, 16), headers={"content-type": "image/png"}).json()
    expected = predictor.predict([predictor.decode(png(0, 16))])[0]
    assert body["predictions"][0]["probability"] == pytest.approx(float(expected.max()), abs=1e-5)
