"""What is measured is what a run does, and what is computed from it is right. Nothing here asserts a speed."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from cifar.balance import image_losses_of
from cifar.benchmark.accuracy import seconds_to, statistics, time_to_accuracy
from cifar.benchmark.cost import predict_cost
from cifar.benchmark.measure import Stage, more_wanted, weighted_mean
from cifar.benchmark.run import new_folder
from cifar.benchmark.scaling import (
    Link,
    StepModel,
    add_efficiency,
    all_reduce_bytes,
    fit_compute,
    fit_link,
    measure,
    predict,
    shared_batch_size,
    step_points,
    usual_scale,
)
from cifar.benchmark.settings import Benchmark
from cifar.benchmark.show import show
from cifar.benchmark.stages import Bench
from cifar.benchmark.step import (
    PARTS,
    FlopMeter,
    Stopwatch,
    mean_shares,
    operator_shares,
    steps_by_size,
)
from cifar.config import Config, ConfigError, RunConfig, TrainConfig
from cifar.data.prepared import Prepared
from cifar.loop import epoch_size, train_epoch
from cifar.metrics import Totals
from cifar.recipes import RECIPES
from jobs import benchmark
from tests.flags import TINY

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
FLAGS = [*TINY, "--epochs", "2", "--scales", "0.5", "1"]


@pytest.fixture
def bench(config: Config, prepared: Prepared) -> Bench:
    return Bench(config, prepared, CPU, budget=0.01)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optim": {"accumulate": 2, "clip_norm": 0.5, "average": "ema"}},
        {"augment": {"mixup": 0.5}, "model": {"dropout": 0.3}, "optim": {"label_smoothing": 0.1}},
        {"train": {"balance": "loss"}, "augment": {"cutmix": 1.0}},
        {"train": {"scales": (0.5, 1.0), "precision": "bf16"}, "optim": {"optimizer": "muon", "lr": 0.1}},
    ],
)
def test_the_steps_that_are_timed_are_those_of_training(
    config: Config, prepared: Prepared, changes: dict[str, dict[str, Any]]
) -> None:
    """Same batches, same weights, bit for bit: over an epoch of the loop and as many of the benchmark's steps."""
    config = replace(config, **{group: replace(getattr(config, group), **values) for group, values in changes.items()})
    prepared = replace(prepared, class_counts=prepared.class_counts | {"train": [200, 100, 80, 16]})
    loop, timed = (Bench(config, prepared, CPU, budget=0.01) for _ in range(2))
    classes, size = len(prepared.classes), epoch_size(config.train, config.data.image_size, 1)
    train_epoch(
        loop.training.model,
        loop.training.optimizer,
        loop.training.averager,
        loop.batches,
        config,
        epoch=1,
        start=0,
        first_step=loop.num_batches,
        total_steps=config.train.epochs * loop.num_batches,
        num_classes=classes,
        rank=0,
        totals=Totals.zeros(CPU),
        selection=None,
        teacher=loop.training.teacher,
        image_losses=image_losses_of(config, prepared.class_counts["train"], CPU),
        augmented=False,
        after_step=lambda done: False,
    )
    stepper, watch = timed.stepper(), Stopwatch(CPU)
    for number, batch in enumerate(timed.batches):
        stepper.step(batch, watch, size=size, epoch=1, number=number)
    assert set(watch.seconds) == set(PARTS)
    for name, value in loop.training.evaluated.state_dict().items():
        assert torch.equal(value, timed.training.evaluated.state_dict()[name]), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_flops_of_a_step_equal_a_hand_count(config: Config, prepared: Prepared, precision: Any) -> None:
    """A multiplication and an addition are two, in bf16 as in float32; the first layer, frozen, has no backward."""
    bench = Bench(replace(config, train=replace(config.train, precision=precision)), prepared, CPU, budget=0.01)
    meter, rows = FlopMeter(), 44
    bench.stepper().step(bench.batches[0], meter, size=16)

    def conv(before: int, after: int, kernel: int, side: int) -> int:
        return 2 * rows * before * after * kernel**2 * side**2

    whiten = conv(3, 24, 2, 15)
    first, second, third = conv(24, 8, 3, 15), conv(8, 8, 3, 7), conv(8, 16, 3, 7)
    fourth = conv(16, 16, 3, 3) * 49 // 81  # a tiny plane: the kernel's part inside it
    head = 2 * rows * 16 * len(prepared.classes)
    assert meter.flops["forward"] == whiten + first + second + third + fourth + head
    # For the weights and for the input, but for the first trained layer, whose input needs no gradient.
    assert meter.flops["backward"] == first + 2 * (second + third + fourth + head)
    assert meter.flops["optimizer"] == meter.flops["augment"] == 0  # Adam's arithmetic is per element


