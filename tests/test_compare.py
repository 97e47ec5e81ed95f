"""Who is compared, what runs leave behind, and what is made of them; without Ray."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.dummy import DummyClassifier

from cifar.compare import baselines
from cifar.compare.answers import FILE, Answers, answer, read_answers, write_answers
from cifar.compare.baselines import METHODS, extract, fit_baseline, gather, reduced
from cifar.compare.contenders import RANDOM, Contender, find_contenders, remarks
from cifar.compare.cost import network_cost
from cifar.compare.run import planned
from cifar.compare.settings import CompareConfig
from cifar.compare.summary import differing, summarize
from cifar.config import Config, ConfigError, DataConfig, ModelConfig
from cifar.data import prepare
from cifar.data.prepared import Arrays
from cifar.models import build_model
from cifar.recipes import RECIPES, fast, notebook
from cifar.tune.ledger import Ledger
from jobs import train as job
from jobs.compare import main
from tests.comparisons import make_comparison, make_setup


def found(given: Sequence[str] = (), config: Config | None = None, **flags: Any) -> list[Contender]:
    return find_contenders(config or fast(), CompareConfig(**flags), "fast", given)


def configs(*args: Any, **flags: Any) -> list[Config]:
    return [one.config for one in found(*args, **flags) if one.config is not None]


def test_optimizers_keep_all_but_the_rate_of_another_optimizer() -> None:
    muon, adam = configs(optimizers="muon,adam")
    assert muon == fast()
    assert adam == replace(fast(), optim=replace(fast().optim, optimizer="adam", lr=0.0))
    base = replace(fast(), optim=replace(fast().optim, lr=0.03))
    assert [one.optim.lr for one in configs({"lr"}, base, optimizers="muon,adam")] == [0.03, 0.03]


def test_models_have_their_own_widths_unless_a_flag_gives_some() -> None:
    base = replace(fast(), train=replace(fast().train, scales=(1.0,)), model=replace(fast().model, tta="none"))
    cnn, other, zoo = configs((), base, models="cnn,notebook,resnet18")
    assert cnn == base
    assert other.model == replace(notebook().model, tta="none")
    assert zoo.model == replace(base.model, model="resnet18")
    assert other.train == zoo.train == base.train
    given = replace(base, model=replace(base.model, widths=(8, 16), depths=(2,)))
    assert [one.model.widths for one in configs({"widths", "depths"}, given, models="cnn,notebook")] == [(8, 16)] * 2


def test_recipes_share_the_data_and_what_flags_give() -> None:
    base = replace(fast(), train=replace(fast().train, epochs=2, seed=7), data=DataConfig(val_fraction=0.3))
    first, second = configs({"epochs", "seed"}, base, recipes="record94,notebook")
    assert first == replace(
        RECIPES["record94"](), data=base.data, train=replace(RECIPES["record94"]().train, epochs=2, seed=7)
    )
    assert second.optim == notebook().optim
    assert (second.data, second.train.epochs) == (base.data, 2)


def test_variants_change_what_they_name() -> None:
    one, two, three = found(variants=("base", "lr=0.1 --head-norm=true tta=none", "wide: widths=96,192,384 depths=2"))
    assert [one.name, two.name, three.name] == ["base", "lr=0.1 --head-norm=true tta=none", "wide"]
    assert one.config == fast()
    assert two.config == replace(
        fast(), optim=replace(fast().optim, lr=0.1), model=replace(fast().model, head_norm=True, tta="none")
    )
    assert three.config == replace(fast(), model=replace(fast().model, widths=(96, 192, 384), depths=(2,)))


def test_adamw_without_weight_decay_is_told_to_be_adam() -> None:
    assert remarks(found(optimizers="sgd,adam,adamw")) == [
        "adam and adamw are the same here: without --weight-decay AdamW is Adam."
    ]
    decayed = replace(fast(), optim=replace(fast().optim, weight_decay=0.01))
    assert remarks(found((), decayed, optimizers="adam,adamw")) == []
    assert remarks(found(variants=("optimizer=adam lr=0.01", "optimizer=adamw lr=0.02"))) == []


def test_baselines_meet_the_commands_own_network() -> None:
    names = [one.name for one in found(baselines="svm,knn", features="hog,pixels")]
    assert names == ["cnn", "svm-hog", "knn-hog", "svm-pixels", "knn-pixels"]
    assert [one.name for one in found(models="cnn,resnet18", baselines="svm", features="hog")] == [
        *("cnn", "resnet18", "svm-hog"),
    ]


@pytest.mark.parametrize(
    "flags",
    [
        {"optimizers": "sgd,muon"},
        {"recipes": "record94,notebook"},
        {"variants": ("base", "widths=96,192,384 depths=2 head_norm=true train_blocks=2 compile=true")},
    ],
)
def test_a_contenders_command_trains_its_run(flags: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Read by jobs/train.py's own flags."""
    seen: list[Config] = []

    def remember(config: Config) -> dict[str, Any]:
        """Nothing is trained."""
        seen.append(config)
        return {}

    monkeypatch.setattr(job, "train", remember)
    contenders = found(**flags)
    for one in contenders:
        assert job.main(shlex.split(one.command(seed=5))[2:]) == 0
    assert seen == [
        replace(one.config, train=replace(one.config.train, seed=5)) for one in contenders if one.config is not None
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "nothing to compare: name two or more with --optimizers"),
        (["--optimizers", "sgd"], "only sgd to compare"),
        (["--variants", "cutout=8"], "only cutout=8 to compare"),
        (["--optimizers", "sgd,sdg"], "--optimizers sgd,sdg: there is no 'sdg'; use sgd, adam"),
        (["--optimizers", "sgd,sgd"], "--optimizers sgd,sgd: names sgd twice"),
        (["--optimizers", "sgd,"], "--optimizers sgd,: there is no ''"),
        (["--recipes", "fast,faster"], "--recipes fast,faster: there is no 'faster'; use fast, record94"),
        (["--baselines", "tree"], "--baselines tree: there is no 'tree'; use logistic, svm, forest, knn"),
        (["--baselines", "knn", "--features", ""], "--features: empty"),
        (["--baselines", "knn", "--features", "sift"], "--features sift: there is no 'sift'"),
        (["--models", "cnn,res net"], "--models cnn,res net: 'res net' is no name"),
        (["--models", "cnn,notebook"], "contender notebook: --scales"),
        (["--optimizers", "muon,sgd", "--layer-decay", "0.5"], "--optimizer muon: sets the size"),
        (["--variants", "base", "lr=0.2"], "base and lr=0.2 are the same settings"),
        (["--variants", "a: lr=1", "a: lr=2"], "two contenders are called a"),
        (["--variants", "base", ""], "--variants '': empty"),
        (["--variants", "base", "lr=fast"], "--variants 'lr=fast': lr=fast: use a number"),
        (["--variants", "base", "epochs=2.5"], "epochs=2.5: use a whole number"),
        (["--variants", "base", "flip=up"], "flip=up: use none, random, alternating"),
        (["--variants", "base", "head-norm=maybe"], "head_norm=maybe: use true, false"),
        (["--variants", "base", "lr"], "lr has no value; use lr=VALUE"),
        (["--variants", "base", "lr=1 lr=2"], "gives lr twice"),
        (["--variants", "base", "learning=1"], "there is no setting 'learning'; those are accumulate"),
        (["--variants", "base", "seed=1"], "seed is the same for all"),
        (["--variants", "base", "image-size=64"], "all contenders share image_size"),
        (["--variants", "base", "lr=-1"], "contender lr=-1: --lr -1.0: use a positive number"),
        (["--optimizers", "sgd,adam", "--seeds", "0"], "--seeds 0: use 1 to 1000"),
        (["--optimizers", "sgd,adam", "--at-once", "-1"], "--at-once -1: use 1 or more"),
    ],
)
def test_what_cannot_be_compared_is_one_error(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags, "--data", "/no/such/folder"]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""


