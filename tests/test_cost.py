"""The predicted cost is what the formulas say, worked out here by hand, and the page shows what the command prints."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cifar.benchmark.cost import (
    Assumptions,
    Measured,
    changes,
    checkpoint_interval,
    link_of,
    predict_cost,
    predict_preparation,
    predict_run,
    predict_runs,
    sensitivity,
    work_of,
)
from cifar.benchmark.show_cost import duration, size
from cifar.config import Config, ConfigError, TrainConfig
from jobs import benchmark

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "cluster/COST.md"


def stage(name: str, variant: str, seconds: float, images: int = 0, flops: int = 0) -> dict[str, Any]:
    rate = images / seconds if images else None
    return {"stage": name, "variant": variant, "seconds": seconds, "flops": flops, "images_per_second": rate}


def result(device: str = "cpu") -> dict[str, Any]:
    """A benchmark of 1,000 images of 32 pixels in batches of 100, two epochs, in round numbers."""
    return {
        "machine": {
            "device": device,
            "device_name": "a processor",
            "cores": 2,
            "date": "2026-11-22",
            "load_average": 0,
        },
        "config": replace(Config(), train=TrainConfig(epochs=2)).to_dict(),
        "data": "cifar10",
        "counts": {"train": 1000, "val": 100, "test": 10},
        "batch_size": 100,
        "gradient_bytes": 4_000_000,
        "checkpoint_bytes": 10_000_000,
        "stages": [
            stage("decode", "png, one process", 0.1, images=50),
            stage("decode", "jpeg, one process", 0.1, images=100),
            stage("load", "streaming", 0.005, images=100),
            stage("augment", "mean over a run", 0.001),
            stage("resize", "mean over a run", 0.002),
            stage("forward", "mean over a run", 0.003, flops=2 * 10**9),
            stage("backward", "mean over a run", 0.004, flops=4 * 10**9),
            stage("optimizer", "mean over a run", 0.005, flops=10**9),
            stage("checkpoint save", "10 MiB", 0.5),
            stage("checkpoint load", "10 MiB", 0.25),
            stage("start-up", "Ray started", 10.0),
        ],
    }


MEASURED = Measured.of(result(), "benchmark.json")
ASSUMED = Assumptions.of(
    {
        "gpu_flops": 1e12,
        "gpu_share": 0.5,
        "step_overhead": 0.002,
        "gpus_per_node": 4,
        "cores_per_node": 16,
        "storage_rate": 4e9,
        "nvlink_rate": 2e9,
        "nvlink_latency": 1e-5,
        "network_rate": 1e9,
        "network_latency": 1e-4,
        "fault_gpu_hours": 1000,
        "gpu_hour": 3.6,
        "detect_seconds": 20,
    }
)
STREAMS = replace(ASSUMED, node_memory=1e3)
"""A node whose object store is too small for the images."""


def test_one_gpu_by_hand() -> None:
    run = predict_run(MEASURED, ASSUMED, 1)
    assert run["compute_seconds"] == pytest.approx(100 * 6e7 / 5e11)  # forward and backward, of 100 images
    assert run["fixed_seconds"] == pytest.approx(0.002 + 1e9 / 5e11)  # launches, and the optimizer's products
    assert (run["all_reduce_seconds"], run["all_reduce_bytes"], run["epoch_network_bytes"]) == (0, 0, 0)
    assert run["step_seconds"] == pytest.approx(0.016)
    assert run["train_seconds"] == pytest.approx(20 * 0.016)
    assert run["images_per_second"] == pytest.approx(100 / 0.016)
    assert run["evaluation_seconds"] == pytest.approx(2 * 100 * 2e7 / 5e11)
    assert run["start_seconds"] == pytest.approx(10 + 1100 * 3072 / 4e9)
    assert (run["checkpoints"], run["checkpoint_steps"], run["checkpoint_bytes"]) == (2, 10, 20_000_000)
    assert run["save_seconds"] == pytest.approx(2 * (0.5 + 1e7 / 1e9))  # a GPU's quarter of the node's 4 GB/s
    faults = (0.32 + 0.008 + 1.02) / 3.6e6
    assert run["faults"] == pytest.approx(faults)
    assert run["lost_seconds"] == pytest.approx(faults * (0.328 / 2 / 2 + 20 + 10.00084 + 0.25), rel=1e-4)
    assert run["seconds"] == pytest.approx(10 + 1100 * 3072 / 4e9 + 0.32 + 0.008 + 1.02, rel=1e-4)
    assert run["usd"] == pytest.approx(run["seconds"] * 1e-3)
    assert (run["limit"], run["serial"]) == ("start-up", "start-up")


def test_a_ring_within_a_node_and_between_nodes_by_hand() -> None:
    within = predict_run(MEASURED, ASSUMED, 4)
    assert within["all_reduce_bytes"] == 6_000_000
    assert within["all_reduce_seconds"] == pytest.approx(6 * 1e-5 + 6e6 / 2e9)
    assert within["step_seconds"] == pytest.approx(0.004 + 25 * 1.2e-4 + 3.06e-3)
    assert within["epoch_network_bytes"] == 0
    between = predict_run(MEASURED, ASSUMED, 20)  # five nodes: of 20 hops 5 go from one to another
    assert between["all_reduce_bytes"] == pytest.approx(2 * 19 / 20 * 4e6)
    assert between["all_reduce_seconds"] == pytest.approx(38 * (15 * 1e-5 + 5 * 1e-4) / 20 + 7.6e6 / 1e9)
    assert between["epoch_network_bytes"] == pytest.approx(10 * 7.6e6)
    assert link_of(ASSUMED, 4).source == "within a node"
    assert link_of(ASSUMED, 5).source == "between nodes"


def test_less_or_rarer_gradients_take_less() -> None:
    latency = 38 * (15 * 1e-5 + 5 * 1e-4) / 20
    half = predict_run(MEASURED, replace(ASSUMED, gradient_share=0.5), 20)
    assert half["all_reduce_seconds"] == pytest.approx(latency + 3.8e6 / 1e9)
    eighth = predict_run(MEASURED, replace(ASSUMED, sync_every=8), 20)
    assert eighth["all_reduce_seconds"] == pytest.approx((latency + 7.6e6 / 1e9) / 8)
    assert eighth["all_reduce_bytes"] == pytest.approx(7.6e6 / 8)


@pytest.mark.parametrize("gpus", [1, 10, 50])
@pytest.mark.parametrize("assumed", [ASSUMED, STREAMS])
def test_twice_the_images_or_epochs_are_twice_the_training(assumed: Assumptions, gpus: int) -> None:
    once = predict_run(MEASURED, assumed, gpus)
    for twice in ({"images": 2000.0}, {"epochs": 4.0}):
        run = predict_run(MEASURED, replace(assumed, **twice), gpus)
        assert run["train_seconds"] == pytest.approx(2 * once["train_seconds"])
        assert run["step_seconds"] == once["step_seconds"]


def test_data_that_come_slower_than_steps_set_the_pace() -> None:
    """A node's 4 GPUs share its storage and its cores."""
    slow = predict_run(MEASURED, replace(STREAMS, storage_rate=3.072e6), 10)
    assert slow["step_seconds"] == pytest.approx(10 / 250)  # 10 images each, 250 a second for each GPU
    assert slow["images_per_second"] == pytest.approx(2500)
    assert slow["read_rate"] == pytest.approx(10 / 4 * 3.072e6)
    assert slow["node_read_rate"] == pytest.approx(3.072e6)
    assert slow["epoch_read_bytes"] == 1000 * 3072
    assert slow["cores_per_gpu"] == pytest.approx(250 / 10_000)
    longer = replace(STREAMS, storage_rate=3.072e6, images=1e6)
    assert predict_run(MEASURED, longer, 10)["limit"] == "storage"
    few = replace(STREAMS, cores_per_node=0.04, images=1e6)
    cores = predict_run(MEASURED, few, 10)
    assert cores["step_seconds"] == pytest.approx(10 / 100)
    assert (cores["limit"], cores["cores_per_gpu"]) == ("loading cores", pytest.approx(0.01))
    fast = predict_run(MEASURED, STREAMS, 10)
    assert fast["step_seconds"] > fast["data_seconds"] > 0