def test_muons_products_count(config: Config, prepared: Prepared) -> None:
    """x x^T and a product with x for each filter bank, as (out, in * 9) matrix; of (out, out), three squares, two
    products of factors, and two updates of the Gram matrix by two products each."""
    muon = replace(config, optim=replace(config.optim, optimizer="muon"))
    bench, meter = Bench(muon, prepared, CPU, budget=0.01), FlopMeter()
    bench.stepper().step(bench.batches[0], meter, size=16)
    shapes = [(8, 24 * 9), (8, 8 * 9), (16, 8 * 9), (16, 16 * 9)]
    assert meter.flops["optimizer"] == sum(2 * (2 * a * a * b + (3 + 2 + 4) * a**3) for a, b in shapes)


def test_operators_have_their_kinds_and_sum_to_one(bench: Bench) -> None:
    stepper = bench.stepper()
    shares = operator_shares(lambda meter: stepper.step(bench.batches[0], meter, size=8), 1, CPU)
    assert sum(shares.values()) == pytest.approx(1)
    expected = {"convolution", "batch norm", "pooling", "activation", "linear", "loss", "augment", "resize"}
    assert expected | {"optimizer"} <= shares.keys()
    assert list(shares.values()) == sorted(shares.values(), reverse=True)


def test_what_a_convolution_copies_is_convolution() -> None:
    """Only convolutions run here, so only they and what belongs to no kind show."""
    net, images = nn.Conv2d(3, 8, 3), torch.randn(16, 3, 32, 32)

    def step(meter: Any) -> None:
        with meter("forward"), torch.autocast("cpu", torch.bfloat16):
            loss = net(images).float().sum()
        with meter("backward"):
            loss.backward()

    assert set(operator_shares(step, 1, CPU)) <= {"convolution", "copies and casts", "other"}


def test_mean_shares_weigh_by_time() -> None:
    shares = mean_shares({8: {"a": 1.0}, 16: {"a": 0.5, "b": 0.5}}, {8: 1.0, 16: 3.0})
    assert shares == {"a": pytest.approx(0.625), "b": pytest.approx(0.375)}


def test_sizes_are_counted_in_steps() -> None:
    assert steps_by_size(RECIPES["notebook"](), 7) == {32: 700}
    config = replace(Config(), train=TrainConfig(epochs=8, scales=(0.625, 0.625, 0.75, 1.0)))
    assert steps_by_size(config, 10) == {20: 40, 24: 20, 32: 20}
    skipping = replace(config, train=replace(config.train, skip_easy=0.5))
    assert steps_by_size(skipping, 10) == {20: 30, 24: 10, 32: 15}
    assert usual_scale(config) == 0.625
    assert usual_scale(replace(config, train=replace(config.train, scales=(0.5, 1.0)))) == 1.0  # of equals the larger


def test_the_mean_over_a_run_weighs_by_steps() -> None:
    fast = Stage.of("forward", "8 px", [1.0, 1.0, 2.0], images=10, flops=100)
    slow = Stage.of("forward", "16 px", [4.0, 5.0, 9.0], images=10, flops=400)
    mean = weighted_mean([fast, slow], [3, 1], "mean")
    assert (mean.seconds, mean.low, mean.high, mean.n) == (2.0, 1.75, 3.75, 6)
    assert mean.images_per_second == 5.0
    assert mean.to_dict(ceiling=350.0)["ceiling_share"] == pytest.approx(175 / 2 / 350)


def test_measurements_end() -> None:
    """At the budget with three of them; long ones at five budgets, with fewer."""
    assert more_wanted([], 1.0)
    assert more_wanted([0.9, 0.9], 1.0)
    assert more_wanted([0.1] * 9, 1.0)
    assert not more_wanted([0.4] * 3, 1.0)
    assert not more_wanted([5.5], 1.0)


def test_the_interval_is_students() -> None:
    values = [0.911, 0.914, 0.909, 0.9175, 0.9121]
    found = statistics(values)
    low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert found["ci95"] == pytest.approx([low, high])
    assert found["sd"] == pytest.approx(np.std(values, ddof=1))
    assert found["standard_error"] == pytest.approx(stats.sem(values))
    assert (found["mean"], found["n"]) == (pytest.approx(np.mean(values)), 5)


