"""A comparison from its flags to its numbers: every contender with every seed; the same call resumes."""

import json
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cifar.autoscaler import cluster_nodes
from cifar.compare.answers import read_answers
from cifar.compare.contenders import Contender, find_contenders, remarks
from cifar.compare.job import ComparisonJob
from cifar.compare.settings import CompareConfig
from cifar.compare.summary import Setup, summarize
from cifar.config import Config, ConfigError, RunFailed
from cifar.data import Prepared
from cifar.data.prepared import absolute, join, write_file
from cifar.data.shares import num_batches
from cifar.probe import other_nodes, probe, probe_source
from cifar.ray_job import Blocks
from cifar.run_dir import locked
from cifar.train import prepare_while_ray_starts, settle_network
from cifar.tune.execute import execute, make_scheduler
from cifar.tune.folder import claim_folder, name_folder
from cifar.tune.ledger import BUDGET, Ledger, Trial
from cifar.tune.plan import SweepPlan, make_sweep_plan
from cifar.tune.progress import SweepDisplay
from cifar.tune.settings import TuneConfig

SUMMARY = "compare.json"
EVERY_TRIAL = TuneConfig(search="random", scheduler="none", confirm="0", publish="none")
"""As a sweep says that no trial is chosen, ended early or kept."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `compare` leaves behind."""

    path: str
    summary: dict[str, Any]
    """What is in compare.json, which cifar.report draws."""


def compare(config: Config, settings: CompareConfig, recipe: str, given: Collection[str]) -> Comparison:
    """Train, fit and ask what `settings` names around `config`, which is the recipe but for the settings `given`.

    ConfigError for what the user can mend, before anything is trained; RunFailed when no contender has a run.
    """
    contenders = find_contenders(config, settings, recipe, given)
    for remark in remarks(contenders):
        logger.warning("%s", remark)
    probe(config.run.storage, "--storage")
    prepared = prepare_while_ray_starts(config)
    if (count := prepared.counts["test"]) < 2:
        raise ConfigError(f"--data {prepared.source}: test has {count} images, which rank nobody; use --test-fraction")
    for contender in contenders:
        check(contender, prepared)
    seeds = range(config.train.seed, config.train.seed + settings.seeds)
    runs = planned(contenders, seeds)
    plan = make_plan(config, contenders, settings, len(runs), prepared)
    logger.info("%s", plan)
    identity = {"contenders": [one.identity() for one in contenders], "fingerprint": prepared.fingerprint}
    name = config.run.name or name_folder(prepared, "comparison", identity)
    path = join(absolute(config.run.storage), name)
    if others := other_nodes():
        probe(config.run.storage, "--storage", others)
        if not plan.resident:
            probe_source(prepared.path, "$CIFAR_CACHE", others)
    claim_folder(path, "comparison", identity)
    logger.info("comparison: %s", path)
    with locked(path, "another process works on this comparison; wait, or give another --name"):
        ledger = Ledger(join(path, "runs"))
        try:
            run_all(ledger, runs, contenders, plan, config, prepared)
        except KeyboardInterrupt:
            logger.info("%s: keeps what was trained; the same command goes on", path)
            raise
        setup = Setup(config=config, contenders=contenders, prepared=prepared, plan=plan, path=path, recipe=recipe)
        summary = summarize(setup, ledger)
        write_file(join(path, SUMMARY), (json.dumps(summary) + "\n").encode())
    if not any(contender["n"] for contender in summary["contenders"]):
        reasons = {trial.reason for trial in ledger.trials.values() if trial.state == "failed"}
        raise RunFailed(f"{path}: no run came to an end; {'; '.join(sorted(reasons)[:3])}")
    return Comparison(path=path, summary=summary)


def check(contender: Contender, prepared: Prepared) -> None:
    """ConfigError if its network cannot be, or gets no batch."""
    if contender.config is None:
        return
    images = prepared.counts["train"]
    try:
        num_batches(images, contender.config.with_batch_size(images).train.batch_size, world_size=1)
        settle_network(contender.config, prepared)
    except ConfigError as error:
        raise ConfigError(f"contender {contender.name}: {error}") from None


def planned(contenders: Sequence[Contender], seeds: Sequence[int]) -> list[Trial]:
    """All runs, seed by seed, so that what an interrupted comparison has is balanced; what does not vary, once."""
    return [
        Trial(
            number=number,
            values={"contender": contender.name},
            seed=seed,
            epochs_planned=contender.config.train.epochs if contender.config else 1,
        )
        for seed in seeds
        for number, contender in enumerate(contenders)
        if contender.varies or seed == seeds[0]
    ]


def make_plan(
    config: Config, contenders: Sequence[Contender], settings: CompareConfig, runs: int, prepared: Prepared
) -> SweepPlan:
    """One that holds for every contender."""
    data_bytes = sum(prepared.num_bytes(split) for split in ("train", "val", "test"))
    there, coming = cluster_nodes()
    tune = replace(EVERY_TRIAL, trials=runs, at_once=settings.at_once)
    for contender in contenders:
        if contender.config is not None:
            config = contender.config  # they share what a plan depends on; another batch size may not divide
            make_sweep_plan(config, tune, data_bytes, [*there, *coming])
    return make_sweep_plan(config, tune, data_bytes, [*there, *coming])


def run_all(
    ledger: Ledger,
    runs: Sequence[Trial],
    contenders: Sequence[Contender],
    plan: SweepPlan,
    config: Config,
    prepared: Prepared,
) -> None:
    """The runs that are left: those not ended, and those whose answers are gone."""
    known = [ledger.add(trial) for trial in runs]
    for trial in known:
        if trial.state == "completed" and read_answers(ledger.path_of(trial), prepared.fingerprint) is None:
            trial.state = "waiting"
    waiting = [trial for trial in known if not trial.done]
    if not waiting:
        logger.info("all %d runs were done before", len(known))
        return
    train, val, test = None, None, None
    if plan.resident:
        columns = ["image", "label", "index"]
        train, val, test = (Blocks.of(prepared.table(split, columns)) for split in ("train", "val", "test"))
    job = ComparisonJob(
        config=config,
        space={},
        prepared=prepared,
        path=ledger.path,
        plan=plan,
        train=train,
        val=val,
        test=test,
        contenders={contender.name: contender for contender in contenders},
    )
    with SweepDisplay(len(known), plan.at_once, None) as display:
        display.known(list(ledger.trials.values()))
        ledger.changed = display.changed
        left = iter(waiting)
        scheduler = make_scheduler(EVERY_TRIAL, {}, 1)
        execute(job, ledger, scheduler, lambda: next(left, None), len(waiting), None, lambda trial: BUDGET)
        ledger.changed = lambda trial: None