def test_runs_are_planned_seed_by_seed_and_what_does_not_vary_once() -> None:
    contenders = found(baselines="svm,forest", features="hog")
    plan = [(trial.values["contender"], trial.seed) for trial in planned(contenders, range(4, 6))]
    assert plan == [("cnn", 4), ("svm-hog", 4), ("forest-hog", 4), ("cnn", 5), ("forest-hog", 5)]


def test_what_networks_differ_in_is_said_with_the_rates_that_are_used() -> None:
    table = differing(found(optimizers="muon,adam", baselines="knn"))
    assert table == {
        "optimizer": {"muon": "muon", "adam": "adam"},
        "lr": {"muon": 0.2, "adam": 0.001},
    }
    assert differing(found(variants=("base", "widths=8,16,32"))) == {
        "widths": {"base": "64 128 256", "widths=8,16,32": "8 16 32"}
    }


def test_answers_come_back_in_the_order_of_the_images(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    order = generator.permutation(25)
    images = np.broadcast_to(order[:, None, None, None], (25, 4, 4, 3)).astype(np.uint8)
    batches = [Arrays(images[rows], order[rows] % 3, order[rows]) for rows in (slice(0, 10), slice(10, 25))]
    found = answer(lambda images: (images[:, 0, 0, 0] % 2).astype(np.int64), batches, "print")
    assert found.indices.tolist() == list(range(25))
    assert found.correct.tolist() == [number % 3 == number % 2 for number in range(25)]
    write_answers(str(tmp_path), found)
    back = read_answers(str(tmp_path), "print")
    assert back is not None
    assert (back.predictions == found.predictions).all()
    assert back.seconds == found.seconds
    assert read_answers(str(tmp_path / "other"), "print") is None
    with pytest.raises(ConfigError, match=r"answers.parquet: answers about other images; delete it"):
        read_answers(str(tmp_path), "another")
    for damaged in (b"", b"PAR1", (tmp_path / FILE).read_bytes()[:-20]):
        (tmp_path / FILE).write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"answers.parquet: damaged.*delete it, and the same command asks again"):
            read_answers(str(tmp_path), "print")