def test_one_run_has_no_interval() -> None:
    assert statistics([0.9]) == {"mean": 0.9, "n": 1, "sd": None, "standard_error": None, "ci95": None}


def test_seconds_to_a_target_are_those_of_the_first_epoch_that_has_it() -> None:
    accuracies = (0.3, 0.6, 0.5, 0.8)
    history = [{"val_accuracy": a, "train_seconds": 10.0 * n} for n, a in enumerate(accuracies, 1)]
    found = [seconds_to(target, history) for target in (0.1, 0.3, 0.55, 0.6, 0.7, 0.8)]
    assert found == [10, 10, 20, 20, 40, 40]
    assert seconds_to(0.81, history) is None


def test_two_seeds_are_two_runs(here: Config) -> None:
    run = replace(here.run, storage=f"{here.run.storage}/fresh")
    found = time_to_accuracy(here, 2, "val", 0.5, run)
    first, second = found["runs"]
    assert (first["seed"], second["seed"]) == (0, 1)
    histories = [(Path(run.storage) / f"seed-{seed}/metrics.jsonl").read_text() for seed in (0, 1)]
    assert [json.loads(line)["train_loss"] for line in histories[0].splitlines()] != [
        json.loads(line)["train_loss"] for line in histories[1].splitlines()
    ]
    assert found["accuracy"]["mean"] == pytest.approx((first["accuracy"] + second["accuracy"]) / 2)
    assert found["accuracy"]["n"] == 2
    for one in (first, second):
        assert one["count"] == 44
        assert one["seconds"] == one["train_seconds"] + one["evaluation_seconds"]
        assert 0 < one["train_seconds"] < one["wall_seconds"]
        assert one["target_seconds"] is None or one["target_seconds"] <= one["train_seconds"]


def test_a_target_that_is_not_always_reached_has_no_mean(here: Config) -> None:
    found = time_to_accuracy(replace(here, train=replace(here.train, epochs=1)), 1, "val", 1.0, here.run)
    assert (found["target_reached"], found["target_seconds"]) == (0, None)


def test_a_ring_sends_nearly_twice_the_gradients() -> None:
    """Each of 2 (w - 1) rounds sends a w-th."""
    assert [all_reduce_bytes(1000, w) for w in (1, 2, 4, 1000)] == [0, 1000, 1500, 1998]
    assert Link(latency=1.0, bytes_per_second=100).all_reduce_seconds(1000, 4) == 6 + 15


PLANTED = StepModel(
    fixed=0.02, per_image=1e-4, gradient_bytes=40_000_000, link=Link(latency=2e-3, bytes_per_second=1e9)
)


def test_the_fit_finds_the_step_that_was_planted() -> None:
    points = [(images, PLANTED.compute_seconds(images)) for images in (500, 250, 125, 62, 31, 15)]
    assert fit_compute(points) == (pytest.approx(0.02), pytest.approx(1e-4))


def test_a_step_without_fixed_cost_has_none_below_zero() -> None:
    fixed, per_image = fit_compute([(500, 0.06), (250, 0.025), (125, 0.0120)])
    assert fixed == 0
    assert per_image > 0


def test_the_fit_finds_the_link_that_was_planted() -> None:
    steps = {w: PLANTED.seconds(512, w) for w in (1, 2, 4, 8)}
    flags = replace(PLANTED, link=Link(latency=1e-5, bytes_per_second=1e10))
    link = fit_link(flags, 512, steps)
    assert (link.latency, link.bytes_per_second) == (pytest.approx(2e-3), pytest.approx(1e9))
    assert link.source == "fitted to 2, 4, 8 workers"
    alone = fit_link(replace(PLANTED, link=replace(PLANTED.link, bytes_per_second=5.0)), 512, {2: steps[2]})
    assert alone.bytes_per_second == pytest.approx(1e9)


def test_without_several_workers_the_flags_link_holds() -> None:
    for steps in ({}, {1: 0.07}, {2: 0.01}):  # the last one is faster than a link without cost
        assert fit_link(PLANTED, 512, steps) == PLANTED.link


