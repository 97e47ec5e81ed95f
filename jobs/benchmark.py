"""What each stage of a run costs, how long an accuracy takes, what more workers bring: python jobs/benchmark.py"""

import json
import os
import sys
from collections.abc import Sequence
from typing import Any

from cifar.benchmark.settings import Benchmark
from cifar.cli import run_job
from cifar.recipes import RECIPES


def measure(flags: Benchmark) -> dict[str, Any]:
    """Measure every stage of a run and, if asked, the time to an accuracy over seeds and the scaling over workers.

    With --cost, predict from what was measured what the run costs on many GPUs."""
    if flags.cost:
        return predict(flags)
    # Before torch is imported, whose profiler tells every start and stop otherwise.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    # Not above: --help needs neither Ray nor torch.
    from cifar.benchmark.run import benchmark
    from cifar.benchmark.show import show
    from cifar.data.prepared import join, write_file

    result = benchmark(flags)
    output = join(flags.output, "benchmark.json")
    write_file(output, (json.dumps(result, indent=1) + "\n").encode())
    show(result)
    print(f"numbers: {output}")
    return result | {"output": output}


def predict(flags: Benchmark) -> dict[str, Any]:
    from cifar.benchmark.cost import predict_cost
    from cifar.benchmark.show_cost import show_cost
    from cifar.config import ConfigError
    from cifar.data.prepared import read_object

    remedy = "write one by jobs/benchmark.py without --cost"
    measured = read_object(flags.cost, remedy)
    if measured is None:
        raise ConfigError(f"--cost {flags.cost}: there is no such file; {remedy}")
    cost = predict_cost(measured, flags.cost, flags.assume)
    show_cost(cost)
    return cost


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(measure, {name: Benchmark.of(recipe()) for name, recipe in RECIPES.items()}, argv)


if __name__ == "__main__":
    sys.exit(main())