def test_what_does_not_fit_the_object_store_streams_whole_epochs() -> None:
    """The loader leaves easy images out only where all of them are in memory."""
    skipping = replace(MEASURED.config, train=replace(MEASURED.config.train, epochs=8, skip_easy=0.5))
    measured = replace(MEASURED, config=skipping)
    resident, streaming = (work_of(measured, assumed) for assumed in (ASSUMED, STREAMS))
    assert (resident.loader, streaming.loader) == ("resident", "streaming")
    assert (resident.steps, streaming.steps) == (3 * 10 + 5 * 5, 8 * 10)
    assert predict_run(measured, ASSUMED, 10)["store_bytes"] == 1100 * 3072
    assert predict_run(measured, STREAMS, 10)["store_bytes"] == 4 * 2 * 256 * 2**20
    large = replace(ASSUMED, node_memory=1e12, images=1e8)
    assert work_of(MEASURED, large).loader == "streaming"  # 307 GB, of 200 GB that Ray takes at most
    assert work_of(MEASURED, replace(large, images=2.5e7)).loader == "resident"  # 77 GB, below 40 % of it


def test_sizes_count_by_their_steps() -> None:
    config = replace(MEASURED.config, train=replace(MEASURED.config.train, epochs=4, scales=(0.5, 0.5, 0.5, 1.0)))
    stages = dict(MEASURED.stages)
    for pixels, flops in ((16, 10**9), (32, 5 * 10**9)):
        stages["forward", f"{pixels} px"] = stage("forward", f"{pixels} px", 1, flops=flops)
        stages["backward", f"{pixels} px"] = stage("backward", f"{pixels} px", 1, flops=2 * flops)
    work = work_of(replace(MEASURED, config=config, stages=stages), ASSUMED)
    assert work.flops_per_image == pytest.approx((3 * 3e9 + 1 * 15e9) / 4 / 100)
    assert work.val_per_image == pytest.approx(5e9 / 100 / 5e11)  # at full size