def test_predictions_add_up_and_efficiency_falls() -> None:
    rows = predict(PLANTED, 16, 100, [1, 2, 4, 8, 16, 32])
    assert [row["workers"] for row in rows] == [1, 2, 4, 8, 16]  # 32 would have no image each
    for row in rows:
        assert row["step_seconds"] == pytest.approx(row["compute_seconds"] + row["all_reduce_seconds"])
        assert row["images_per_second"] == pytest.approx(16 / row["step_seconds"])
        assert row["epoch_seconds"] == pytest.approx(100 * row["step_seconds"])
    efficiencies = [row["efficiency"] for row in rows]
    assert efficiencies[0] == 1
    assert efficiencies == sorted(efficiencies, reverse=True)


def test_efficiency_is_per_worker_of_the_smallest_count_that_ran() -> None:
    measured: list[dict[str, Any]] = [
        {"workers": 1, "error": "too few"},
        {"workers": 2, "images_per_second": 100.0},
        {"workers": 4, "images_per_second": 150.0},
    ]
    add_efficiency(measured)
    assert "efficiency" not in measured[0]
    assert (measured[1]["speedup"], measured[1]["efficiency"]) == (1, 1)
    assert (measured[2]["speedup"], measured[2]["efficiency"]) == (1.5, 0.75)


def test_a_count_that_cannot_be_is_reported_and_no_error(config: Config) -> None:
    """44 images do not divide among 3 workers."""
    found = measure(config, 3, RunConfig())
    assert found["workers"] == 3
    assert "does not divide among 3 workers" in found["error"]


def test_all_counts_share_one_batch() -> None:
    config = replace(Config(), train=TrainConfig(batch_size=500))
    assert [shared_batch_size(config, counts) for counts in ([1], [1, 2, 4], [8], [3, 4], [64, 512])] == [
        *(500, 500, 496, 492, 500)
    ]
    assert shared_batch_size(replace(config, optim=replace(config.optim, accumulate=10)), [3]) == 480


def test_step_points_halve_the_batch_as_far_as_it_goes(bench: Bench) -> None:
    points = step_points(bench, 44, 16)
    assert [point["images"] for point in points] == [44, 22, 11, 5, 2]
    assert all(point["seconds"] > 0 and point["n"] >= 1 for point in points)


