"""Optimizers against torch's, schedules against torch's schedulers, averages against formulas; resume is exact."""

import copy
import io
from typing import Any, Literal, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from cifar.config import OptimConfig, Optimizer, Schedule
from cifar.optim import (
    DEFAULT_LR,
    PULL_STEPS,
    SGD_MOMENTUM,
    Averager,
    Muon,
    build_averager,
    build_optimizer,
    lr_scale,
    orthogonalize,
    orthogonalize_all,
    set_lr,
)

OPTIMIZERS = get_args(Optimizer)
# At rates that suit the small problem below.
CONFIGS = {
    "sgd": OptimConfig(optimizer="sgd", lr=0.05, momentum=0.9),
    "adam": OptimConfig(optimizer="adam", lr=0.01),
    "adamw": OptimConfig(optimizer="adamw", lr=0.01, weight_decay=0.01),
    "rmsprop": OptimConfig(optimizer="rmsprop", lr=0.002, momentum=0.5),
    "muon": OptimConfig(optimizer="muon", lr=0.1, head_lr=0.05, weight_decay=0.01),
}


class Net(nn.Module):
    """One of each kind of parameter: frozen, filter before a norm, filter with bias, hidden matrix, norm, head."""

    def __init__(self):
        super().__init__()
        self.whiten = nn.Conv2d(3, 6, 2)
        self.whiten.weight.requires_grad_(False)
        self.conv = nn.Conv2d(6, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.conv_with_bias = nn.Conv2d(8, 4, 3)
        self.dense = nn.Linear(4, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = self.norm(self.conv(self.whiten(images))).relu()
        return self.head(self.dense(self.conv_with_bias(features).relu().mean((2, 3))).relu())


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def batch(step: int = 0) -> tuple[Tensor, Tensor]:
    """Three classes that differ in their mean colour."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.arange(24) % 3
    return torch.randn(24, 3, 8, 8, generator=generator) + 2 * torch.eye(3)[labels].view(24, 3, 1, 1), labels


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, averager: Averager | None = None
) -> list[float]:
    losses = []
    for step in steps:
        images, labels = batch(step)
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if averager is not None:
            averager.update(model, step)
        losses.append(loss.item())
    return losses


def group_of(optimizer: torch.optim.Optimizer, parameter: Tensor | None) -> dict[str, Any]:
    found = [group for group in optimizer.param_groups if any(other is parameter for other in group["params"])]
    assert len(found) == 1
    return found[0]


def saved_and_loaded(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    for (name, expected), found in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert found.equal(expected), name


# Optimizers


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns(name):
    model = net()
    losses = train(model, build_optimizer(model, CONFIGS[name], 1), range(40))
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_trainable_parameters_stand_in_one_group_and_frozen_ones_in_none(name):
    model = net()
    optimizer = build_optimizer(model, CONFIGS[name], 1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            group_of(optimizer, parameter)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters())) - 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_shrinks_weights_but_neither_biases_nor_norms(name):
    model = net()
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.5)
        parameter.grad = torch.zeros_like(parameter)
    config = OptimConfig(optimizer=name, lr=0.1, head_lr=0.1, weight_decay=0.1, momentum=0.5)
    build_optimizer(model, config, 1).step()
    for parameter in (model.conv_with_bias.weight, model.dense.weight, model.head.weight):
        assert (parameter < 0.5).all()
    for parameter in (model.norm.weight, model.norm.bias, model.dense.bias, model.head.bias, model.whiten.weight):
        assert (parameter == 0.5).all()


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("sgd", lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True)),
        ("adam", lambda parameters: torch.optim.Adam(parameters, lr=0.01)),
        ("rmsprop", lambda parameters: torch.optim.RMSprop(parameters, lr=0.002)),
    ],
)
def test_optimizers_are_torchs_with_the_configs_settings(name, reference):
    model, other = net(), net()
    train(model, build_optimizer(model, CONFIGS[name], 1), range(5))
    train(other, reference([p for p in other.parameters() if p.requires_grad]), range(5))
    for found, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_a_rate_the_optimizer_takes_its_own(name):
    model, other = net(), net()
    train(model, build_optimizer(model, OptimConfig(optimizer=name), 10), range(2))
    train(other, build_optimizer(other, OptimConfig(optimizer=name, lr=DEFAULT_LR[name]), 10), range(2))
    assert not torch.equal(model.conv.weight, net().conv.weight)
    for found, expected in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_sgd_without_momentum_is_possible():
    model = net()
    train(model, build_optimizer(model, OptimConfig(optimizer="sgd", lr=0.05, momentum=0.0), 1), range(1))


# Muon


def test_muon_takes_filters_and_matrices_and_leaves_the_rest_to_sgd():
    model = net()
    optimizer = build_optimizer(model, CONFIGS["muon"], 100)
    conv, dense = group_of(optimizer, model.conv.weight), group_of(optimizer, model.dense.weight)
    assert conv["orthogonal"]
    assert conv["normalize"]
    assert dense["orthogonal"]
    assert not dense["normalize"]
    assert group_of(optimizer, model.conv_with_bias.weight) is dense
    head, biases = group_of(optimizer, model.head.weight), group_of(optimizer, model.dense.bias)
    assert not head["orthogonal"]
    assert not biases["orthogonal"]
    assert group_of(optimizer, model.head.bias)["peak_lr"] == head["peak_lr"] == 0.05
    assert conv["peak_lr"] == dense["peak_lr"] == 0.1


def test_muon_scales_the_rates_of_head_and_biases_with_the_batch():
    model, config = net(), OptimConfig(optimizer="muon")
    small, large = build_optimizer(model, config, 100), build_optimizer(model, config, 500)
    for parameter, ratio in ((model.head.weight, 5), (model.norm.bias, 5), (model.conv.weight, 1)):
        assert group_of(large, parameter)["peak_lr"] == pytest.approx(ratio * group_of(small, parameter)["peak_lr"])


@pytest.mark.parametrize("shape", [(8, 8), (16, 40), (40, 16)])
def test_orthogonalize_approaches_the_nearest_orthogonal_matrix(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(matrix[None], 5)[0]
    assert result.shape == matrix.shape
    assert result.dtype == matrix.dtype
    values = torch.linalg.svdvals(result)
    assert values.max() < 1.3
    assert values.median() > 0.6
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert nn.functional.cosine_similarity((u @ v).flatten(), result.flatten(), dim=0) > 0.97


@pytest.mark.parametrize("batched", [False, True])
def test_every_filter_gets_its_own_orthogonal_matrix_back(batched):
    generator = torch.Generator().manual_seed(0)
    filters = [torch.randn(shape, generator=generator) for shape in [(8, 4, 3, 3), (6, 5), (8, 36), (5, 6), (6, 5)]]
    for given, result in zip(filters, orthogonalize_all(filters, 5, batched), strict=True):
        assert result.shape == given.shape
        torch.testing.assert_close(result.flatten(1), orthogonalize(given.flatten(1)[None], 5)[0])


def test_muon_matches_torchs_on_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's mixes momentum with other weights, which the orthogonalization cancels, and rounds to bfloat16."""
    monkeypatch.setattr("cifar.optim.native_bf16", lambda device: False)
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(12, 20))
    theirs = nn.Parameter(ours.detach().clone())
    start = ours.detach().clone()
    settings: dict[str, Any] = {"lr": 0.1, "momentum": 0.6, "weight_decay": 0.05}
    optimizers = (
        Muon([{"params": [ours], "orthogonal": True, "iterations": 5, **settings}]),
        torch.optim.Muon([theirs], nesterov=True, ns_steps=5, **settings),
    )
    for _ in range(4):
        gradient = torch.randn(12, 20)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    moved, expected = ours.detach() - start, theirs.detach() - start
    assert (moved - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
def test_orthogonalize_is_jordans_iteration(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is written down, on the matrix itself; in float32, where the way it is computed makes no difference."""
    monkeypatch.setattr("cifar.optim.native_bf16", lambda device: False)
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    expected = matrix.double() / matrix.double().norm()
    for _ in range(3):
        gram = expected @ expected.T
        expected = 3.4445 * expected + (-4.7750 * gram + 2.0315 * gram @ gram) @ expected
    torch.testing.assert_close(orthogonalize(matrix[None], 3)[0].double(), expected, rtol=0, atol=1e-5)


def test_muons_other_groups_are_sgd_with_nesterov_momentum():
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(3, 5))
    theirs = nn.Parameter(ours.detach().clone())
    optimizers = (
        Muon([{"params": [ours], "lr": 0.1, "weight_decay": 0.2}]),
        torch.optim.SGD([theirs], lr=0.1, momentum=SGD_MOMENTUM, nesterov=True, weight_decay=0.2),
    )
    for _ in range(4):
        gradient = torch.randn(3, 5)
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_muon_treats_a_filter_as_its_matrix_whatever_its_layout(layout):
    torch.manual_seed(0)
    weights, gradient = torch.randn(8, 6, 3, 3), torch.randn(8, 6, 3, 3)
    matrix = nn.Parameter(weights.flatten(1).clone())
    filters = nn.Parameter(weights.clone(memory_format=layout))
    matrix.grad = gradient.flatten(1)
    filters.grad = gradient.contiguous(memory_format=layout)
    Muon([{"params": [matrix], "orthogonal": True}, {"params": [filters], "orthogonal": True}], lr=0.1).step()
    torch.testing.assert_close(filters.detach().flatten(1), matrix.detach())
    assert not matrix.detach().allclose(weights.flatten(1))


def test_muon_fixes_the_norm_of_filters_before_a_norm():
    """Their scale is lost in the norm: a start ten times as large ends at the same weights."""
    model, large = net(), net()
    with torch.no_grad():
        large.conv.weight.mul_(10)
        gradient = torch.randn_like(model.conv.weight)
    for each in (model, large):
        each.conv.weight.grad = gradient.clone()
        build_optimizer(each, CONFIGS["muon"], 1).step()
    torch.testing.assert_close(model.conv.weight, large.conv.weight)


# Learning rate


def torch_scales(make: Any, total: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    scales = []
    for _ in range(total):
        scales.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return scales


@pytest.mark.parametrize(
    ("schedule", "make"),
    [
        ("constant", lambda optimizer: lr_scheduler.ConstantLR(optimizer, factor=1.0)),
        ("step", lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [20, 30], gamma=0.1)),
        ("cosine", lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 40)),
        ("linear", lambda optimizer: lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=40)),
    ],
)
def test_schedules_match_torchs(schedule, make):
    config = OptimConfig(schedule=schedule)
    assert [lr_scale(config, step, 40) for step in range(40)] == pytest.approx(torch_scales(make, 40), abs=1e-12)


@pytest.mark.parametrize("warmup", [0.0, 0.25])
def test_onecycle_matches_torchs_rise_and_torchs_fall(warmup):
    """torch has one shape for both; ours rises as its linear cycle and falls as its cosine cycle."""
    peak = round((warmup or 0.3) * 40) - 1

    def reference(strategy: Literal["linear", "cos"]) -> list[float]:
        return torch_scales(
            lambda optimizer: lr_scheduler.OneCycleLR(
                optimizer, 1.0, 40, pct_start=warmup or 0.3, anneal_strategy=strategy, cycle_momentum=False
            ),
            39,
        )

    config = OptimConfig(schedule="onecycle", warmup=warmup)
    expected = reference("linear")[:peak] + reference("cos")[peak:]
    assert [lr_scale(config, step, 40) for step in range(39)] == pytest.approx(expected, abs=1e-12)
    assert lr_scale(config, peak, 40) == pytest.approx(1)


@pytest.mark.parametrize("schedule", ["constant", "step", "cosine", "linear"])
def test_warm_up_rises_in_equal_parts_before_the_schedule(schedule):
    plain, warm = OptimConfig(schedule=schedule), OptimConfig(schedule=schedule, warmup=0.2)
    scales = [lr_scale(warm, step, 50) for step in range(50)]
    assert scales[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert scales[10:] == pytest.approx([lr_scale(plain, step, 40) for step in range(40)])


@pytest.mark.parametrize("schedule", get_args(Schedule))
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.33, 0.99])
@pytest.mark.parametrize("total", [1, 2, 3, 7, 100])
def test_no_step_is_wasted_or_above_the_peak(schedule, warmup, total):
    config = OptimConfig(schedule=schedule, warmup=warmup)
    scales = [lr_scale(config, step, total) for step in range(total)]
    assert all(0 < scale <= 1 for scale in scales)
    assert max(scales) > 0.8 or total < 7


def test_set_lr_scales_each_group_from_its_peak():
    optimizer = build_optimizer(net(), CONFIGS["muon"], 1)
    peaks = [group["lr"] for group in optimizer.param_groups]
    assert len(set(peaks)) > 1
    for scale in (0.5, 0.25):
        set_lr(optimizer, scale)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([scale * peak for peak in peaks])


# Averages and resume


def test_no_average_is_no_averager():
    assert build_averager(net(), OptimConfig(average="none")) is None


def test_ema_follows_its_formula_in_weights_and_statistics():
    model = net()
    averager = Averager(model, OptimConfig(average="ema", average_decay=0.8))
    optimizer = build_optimizer(model, CONFIGS["sgd"], 1)
    expected: dict[str, Tensor] = {}
    for step in range(4):
        train(model, optimizer, range(step, step + 1), averager)
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                expected[name] = 0.8 * expected[name] + 0.2 * value if name in expected else value.clone()
    found = averager.model.state_dict()
    assert "norm.running_mean" in expected
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    assert not found["dense.weight"].equal(model.dense.weight)


def test_lookahead_pulls_every_fifth_step_as_in_its_paper():
    model = net()
    averager = Averager(model, OptimConfig(average="lookahead", average_decay=0.4))
    optimizer = build_optimizer(model, CONFIGS["sgd"], 1)
    slow = copy.deepcopy(model.dense.weight.detach())
    for step in range(2 * PULL_STEPS + 2):
        train(model, optimizer, range(step, step + 1))
        fast = model.dense.weight.detach().clone()
        averager.update(model, step)
        if step % PULL_STEPS == PULL_STEPS - 1:
            slow = slow + 0.6 * (fast - slow)
            torch.testing.assert_close(model.dense.weight.detach(), slow)
        else:
            assert model.dense.weight.equal(fast)
    torch.testing.assert_close(averager.model.get_parameter("dense.weight"), slow)


def test_the_averaged_model_predicts_and_shares_nothing_with_the_live_one():
    model = net()
    averager = Averager(model, OptimConfig(average="ema", average_decay=0.5))
    train(model, build_optimizer(model, CONFIGS["adam"], 1), range(3), averager)
    before = averager.model.eval()(batch()[0])
    with torch.no_grad():
        model.head.weight.zero_()
    assert averager.model(batch()[0]).equal(before)
    assert not any(parameter.requires_grad for parameter in averager.model.parameters())
    assert model.training


@pytest.mark.parametrize(
    ("name", "average"), [*((name, "none") for name in OPTIMIZERS), ("muon", "ema"), ("muon", "lookahead")]
)
def test_resume_from_state_dicts_is_bit_for_bit(name, average):
    """Saved after step 7, which is not one of lookahead's pulls, at a learning rate below the peak."""
    settings = OptimConfig(average=average, average_decay=0.5)

    def fresh() -> tuple[Net, torch.optim.Optimizer, Averager | None]:
        model = net()
        return model, build_optimizer(model, CONFIGS[name], 1), build_averager(model, settings)

    model, optimizer, averager = fresh()
    set_lr(optimizer, 0.7)
    train(model, optimizer, range(7), averager)
    parts = [model, optimizer, *([averager] if averager else [])]
    states = [saved_and_loaded(part.state_dict()) for part in parts]
    train(model, optimizer, range(7, 12), averager)

    again, other_optimizer, other_averager = fresh()
    others = [again, other_optimizer, *([other_averager] if other_averager else [])]
    for part, state in zip(others, states, strict=True):
        part.load_state_dict(state)
    train(again, other_optimizer, range(7, 12), other_averager)
    assert_same_weights(model, again)
    assert [group["peak_lr"] for group in other_optimizer.param_groups] == [
        group["peak_lr"] for group in optimizer.param_groups
    ]
    if averager is not None and other_averager is not None:
        assert_same_weights(averager.model, other_averager.model)