def test_youngs_interval_loses_least() -> None:
    best = checkpoint_interval(2.0, 10_000.0)
    assert best == 200

    def loss(interval: float) -> float:
        return 2.0 / interval + interval / 2 / 10_000.0

    assert all(loss(best) < loss(best * factor) for factor in (0.5, 0.9, 1.1, 2))


def test_faults_grow_with_gpus_and_call_for_checkpoints() -> None:
    long = replace(ASSUMED, epochs=50_000, fault_gpu_hours=10.0)
    runs = predict_runs(MEASURED, long, (1, 10))
    save = 0.5 + 1e7 / 1e9
    for run in runs:
        spent = run["train_seconds"] + run["evaluation_seconds"]
        assert run["faults"] == pytest.approx((spent + run["save_seconds"]) * run["gpus"] / 36_000)
        assert run["checkpoints"] >= 50_000  # one an epoch, as training makes them
    rare = replace(long, epochs=4.0, images=1e7)  # epochs of hours
    run = predict_run(MEASURED, rare, 10)
    assert run["checkpoint_interval"] == pytest.approx((2 * save * 3600) ** 0.5, rel=0.02)
    assert run["checkpoints"] > 4
    assert run["checkpoint_steps"] == pytest.approx(run["checkpoint_interval"] / run["step_seconds"], rel=0.02)