def test_runs_are_made_anew(tmp_path: Path) -> None:
    with new_folder(str(tmp_path)) as first, new_folder(str(tmp_path)) as second:
        assert first != second
        assert Path(first).parent == tmp_path
    with new_folder("") as temporary:
        assert Path(temporary).exists()
    assert not Path(temporary).exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--workers", "1,x"], "error: --workers 1,x: give counts with commas between them, such as 1,2,4"),
        (["--workers", "0"], "error: --workers 0: give counts"),
        (["--workers", "auto"], "error: --workers auto: give counts"),
        (["--budget", "0"], "error: --budget 0: use a positive number"),
        (["--target", "0.9"], "error: --target 0.9: says nothing without --seeds"),
        (["--target", "90", "--seeds", "1"], "error: --target 90: use a share"),
        (["--link-gbps", "0"], "error: --link-gbps 0: use a positive number"),
        (["--seeds", "-1"], "error: --seeds -1: use 0 or more"),
        (["--flip", "none"], "error: --tta shift: asks about mirror images"),
        (["--lr", "-1"], "error: --lr -1.0: use a positive number"),
    ],
)
def test_bad_usage_is_one_clear_error_and_exit_2(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark.main(flags) == 2
    out, err = capsys.readouterr()
    assert err.startswith(message)
    assert (err.count("\n"), out) == (1, "")


def test_a_recipe_gives_its_groups_and_its_run_flags_are_free() -> None:
    settings = Benchmark.of(RECIPES["notebook"]())
    assert settings.config() == RECIPES["notebook"]()
    assert replace(settings, workers="4,1,4").worker_counts == [1, 4]
    with pytest.raises(ConfigError, match="--workers 1,"):
        replace(settings, workers="1,")


@pytest.mark.ray
def test_the_job_measures_every_stage(here: Config, tmp_path: Path) -> None:
    """All of it at once on tiny data: what must be there is there, and the numbers fit each other.

    In a process of its own: Ray may end the one that used it, up to a minute after `ray.shutdown()`."""
    output = tmp_path / "out"
    command = [sys.executable, "jobs/benchmark.py", "--data", here.data.data, *FLAGS, "--output", str(output), "--json"]
    command += ["--budget", "0.01", "--seeds", "1", "--target", "0.01", "--workers", "1,64"]
    out = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    result = json.loads(out.splitlines()[-1])
    assert json.loads((output / "benchmark.json").read_text()) == {k: v for k, v in result.items() if k != "output"}
    assert max(map(len, out.splitlines()[:-1])) <= 120
    assert "…" not in out.rpartition("\n{")[0]  # no cell is cut

    stages = {(stage["stage"], stage["variant"]): stage for stage in result["stages"]}
    names = {stage for stage, _ in stages}
    assert names >= {"decode", "load", "shard", *PARTS, "step", "evaluation", "start-up"}
    assert names >= {"checkpoint save", "checkpoint load"}
    for stage in stages.values():
        assert stage["n"] >= 1
        assert 0 < stage["low"] <= stage["seconds"] <= stage["high"]
        if stage["images"]:
            assert stage["images_per_second"] == pytest.approx(stage["images"] / stage["seconds"])
    for part in ("forward", "backward", "step"):
        small, large = stages[part, "8 px"], stages[part, "16 px"]
        mean = stages[part, "mean over a run"]
        assert mean["seconds"] == pytest.approx((small["seconds"] + large["seconds"]) / 2)
        assert mean["ceiling_share"] == pytest.approx(
            mean["flops"] / mean["seconds"] / result["ceiling"]["flops_per_second"]
        )
    step = stages["step", "mean over a run"]
    assert step["flops"] == sum(stages[part, "mean over a run"]["flops"] for part in PARTS)
    assert sum(result["operators"].values()) == pytest.approx(1)
    assert result["counts"] == {"train": 418, "val": 22, "test": 60}
    assert (result["batch_size"], result["loader"]) == (44, "resident")
    assert result["machine"]["cores"] >= 1
    assert result["checkpoint_bytes"] > result["gradient_bytes"] > 0
    assert predict_cost(result, "benchmark.json", {})["runs"][0]["gpus"] == 1  # reads what it needs
    assert Config.from_dict(result["config"]).train.epochs == 2

    (run,) = result["seeds"]["runs"]
    assert result["seeds"]["accuracy"]["mean"] == run["accuracy"]
    assert result["seeds"]["target_reached"] == 1
    one, many = result["scaling"]["measured"]
    assert (one["workers"], one["n"], one["speedup"], one["efficiency"]) == (1, 3, 1.0, 1.0)
    assert "64" in many["error"]  # the other count was measured nevertheless
    assert [row["workers"] for row in result["scaling"]["predicted"]] == [1, 2, 4, 8, 16, 32]


def test_what_is_shown_fits_and_names_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    """Large and small numbers, seeds without target, counts that were not measured: no cell is cut."""
    stage = Stage.of("checkpoint save", "mean over a run", [123.4, 9999.9], images=10**9, flops=10**15)
    rows = predict(PLANTED, 512, 100, [1, 2, 32])
    run = {"seed": 0, "accuracy": 0.9, "train_seconds": 1.0, "evaluation_seconds": 1.0, "seconds": 2.0}
    result = {
        "machine": {
            "device_name": "a CPU",
            "cores": 2,
            "threads": 2,
            "torch": "2",
            "date": "today",
            "load_average": 3.0,
        },
        "data": "cifar10",
        "counts": {"train": 45_000},
        "batch_size": 512,
        "loader": "resident",
        "ceiling": {"flops_per_second": 1e12, "before": 1e12, "after": 1e12, "best": 1e12, "n": 6}
        | {"side": 2048, "precision": "bfloat16"},
        "stages": [stage.to_dict(1e12)],
        "operators": {"convolution": 1.0},
        "seeds": {
            "split": "val",
            "runs": [run | {"wall_seconds": 9.0, "target_seconds": None}] * 2,
            **{key: statistics([1.0, 2.0]) for key in ("accuracy", "train_seconds", "seconds")},
            "target": 0.99,
            "target_reached": 0,
            "target_seconds": None,
        },
        "scaling": {
            "batch_size": 512,
            "image_size": 20,
            "nodes": 1,
            "cpus": 2.0,
            "gpus": 0,
            "measured": [{"workers": 2, "error": "--workers 2: needs 2 GPUs"}],
            "model": {
                "fixed": PLANTED.fixed,
                "per_image": PLANTED.per_image,
                "gradient_bytes": 4 * 10**7,
                "link": {"latency": 1e-4, "bytes_per_second": 1e9, "source": "flags"},
            },
            "predicted": rows,
        },
    }
    show(result)
    out = capsys.readouterr().out
    assert "…" not in out
    assert max(map(len, out.splitlines())) <= 120
    assert "busy" in out
    assert "never" in out
    assert "prediction" in out
    assert "2 workers were not measured: --workers 2: needs 2 GPUs" in out
