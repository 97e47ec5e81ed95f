"""A soup is the mean of what val gains by, and answers as its weights say."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cifar.config import Config, ConfigError, ModelConfig, TransferConfig
from cifar.evaluate import evaluate
from cifar.model_dir import LoadedModel, load_model
from cifar.predictor import Predictor
from cifar.soup import accuracy_of, make_soup, mean_of, measure_statistics
from cifar.train import Run, fit
from jobs.models import main


def trained(here: Config, name: str, seed: int, **values: object) -> Run:
    return fit(replace(here, train=replace(here.train, seed=seed), run=replace(here.run, name=name), **values))


@pytest.fixture
def runs(here: Config) -> list[Run]:
    """Three that began at the weights of one."""
    start = trained(here, "start", 0)
    transfer = TransferConfig(weights=start.model)
    return [trained(here, f"run-{seed}", seed, transfer=transfer) for seed in (1, 2, 3)]


def test_the_mean_is_of_weights_and_statistics(runs: list[Run]) -> None:
    models = [load_model(run.model) for run in runs]
    found = mean_of(models).model.state_dict()
    for name, value in found.items():
        expected = [model.model.state_dict()[name] for model in models]
        if value.is_floating_point():
            torch.testing.assert_close(value, sum(expected[1:], expected[0]) / 3)
        else:
            assert torch.equal(value, expected[0])
    assert torch.equal(mean_of([models[0]]).model.head.weight, models[0].model.head.weight)


def test_statistics_are_those_of_the_training_images(runs: list[Run]) -> None:
    """Of the first norm, whose input no other norm has changed: against the plain mean and variance."""
    model, prepared = load_model(runs[0].model).model, runs[0].prepared
    norm = next(module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d))
    inputs: list[torch.Tensor] = []
    momentum = norm.momentum
    with torch.inference_mode():
        hook = norm.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
        measure_statistics(model, prepared)
        hook.remove()
    seen = torch.cat(inputs)
    assert len(seen) == prepared.counts["train"]
    assert norm.running_mean is not None
    torch.testing.assert_close(norm.running_mean, seen.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    assert not model.training
    assert (norm.momentum, norm.training) == (momentum, False)


def test_a_soup_is_never_worse_on_val_than_its_best(runs: list[Run], tmp_path: Path) -> None:
    models = [load_model(run.model) for run in runs]
    soup = make_soup(models, runs[0].prepared, tmp_path / "soup")
    assert soup.accuracies == [accuracy_of(load_model(run.model), runs[0].prepared) for run in runs]
    assert soup.accuracy >= max(soup.accuracies)
    assert soup.kept[0] == soup.accuracies.index(max(soup.accuracies))
    loaded = load_model(tmp_path / "soup")
    assert loaded.metrics["ingredients"] == len(soup.kept)
    assert loaded.calibration.split == "val"
    assert evaluate(Predictor(loaded, "cpu"), runs[0].prepared, "val").accuracy == soup.accuracy


def test_what_val_loses_by_stays_out(runs: list[Run], tmp_path: Path) -> None:
    """The second one's head says the opposite."""
    good, bad = load_model(runs[0].model), load_model(runs[1].model)
    with torch.no_grad():
        for parameter in bad.model.head.parameters():
            parameter.mul_(-10)
    soup = make_soup([bad, good], runs[0].prepared, tmp_path / "soup")
    assert soup.kept == [1]
    assert torch.equal(load_model(tmp_path / "soup").model.head.weight, good.model.head.weight)


def test_networks_of_another_kind_are_refused(here: Config, runs: list[Run], tmp_path: Path) -> None:
    other = load_model(trained(here, "other", 0, model=ModelConfig(widths=(8, 24))).model)
    mine = load_model(runs[0].model)
    with pytest.raises(ConfigError, match="model 2 of the soup: is another network"):
        make_soup([mine, other], runs[0].prepared, tmp_path / "soup")
    renamed: LoadedModel = replace(mine, info=replace(mine.info, classes=("x", *mine.info.classes[1:])))
    with pytest.raises(ConfigError, match="model 2 of the soup: was trained on other data"):
        make_soup([mine, renamed], runs[0].prepared, tmp_path / "soup")
    assert not (tmp_path / "soup").exists()


def test_the_command_writes_a_model_that_can_be_published(
    runs: list[Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, store = str(tmp_path / "soup"), str(tmp_path / "models")
    assert main(["soup", *(run.path for run in runs), "--output", output]) == 0
    shown = capsys.readouterr().out
    assert all(f"of {run.path}" in shown for run in runs)
    assert f"model: {output}" in shown
    assert main(["publish", output, "--name", "soup", "--store", store]) == 0
    assert main(["soup", *(run.path for run in runs), "--output", output]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["soup", runs[0].path, "--output", str(tmp_path / "one")]) == 2
    assert "name two models or more" in capsys.readouterr().err