def test_efficiency_is_one_alone_and_falls() -> None:
    runs = predict_runs(MEASURED, ASSUMED, (1, 2, 3, 5, 20, 100))
    assert [run["gpus"] for run in runs] == [1, 2, 5, 20, 100]  # 100 images do not divide among 3
    efficiencies = [run["efficiency"] for run in runs]
    assert efficiencies[0] == 1
    assert efficiencies == sorted(efficiencies, reverse=True)
    assert efficiencies[1] == pytest.approx(runs[0]["usd"] / runs[1]["usd"])


def test_without_what_does_not_shrink_gpus_scale_perfectly() -> None:
    stages = {name: each | {"flops": 0} if name[0] == "optimizer" else each for name, each in MEASURED.stages.items()}
    measured = replace(
        MEASURED, stages=stages, start_seconds=0, save_seconds=1e-9, checkpoint_bytes=0, gradient_bytes=0
    )
    ideal = replace(
        ASSUMED, step_overhead=0, nvlink_latency=0, network_latency=0, fault_gpu_hours=1e30, storage_rate=1e30
    )
    assert [run["efficiency"] for run in predict_runs(measured, ideal, (1, 10, 100))] == pytest.approx([1, 1, 1])


def test_a_benchmark_on_a_gpu_gives_its_own_seconds() -> None:
    measured = Measured.of(result("cuda"), "benchmark.json")
    work = work_of(measured, ASSUMED)
    assert (work.fixed, work.per_image) == (0.005, pytest.approx((0.001 + 0.002 + 0.003 + 0.004) / 100))
    assert work.val_per_image == pytest.approx(0.003 / 100)
    cost = predict_cost(result("cuda"), "benchmark.json", {})
    assert not {"gpu_flops", "gpu_share", "step_overhead"} & {each["name"] for each in cost["assumptions"]}
    assert len(cost["changes"]) == len(changes(work, ASSUMED)) - 2
    with pytest.raises(ConfigError, match=r"--assume gpu_share: leave it out; benchmark.json has the seconds of a GPU"):
        predict_cost(result("cuda"), "benchmark.json", {"gpu_share": 0.4})


def test_preparation_by_hand() -> None:
    made = predict_preparation(MEASURED, replace(ASSUMED, images=3.6e6 - 100, file_bytes=1e5, prepare_cores=10))
    assert made["core_hours"] == pytest.approx(1)  # 1,000 images/s
    assert (made["hours"], made["usd"]) == (pytest.approx(0.1), pytest.approx(0.0425))
    assert (made["file_bytes"], made["prepared_bytes"]) == (3.6e11, 3.6e6 * 3072)
    assert made["usd_per_month"] == pytest.approx(3.6e6 * 3072 / 1e12 * 23)
    own = predict_preparation(MEASURED, replace(ASSUMED, decode_rate=100))
    assert own["core_hours"] == pytest.approx(1100 / 100 / 3600)


def test_the_weight_of_inputs() -> None:
    """Of a long run on one GPU all but the fixed part is arithmetic, which the GPU's share sets."""
    rows = {row["input"]: row for row in sensitivity(MEASURED, replace(ASSUMED, images=1e7, step_overhead=0), (1,))}
    assert rows["gpu_share"]["halved"][0] == pytest.approx(2, rel=0.01)
    assert rows["gpu_share"]["doubled"][0] == pytest.approx(0.5, rel=0.01)
    assert rows["network_rate"]["doubled"][0] == 1
    assert next(iter(rows)) == "gpu_share"  # largest first


def test_changes_do_what_their_names_say() -> None:
    cost = predict_cost(result(), "benchmark.json", {"images": 1e6, "batch_size": 512, "epochs": 8})
    runs = {run["gpus"]: run for run in cost["runs"]}
    assert list(runs) == [1, 8, 64, 512]
    changed = {row["change"]: row for row in cost["changes"]}
    assert all(changed[name]["seconds"] < runs[512]["seconds"] for name in list(changed)[:6])
    assert changed["spot: 0.4 of the price, a node lost each day"]["seconds"] > runs[512]["seconds"]
    paying = cost["pays_up_to"]
    assert paying == max(count for count in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if pays(count))


