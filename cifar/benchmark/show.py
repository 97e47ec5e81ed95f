"""The numbers as tables for a terminal of 120 columns."""

import sys
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

WIDTH = 116
BUSY = 0.5
"""Load average above which figures are doubtful."""


def show(result: dict[str, Any]) -> None:
    """Print what `cifar.benchmark.run.benchmark` gives."""
    console = Console(file=sys.stdout, width=WIDTH, highlight=False, markup=False, soft_wrap=False)
    machine, ceiling = result["machine"], result["ceiling"]
    console.print(
        f"{machine['device_name']}, {machine['cores']} cores, {machine['threads']} threads, torch {machine['torch']}, "
        f"{machine['date']}"
    )
    if (load := machine["load_average"]) is not None and load > BUSY:
        console.print(f"The machine was busy before this began (load average {load:.1f}): expect slower figures.")
    console.print(
        f"{result['data']}: {result['counts']['train']:,} training images, batch size {result['batch_size']}, "
        f"{result['loader']} data"
    )
    console.print(
        f"Ceiling: {flops(ceiling['flops_per_second'])} in matrix products of {ceiling['side']}, "
        f"{ceiling['precision']} (median of {ceiling['n']}; before {flops(ceiling['before'])}, "
        f"after {flops(ceiling['after'])}, best {flops(ceiling['best'])})"
    )
    console.print(_stages(result["stages"]))
    console.print("Busy time of a training step, by kind of operator:")
    console.print(columns(["", "share"], [[kind, f"{share:.1%}"] for kind, share in result["operators"].items()]))
    if result["seeds"]:
        _show_seeds(console, result["seeds"])
    if result["scaling"]:
        _show_scaling(console, result["scaling"])


def _stages(stages: Sequence[dict[str, Any]]) -> Table:
    rows, before = [], ""
    for stage in stages:
        rows.append(
            [
                "" if stage["stage"] == before else stage["stage"],
                stage["variant"],
                seconds(stage["seconds"]),
                f"{seconds(stage['low'])} to {seconds(stage['high'])}",
                str(stage["n"]),
                _optional(stage["images_per_second"], "{:,.0f}"),
                _optional(stage["flops_per_second"], "{}", flops),
                _optional(stage["ceiling_share"], "{:.0%}"),
            ]
        )
        before = stage["stage"]
    return columns(["stage", " ", "median", "from, to", "n", "images/s", "FLOP/s", "of ceiling"], rows, texts=2)


def _show_seeds(console: Console, seeds: dict[str, Any]) -> None:
    console.print(f"Time to accuracy, on {seeds['split']}:")
    rows = [
        [
            str(run["seed"]),
            f"{run['accuracy']:.4f}",
            *(f"{run[key]:.1f} s" for key in ("train_seconds", "evaluation_seconds", "seconds", "wall_seconds")),
            _optional(run["target_seconds"], "{:.1f} s", missing="never" if seeds["target"] else ""),
        ]
        for run in seeds["runs"]
    ]
    target = f"to {seeds['target']:g}" if seeds["target"] else ""
    console.print(columns(["seed", "accuracy", "training", "evaluation", "both", "fit()", target], rows, texts=1))
    for name, form in (("accuracy", "{:.4f}"), ("train_seconds", "{:.1f} s"), ("seconds", "{:.1f} s")):
        console.print(f"{name.replace('_', ' ')}: {_statistics(seeds[name], form)}")
    if seeds["target"]:
        mean = _optional(seeds["target_seconds"], ", {:.1f} s of training on the mean")
        console.print(f"val accuracy {seeds['target']:g}: {seeds['target_reached']} of {len(rows)} runs reach it{mean}")


def _statistics(values: dict[str, Any], form: str) -> str:
    if values["n"] == 1:
        return f"{form.format(values['mean'])}, n = 1"
    low, high = values["ci95"]
    return (
        f"mean {form.format(values['mean'])}, 95 % interval {form.format(low)} to {form.format(high)}, standard "
        f"deviation {form.format(values['sd'])}, standard error {form.format(values['standard_error'])}, "
        f"n = {values['n']}"
    )


def _show_scaling(console: Console, scaling: dict[str, Any]) -> None:
    model = scaling["model"]
    link = model["link"]
    console.print(
        f"Workers, {scaling['batch_size']} images a step together at {scaling['image_size']} pixels; the cluster has "
        f"{scaling['nodes']} node(s), {scaling['cpus']:g} CPU, {scaling['gpus']} GPU, and workers on a node share its "
        "cores. What is predicted is a prediction, for workers that each have a processor like the one measured: "
        f"{seconds(model['fixed'])} a step and {seconds(model['per_image'])} an image, "
        f"{model['gradient_bytes'] / 1e6:.2f} MB of gradients over {link['bytes_per_second'] * 8e-9:.3g} Gbit/s and "
        f"{seconds(link['latency'])} a message ({link['source']})."
    )
    measured = {m["workers"]: m for m in scaling["measured"]}
    predicted = {p["workers"]: p for p in scaling["predicted"]}
    rows = []
    for workers in sorted(measured.keys() | predicted.keys()):
        there, thought = measured.get(workers, {}), predicted.get(workers, {})
        rows.append(
            [
                str(workers),
                *("-" if "error" in there else _optional(there.get(key), form) for key, form in _MEASURED),
                *(_optional(thought.get(key), form, via) for key, form, via in _PREDICTED),
            ]
        )
    heads = ["workers", "images/s", "speed-up", "efficiency", "images/s", "efficiency", "step", "all-reduce", "epoch"]
    titled = [heads[0], *(f"{'measured' if n < 3 else 'predicted'}\n{head}" for n, head in enumerate(heads[1:]))]
    console.print(columns(titled, rows, texts=1))
    for m in scaling["measured"]:
        if "error" in m:
            console.print(f"{m['workers']} workers were not measured: {m['error']}")


def columns(heads: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> Table:
    """The first `texts` columns hold text, the others numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    for number, head in enumerate(heads):
        table.add_column(head, justify="left" if number < texts else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _optional(value: Any, form: str, via: Any = None, missing: str = "") -> str:
    return missing if value is None else form.format(via(value) if via else value)


def seconds(value: float) -> str:
    for limit, factor, unit in ((1e-3, 1e6, "us"), (1.0, 1e3, "ms")):
        if value < limit:
            return f"{value * factor:.3g} {unit}"
    return f"{value:.2f} s" if value < 100 else f"{value:,.0f} s"


def flops(value: float) -> str:
    return f"{value / 1e12:.2f} T" if value >= 1e12 else f"{value / 1e9:.3g} G"


_MEASURED = (("images_per_second", "{:,.0f}"), ("speedup", "{:.2f}"), ("efficiency", "{:.0%}"))
_PREDICTED = (
    ("images_per_second", "{:,.0f}", None),
    ("efficiency", "{:.0%}", None),
    ("step_seconds", "{}", seconds),
    ("all_reduce_seconds", "{}", seconds),
    ("epoch_seconds", "{}", seconds),
)
