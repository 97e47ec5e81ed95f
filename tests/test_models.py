"""Networks: shapes, normalisation inside, whitening, and the folder that carries them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cifar.config import Config, ConfigError, DataConfig, ModelConfig
from cifar.model_dir import ModelInfo, load_model, model_card, save_model
from cifar.models import Classifier, build_model
from cifar.models.cnn import ConvGroup
from cifar.models.cpu import Conv3x3, max_pool

MEAN, STD = (120.0, 110.0, 100.0), (60.0, 61.0, 62.0)
CNN = Config(model=ModelConfig(widths=(8, 16, 16)))
DEEP = Config(model=ModelConfig(widths=(8, 16, 16), depths=(2, 3, 4)))
NOTEBOOK = Config(model=ModelConfig(model="notebook", widths=(8, 16), dropout=0.2))


def images(count: int = 4, size: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def build(config: Config) -> Classifier:
    torch.manual_seed(0)
    return build_model(config, 5, MEAN, STD)


@pytest.mark.parametrize("config", [CNN, DEEP, NOTEBOOK], ids=["cnn", "deep", "notebook"])
def test_uint8_in_logits_out(config: Config) -> None:
    logits = build(config)(images())
    assert logits.shape == (4, 5)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()


@pytest.mark.parametrize("config", [CNN, DEEP, NOTEBOOK], ids=["cnn", "deep", "notebook"])
def test_normalisation_is_inside(config: Config) -> None:
    """uint8 images and the same values as float give the same logits."""
    model = build(config).eval()
    torch.testing.assert_close(model(images()), model(images().float()))
    normalized = model.normalize(torch.tensor(MEAN).view(1, 3, 1, 1) + torch.tensor(STD).view(1, 3, 1, 1))
    torch.testing.assert_close(normalized, torch.ones(1, 3, 1, 1))


@pytest.mark.parametrize("size", [8, 20, 32, 48])
def test_cnn_takes_any_size_down_to_8(size: int) -> None:
    assert build(CNN)(images(size=size)).shape == (4, 5)


@pytest.mark.parametrize("config", [CNN, DEEP, NOTEBOOK], ids=["cnn", "deep", "notebook"])
def test_every_trainable_parameter_gets_a_gradient(config: Config) -> None:
    model = build(config)
    model(images()).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_a_group_of_three_convolutions_has_a_shortcut() -> None:
    """Without what its later convolutions give, the group still passes on what its first one gave."""
    group = ConvGroup(4, 8, depth=3).eval()
    features = torch.rand(2, 4, 8, 8)
    torch.nn.init.zeros_(group.convs[2].weight)  # pyright: ignore[reportArgumentType]
    first = torch.nn.functional.silu(group.norms[0](torch.nn.functional.max_pool2d(group.convs[0](features), 2)))
    torch.testing.assert_close(group(features), torch.nn.functional.silu(first))
    plain = ConvGroup(4, 8, depth=2).eval()
    torch.nn.init.zeros_(plain.convs[1].weight)  # pyright: ignore[reportArgumentType]
    assert not plain(features).any()


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 3), (1, 3), (3, 2)])
def test_convolution_of_a_tiny_plane_is_the_convolution(size: tuple[int, int]) -> None:
    """Result and both gradients, in exact arithmetic; in bf16 as far as its rounding lets."""
    torch.manual_seed(0)
    plain, conv = nn.Conv2d(4, 6, 3, padding="same", bias=False).double(), Conv3x3(4, 6).double()
    conv.load_state_dict(plain.state_dict())
    features = torch.randn(5, 4, *size, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(5, 6, *size, dtype=torch.float64)

    def result_and_gradients(module: nn.Conv2d) -> tuple[torch.Tensor, ...]:
        result = module(features)
        return result, *torch.autograd.grad(result, (features, module.weight), gradient.to(result.dtype))

    expected, exact = result_and_gradients(plain), result_and_gradients(conv)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = result_and_gradients(conv)
    assert rounded[0].dtype == torch.bfloat16
    for want, one, other in zip(expected, exact, rounded, strict=True):
        assert (one - want).norm() <= 1e-12 * want.norm()
        assert (other - want).norm() <= 0.02 * want.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(2, 2), (3, 3), (9, 8), (19, 19)])
def test_pooling_is_torchs(size: tuple[int, int], dtype: torch.dtype) -> None:
    """Result and gradient to the bit, in the same memory order; whole numbers, so that windows have ties."""
    torch.manual_seed(0)
    features = torch.randint(0, 5, (3, 4, *size)).to(dtype).contiguous(memory_format=torch.channels_last)
    features.requires_grad_()
    expected, found = torch.nn.functional.max_pool2d(features, 2), max_pool(features)
    gradient = torch.randn(found.shape).to(dtype)
    (wanted,), (got,) = (torch.autograd.grad(result, features, gradient) for result in (expected, found))
    assert torch.equal(found, expected)
    assert torch.equal(got, wanted)
    assert got.stride() == features.stride()


def test_first_layer_whitens_the_patches() -> None:
    """Half of its filters' outputs over the sample are uncorrelated with variance 1; the others are their negatives."""
    generator = torch.Generator().manual_seed(1)
    smooth = torch.nn.functional.interpolate(
        torch.rand(64, 3, 8, 8, generator=generator) * 255, size=32, mode="bicubic"
    )
    model = build(CNN)
    model.init_from(smooth)
    outputs = model.network.whiten(model.normalize(smooth)).transpose(0, 1).flatten(1).detach()  # pyright: ignore
    half = outputs[:12] * (outputs[:12].square().mean(1, keepdim=True) > 0.5)  # rare directions are damped by eps
    covariance = half @ half.T / half.shape[1]
    kept = covariance.diagonal() > 0
    assert kept.sum() >= 3
    torch.testing.assert_close(covariance[kept][:, kept], torch.diag(covariance.diagonal()[kept]), atol=0.02, rtol=0)
    torch.testing.assert_close(outputs[12:], -outputs[:12])