def test_a_batch_is_not_made_larger_than_the_data() -> None:
    assert "4 times the batch *" in changes(work_of(MEASURED, ASSUMED), ASSUMED)
    small = predict_cost(result(), "benchmark.json", {"images": 399})
    assert "4 times the batch *" not in [row["change"] for row in small["changes"]]


def pays(count: int) -> bool:
    assumed = Assumptions.of({"images": 1e6, "batch_size": 512, "epochs": 8})
    alone, together = (predict_run(MEASURED, assumed, gpus) for gpus in (1, count))
    return together["usd"] <= 2 * alone["usd"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--assume", "images", "1e8"], "error: --assume: says nothing without --cost FILE"),
        (["--cost", "missing.json"], "error: --cost missing.json: there is no such file; "),
        (["--cost", "other.json"], "error: --cost other.json: not what this version's jobs/benchmark.py writes"),
        (["--cost", "broken.json"], "error: broken.json: damaged"),
        (["--cost", "good.json", "--assume", "gpus", "8"], "error: --assume gpus: no such assumption; there are batch"),
        (["--cost", "good.json", "--assume", "gpu_share", "0"], "error: --assume gpu_share 0: use a positive number"),
        (["--cost", "good.json", "--assume", "images", "-1"], "error: --assume images -1: use a positive number"),
        (["--cost", "good.json", "--assume", "images", "nan"], "error: --assume images nan: use a positive number"),
        (["--cost", "good.json", "--assume", "images", "50"], "error: --batch-size 100: train has only 50 images"),
    ],
)
def test_bad_usage_is_one_clear_error_and_exit_2(
    flags: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("good.json").write_text(json.dumps(result()))
    Path("other.json").write_text(json.dumps({"config": Config().to_dict()}))
    Path("broken.json").write_text("{")
    assert benchmark.main(flags) == 2
    out, err = capsys.readouterr()
    assert err.startswith(message)
    assert (err.count("\n"), out) == (1, "")


def test_the_command_says_what_cannot_share_a_batch_and_gives_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "benchmark.json").write_text(json.dumps(result("cuda")))
    assert benchmark.main(["--cost", str(tmp_path / "benchmark.json"), "--json"]) == 0
    *shown, last = capsys.readouterr().out.splitlines()
    cost = json.loads(last)
    assert [run["gpus"] for run in cost["runs"]] == [1]
    assert cost["indivisible"] == [8, 64, 512]
    assert "A batch of 100 does not divide among 8, 64, 512 GPUs: --assume batch_size." in shown
    assert "The seconds of a step are those of that GPU." in re.sub(r"\s+", " ", " ".join(shown))


def test_units() -> None:
    assert [duration(value) for value in (0, 0.02, 119, 121, 7201, 3 * 86400)] == [
        *("-", "20 ms", "119 s", "2.02 min", "2 h", "3 days")
    ]
    assert [size(value) for value in (0, 12, 1500, 2e6, 3e9, 15.1e12, 2e15)] == [
        *("-", "12 B", "1.5 kB", "2 MB", "3 GB", "15.1 TB", "2 PB")
    ]


def transcripts() -> list[tuple[str, str]]:
    """Each command of the page with what it is said to print."""
    return re.findall(r"```console\n\$ python jobs/benchmark.py (.*?[^\\])\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(2))
def test_the_page_shows_what_its_commands_print(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """When this fails after a change, paste what the command prints."""
    assert len(transcripts()) == 2
    flags, shown = transcripts()[number]
    monkeypatch.chdir(ROOT)
    assert benchmark.main(shlex.split(flags.replace("\\\n", " "))) == 0
    printed = capsys.readouterr().out
    assert [line.rstrip() for line in printed.splitlines()] == shown.splitlines()
    assert max(map(len, shown.splitlines())) <= 120
    assert "…" not in shown  # no cell is cut
