"""A predicted cost as tables for a terminal of 120 columns."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console

from cifar.benchmark.show import BUSY, WIDTH, columns, flops, seconds

LEAST_EFFECT = 0.02
"""Inputs that change less, halved or doubled, are left out."""
WAYS = ("halved", "doubled")
MOST_THAT_STAYS = "most that stays"

Run = dict[str, Any]


def show_cost(cost: dict[str, Any]) -> None:
    """Print what `cifar.benchmark.cost.predict_cost` gives."""
    console = Console(file=sys.stdout, width=WIDTH, highlight=False, markup=False, soft_wrap=False)
    machine, work, made, runs = cost["machine"], cost["work"], cost["preparation"], cost["runs"]
    load = machine["load_average"] or 0
    console.print(
        f"A prediction. Measured on {machine['device_name']}, {machine['date'][:10]}"
        + (f", on busy cores (load {load:.1f})" if load > BUSY else "")
        + f": {flops(work['flops_per_image'])}FLOP an image trained, {size(cost['gradient_bytes'])} of gradients, "
        f"{size(cost['checkpoint_bytes'])} a checkpoint, {cost['stream_rate']:,.0f} images/s streamed and "
        f"{cost['decode_rate']:,.0f} decoded by a core, {duration(cost['start_seconds'])} to start. "
        + (
            "The seconds of a step are those of that GPU."
            if cost["on_gpu"]
            else "No GPU was measured: its seconds follow from the FLOPs and from what is assumed below."
        )
    )
    console.print(
        f"The run: {work['images']:,} images of {cost['image_size']} pixels, {work['epochs']} epochs, "
        f"{work['steps']:,} steps of {work['batch_size']:,} images, {work['val_images']:,} val images after each "
        f"epoch; {work['loader']} data ({work['reason']})."
    )
    found = f" {size(made['file_bytes'])} of files" if made["file_bytes"] else ""
    console.print(
        f"Before, once: decoding{found} takes {duration(made['core_hours'] * 3600)} of a core, or "
        f"{duration(made['hours'] * 3600)} of the CPU nodes, for {usd(made['usd'])}; the prepared set has "
        f"{size(made['prepared_bytes'])}, for {usd(made['usd_per_month'])} a month."
    )
    if cost["indivisible"]:
        counts = ", ".join(f"{count:,}" for count in cost["indivisible"])
        console.print(f"A batch of {work['batch_size']:,} does not divide among {counts} GPUs: --assume batch_size.")
    rows: list[list[str]] = []
    for title, lines in TABLE:
        rows += [[""] * (1 + len(runs))] * bool(rows)
        rows.append([title, *[""] * len(runs)])
        rows += [[f"  {name}", *(form(run[key]) for run in runs)] for name, key, form in lines]
    console.print(columns(["GPUs", *(f"{run['gpus']:,}" for run in runs)], rows))
    console.print(
        f"Up to {cost['pays_up_to']:,} GPUs each brings half of what one alone does, or more; the run is shortest on "
        f"{cost['fastest']:,}. Powers of two were tried."
    )
    console.print(f"What one could change, each alone, on {runs[-1]['gpus']:,} GPUs (* trains another model):")
    rows = [
        [row["change"], duration(row["seconds"]), usd(row["usd"]), share(row["efficiency"]), row["serial"]]
        for row in [runs[-1] | {"change": "nothing"}, *cost["changes"]]
    ]
    console.print(columns(["", "time", "cost", "efficiency", MOST_THAT_STAYS], rows))
    console.print("What the time depends on: its factor when an input is halved or doubled. Others count for less.")
    counts = cost["sensitivity"][0]["gpus"]
    rows = [
        [row["input"], *(f"{row[way][at]:.2f}" for at in range(len(counts)) for way in WAYS)]
        for row in cost["sensitivity"]
        if any(abs(factor - 1) >= LEAST_EFFECT for factor in row["halved"] + row["doubled"])
    ]
    heads = [f"{count:,} GPU{'s' * (count > 1)}\n{way}" for count in counts for way in WAYS]
    console.print(columns(["input", *heads], rows))
    console.print("Assumed; --assume NAME VALUE ... changes it:")
    for each in cost["assumptions"]:
        value = f"{each['value']:.4g}" if each["value"] else ""
        console.print(f"  {each['name']:<16} {value:>9}  {each['source']}")


def duration(value: float) -> str:
    if value < 120:
        return seconds(value) if value else "-"
    for limit, unit, name in ((7200, 60, "min"), (48 * 3600, 3600, "h")):
        if value < limit:
            return f"{value / unit:.3g} {name}"
    return f"{value / 86400:.3g} days"


def size(value: float) -> str:
    """Bytes in SI units."""
    for factor, unit in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.0f} B" if value else "-"


def rate(value: float) -> str:
    return f"{size(value)}/s" if value else "-"


def usd(value: float) -> str:
    return f"{value:,.0f} USD" if value >= 100 else f"{value:.2f} USD"


def share(value: float) -> str:
    if not value:
        return "-"
    return f"{value:.0%}" if value >= 0.1 else f"{value:.1%}"


def few(value: float) -> str:
    return f"{value:.2g}" if value else "-"


TABLE: Sequence[tuple[str, Sequence[tuple[str, str, Callable[[Any], str]]]]] = (
    (
        "the run",
        (
            ("time", "seconds", duration),
            ("cost of the GPU nodes", "usd", usd),
            ("efficiency against one GPU", "efficiency", share),
            ("most time goes to", "limit", str),
            (MOST_THAT_STAYS, "serial", str),
            ("start-up", "start_seconds", duration),
            ("training", "train_seconds", duration),
            ("evaluation", "evaluation_seconds", duration),
        ),
    ),
    (
        "a step",
        (
            ("images for each GPU", "images_per_gpu", "{:,.0f}".format),
            ("arithmetic", "compute_seconds", duration),
            ("fixed: launches, optimizer", "fixed_seconds", duration),
            ("all-reduce", "all_reduce_seconds", duration),
            ("its data's arrival, meanwhile", "data_seconds", duration),
            ("all of it", "step_seconds", duration),
            ("all-reduce's share", "all_reduce_share", share),
            ("images/s", "images_per_second", "{:,.0f}".format),
        ),
    ),
    (
        "data",
        (
            ("read from storage, all nodes", "read_rate", rate),
            ("read by a node", "node_read_rate", rate),
            ("read in an epoch", "epoch_read_bytes", size),
            ("cores busy loading, each GPU", "cores_per_gpu", few),
            ("if every epoch decoded files", "decode_cores_per_gpu", few),
            ("object store of a node", "store_bytes", size),
            ("pixels' share of each GPU", "share_bytes", size),
        ),
    ),
    (
        "network",
        (
            ("all-reduce, a GPU in a step", "all_reduce_bytes", size),
            ("all-reduce, a node in an epoch", "epoch_network_bytes", size),
        ),
    ),
    (
        "checkpoints and faults",
        (
            ("checkpoints", "checkpoints", "{:,}".format),
            ("steps between two", "checkpoint_steps", "{:,}".format),
            ("time between two", "checkpoint_interval", duration),
            ("bytes written in all", "checkpoint_bytes", size),
            ("time spent saving", "save_seconds", duration),
            ("faults expected", "faults", few),
            ("time lost to them", "lost_seconds", duration),
        ),
    ),
)