def test_runs_on_different_images_are_not_compared(tmp_path: Path) -> None:
    make_comparison(tmp_path, {"muon": 1.0, "adam": 0.9}, seeds=1, images=50)
    other = np.arange(50)
    path = tmp_path / "comparison/runs/00001-seed0"
    write_answers(str(path), Answers(indices=other, labels=other, predictions=other, fingerprint="0123abcd", seconds=1))
    with pytest.raises(ConfigError, match="its runs answered different images"):
        summarize(make_setup(tmp_path, ["muon", "adam"], 50), Ledger(str(tmp_path / "comparison/runs")))


def test_the_summary_ranks_by_the_mean_and_says_what_holds(tmp_path: Path) -> None:
    summary = make_comparison(tmp_path, {"sgd": 0.4, "muon": 1.0, "adam": 1.0, "svm-hog": -0.5}, images=4000)
    names = [one["name"] for one in summary["contenders"]]
    assert {*names[:2]} == {"muon", "adam"}
    assert names[2:] == ["sgd", "svm-hog"]
    means = [one["mean"] for one in summary["contenders"]]
    assert means == sorted(means, reverse=True)
    for one in summary["contenders"]:
        runs = [run["accuracy"] for run in one["runs"]]
        assert one["mean"] == pytest.approx(np.mean(runs))
        assert one["interval"][0] < one["mean"] < one["interval"][1]
        assert one["n"] == len(runs) == (1 if one["name"] == "svm-hog" else 3)
    kinds = {(pair["first"], pair["second"]): pair["verdict"]["kind"] for pair in summary["pairs"]}
    assert kinds[names[0], names[1]] == "open"
    assert kinds["sgd", "svm-hog"] == "holds", "a baseline without chance needs one run"
    assert sum(one["first"] for one in summary["contenders"]) == pytest.approx(1)
    assert all(pair["difference"] >= 0 for pair in summary["pairs"])
    best, *_ = summary["headline"]
    assert "has the highest test accuracy" in best
    assert "It is ahead of sgd and svm-hog, by more than seeds and images explain." in best
    assert "cannot be told apart" in best
    assert summary["contenders"][3]["flops"] is None
    assert json.loads(json.dumps(summary)) == summary