def test_whitening_of_grey_images_survives_bf16() -> None:
    """Their patches vary in few of 12 directions; rounding errors in the others must not be amplified."""
    grey = images(64)[:, :1].expand(-1, 3, -1, -1)
    model = build(CNN)
    model.init_from(grey)
    exact = model.eval()(grey)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(grey)
    assert (exact - rounded).abs().max() < 0.05 * exact.abs().max()


def info(config: Config) -> ModelInfo:
    classes = ("a", "b", "c", "d", "e")
    return ModelInfo(config=config, classes=classes, mean=MEAN, std=STD, fingerprint="f00d", source="here")


@pytest.mark.slow
def test_compiling_changes_no_gradient_in_bf16() -> None:
    """A maximum whose backward looks for the place by its value does not find it again, and divides by zero."""
    gradients = []
    for compiled in (False, True):
        model = build(Config(model=ModelConfig(widths=(8, 16))))
        network = torch.compile(model, dynamic=False) if compiled else model
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(images(16, size=16))
        logits.float().square().mean().backward()  # pyright: ignore[reportAttributeAccessIssue]
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, eager in gradients[0].items():
        assert (gradients[1][name] - eager).norm() < 0.25 * eager.norm(), name


@pytest.mark.parametrize("config", [CNN, DEEP, NOTEBOOK], ids=["cnn", "deep", "notebook"])
def test_saved_model_answers_the_same(config: Config, tmp_path: Path) -> None:
    model = build(config)
    model(images())  # moves the batch norm statistics
    save_model(tmp_path / "model", model.eval(), info(config), {"val_accuracy": 0.5})
    loaded = load_model(tmp_path / "model")
    assert torch.equal(loaded.model(images()), model(images()))
    assert loaded.info == info(config)
    assert loaded.metrics == {"val_accuracy": 0.5}
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "nothing half-written stays"


def test_wrong_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: not found"):
        load_model(tmp_path)
    save_model(tmp_path / "model", build(CNN), info(CNN), {})
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        load_model(tmp_path / "model")


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "model", build(CNN), info(CNN), {})
    path = tmp_path / "model" / "config.json"
    description = json.loads(path.read_text())
    description["config"]["model"]["widths"] = [8, 16, 32]
    path.write_text(json.dumps(description))
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        load_model(tmp_path / "model")


def test_notebook_fits_its_image_size() -> None:
    config = replace(NOTEBOOK, data=DataConfig(image_size=48))
    assert build(config)(images(size=48)).shape == (4, 5)


def change(values: dict[str, Any], place: str, value: Any) -> None:
    *parents, last = place.split(".")
    for name in parents:
        values = values[name]
    values[last] = value


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("normalisation.mean", [1, 2]),
        ("normalisation.mean", [1, 2, float("nan")]),
        ("normalisation.mean", [1, 2, 10**400]),
        ("normalisation.std", [1, 2, "3"]),
        ("normalisation.std", 3),
        ("normalisation", []),
        ("classes", []),
        ("classes", "abcde"),
        ("classes", {"a": 1}),
        ("classes", ["a", "b", "c", "d", "d"]),
        ("classes", ["a", "b", "c", "d", 5]),
        ("classes", ["a", "b", "c", "d", ["e"]]),
        ("classes", [str(number) for number in range(100_001)]),
        ("data", None),
        ("data.source", 7),
        ("config", []),
        ("config.model.widths", [-1]),
        ("config.model.depths", [2, 3]),
        ("config.optim.lr", 10**400),
        ("config.data.image_size", 10**9),
    ],
)
def test_a_hostile_description_is_one_error_that_names_the_file(place: str, value: Any, tmp_path: Path) -> None:
    save_model(tmp_path / "model", build(CNN), info(CNN), {})
    path = tmp_path / "model/config.json"
    description = json.loads(path.read_text())
    change(description, place, value)
    path.write_text(json.dumps(description))
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_model(path.parent)


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 10_000, "null", "\x00"])
def test_json_that_is_none_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json"):
        load_model(tmp_path)


def test_a_huge_network_is_refused_before_it_takes_memory(tmp_path: Path) -> None:
    """Its dense layer would take 64 GiB."""
    save_model(tmp_path / "model", build(NOTEBOOK), info(NOTEBOOK), {})
    path = tmp_path / "model/config.json"
    description = json.loads(path.read_text())
    change(description, "config.model.widths", [512])
    change(description, "config.data.image_size", 1024)
    path.write_text(json.dumps(description))
    with pytest.raises(ConfigError, match=r"model\.safetensors: .*blocks"):
        load_model(tmp_path / "model")


def test_names_in_the_model_card_are_text() -> None:
    nasty = replace(
        info(CNN), classes=("a|b", "<img src=x>", "[x](http://x)", "`c`\n# d", "\x1b[2J\u202ee"), source="*my* set_1"
    )
    card = model_card(nasty, {"val_accuracy": 0.5})
    assert card.startswith("# cnn on \\*my\\* set\\_1\n")
    assert r"a\|b, \<img src=x\>, \[x\](http://x), \`c\` \# d,  \[2J e." in card
    assert "\x1b" not in card