def test_parameters_and_flops_are_the_networks() -> None:
    for recipe in (fast(), notebook()):
        parameters, flops = network_cost(recipe, 10)
        network = build_model(recipe, 10, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        assert parameters == sum(parameter.numel() for parameter in network.parameters())
        assert flops > 2 * parameters
    # He 2016: 11.17 million parameters, 0.56 billion products for an image of 32 pixels.
    parameters, flops = network_cost(replace(fast(), model=ModelConfig(model="resnet18")), 10)
    assert (round(parameters / 1e6, 2), round(flops / 1e9, 2)) == (11.17, 1.11)


@pytest.mark.slow
def test_attention_counts() -> None:
    """12 layers of 65 places and 768 features: four projections, a hidden layer of 3072, and two products by place."""
    _, flops = network_cost(replace(fast(), model=ModelConfig(model="vit_b_16")), 10)
    layer = 2 * 65 * (4 * 768**2 + 2 * 768 * 3072) + 2 * 2 * 65 * 65 * 768
    ends = 2 * 64 * 768 * 3 * 4 * 4 + 2 * 768 * 10
    assert flops == 12 * layer + ends


@pytest.fixture(scope="module")
def digits() -> tuple[Arrays, Arrays, Arrays]:
    """Train, val and test of scikit-learn's digits, at 16 pixels."""
    prepared = prepare(DataConfig(data="digits", image_size=16))
    train, val, test = (
        gather(prepared.batches(split, 500), prepared.counts[split], 10_000) for split in ("train", "val", "test")
    )
    return train, val, test


@pytest.mark.slow
@pytest.mark.parametrize("features", ["pixels", "hog"])
@pytest.mark.parametrize("estimator", METHODS)
def test_baselines_learn_digits(estimator: str, features: str, digits: tuple[Arrays, Arrays, Arrays]) -> None:
    train, val, test = digits
    threads = torch.get_num_threads()
    fitted = fit_baseline(estimator, features, train, val, 0, 1)
    torch.set_num_threads(threads)
    assert np.mean(fitted.predict(test.images) == test.labels) > 0.9
    assert fitted.tried.keys() == METHODS[estimator].options.keys()
    assert fitted.val_accuracy == max(fitted.tried.values())
    assert fitted.val_accuracy == np.mean(fitted.predict(val.images) == val.labels)
    assert fitted.images == len(train.labels)
    assert fitted.parameters > 1000
    assert json.loads(json.dumps(fitted.describe()))["chosen"] == fitted.chosen
    again = fit_baseline(estimator, features, train, val, 1, 1).predict(test.images)
    torch.set_num_threads(threads)
    assert (again == fitted.predict(test.images)).all() == (estimator not in RANDOM)


def test_a_method_takes_what_val_likes_best(digits: tuple[Arrays, Arrays, Arrays], monkeypatch: Any) -> None:
    train, val, _ = digits
    options: Any = {"3": lambda seed, threads: DummyClassifier(strategy="constant", constant=3)}
    options["5"] = lambda seed, threads: DummyClassifier(strategy="constant", constant=5)
    monkeypatch.setitem(baselines.METHODS, "knn", baselines.Method("constant", 0, False, options))
    monkeypatch.setattr(baselines, "_numbers", lambda pipeline: 0)
    for wanted in (3, 5):
        rows = np.flatnonzero((val.labels == wanted) | (val.labels == 7))
        fitted = fit_baseline("knn", "pixels", train, Arrays(*(column[rows] for column in val)), 0, 1)
        assert fitted.chosen == str(wanted)


def test_only_so_many_images_are_gathered_and_the_same_each_time(digits: tuple[Arrays, Arrays, Arrays]) -> None:
    train, _, _ = digits
    count = len(train.labels)
    batches = [Arrays(*(column[start : start + 100] for column in train)) for start in range(0, count, 100)]
    some = gather(batches, count, 50)
    assert len(set(some.indices.tolist())) == 50
    assert some.indices.tolist() == gather(batches, count, 50).indices.tolist()
    places = {index: place for place, index in enumerate(train.indices.tolist())}
    rows = [places[index] for index in some.indices.tolist()]
    assert (some.images == train.images[rows]).all()
    assert (some.labels == train.labels[rows]).all()
    assert gather(batches, count, count).indices.tolist() == train.indices.tolist()


def test_large_images_are_reduced_to_their_means() -> None:
    blocks = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    assert reduced(blocks) is blocks
    large = blocks.repeat(4, 1).repeat(4, 2)
    small = reduced(large)
    assert small.shape == (2, 32, 32, 3)
    assert small.dtype == np.uint8
    gray = reduced(np.full((1, 200, 200, 3), 77, np.uint8))
    assert (gray == 77).all()


@pytest.mark.parametrize(("side", "hog"), [(32, 324), (16, 324), (8, 324)])
def test_features_are_as_long_as_they_say(side: int, hog: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, side, side, 3), np.uint8)
    assert extract(images, "pixels").shape == (3, side * side * 3)
    assert extract(images, "pixels").max() <= 1
    found = extract(images, "hog")
    assert found.shape == (3, hog)
    assert found.dtype == np.float32
    flat = np.full((1, side, side, 3), 9, np.uint8)
    assert not extract(flat, "hog").any(), "without gradients there is nothing to count"
