"""The page of a sweep: says what sweep.json holds, honestly; opens offline; stands every sweep that can happen."""

import copy
import json
import math
import random
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import sync_playwright

from cifar.report import write_sweep_report
from cifar.report.sweep import headline, importances, last_values
from cifar.report.sweep_figures import Scale, floor, lines, scale
from tests.test_report import NASTY, Page

SPACE = {
    "lr": {"kind": "float", "low": 0.02, "high": 0.5, "log": True},
    "epochs": {"kind": "int", "low": 2, "high": 9, "log": False},
    "label_smoothing": {"kind": "float", "low": 0.0, "high": 0.3, "log": False},
    "widths": {"kind": "choice", "choices": ["64 128 256", "32 64 128", "64 192 256"]},
    "flip": {"kind": "choice", "choices": ["random"]},
}
RUNGS = [1, 3, 9]


def make_trial(number: int, values: dict[str, Any], epochs: int = 9, state: str = "completed") -> dict[str, Any]:
    """Best near lr 0.15 and with wide layers, as noisy as two seeds are."""
    noise = random.Random(number)
    quality = 0.94 - 0.03 * abs(math.log(values["lr"] / 0.15)) - 0.03 * (values["widths"] == "32 64 128")
    history = [
        {
            "epoch": epoch,
            "train_loss": 2 / epoch,
            "train_accuracy": quality - 0.3 / epoch,
            "val_loss": 2.2 / epoch,
            "val_accuracy": quality - 0.35 / epoch**1.6 + noise.gauss(0, 0.004),
            "train_seconds": 11.5,
        }
        for epoch in range(1, epochs + 1)
    ]
    return {
        "number": number,
        "values": values,
        "state": state,
        "reason": f"All {epochs} epochs done."
        if state == "completed"
        else f"Below the better third at epoch {epochs}.",
        "score": max((row["val_accuracy"] for row in history), default=None),
        "epochs": epochs,
        "epochs_planned": 9,
        "rung": sum(rung <= epochs for rung in RUNGS) - 1,
        "train_seconds": 11.5 * epochs,
        "started": None,
        "ended": None,
        "resumed": 0,
        "history": history,
        "folds": [],
        "mutations": [],
        "command": f"python jobs/train.py --data cifar10 --lr {values['lr']:.4g} --widths {values['widths']}",
        "path": f"trials/{number:03}",
    }


def draw_values(generator: random.Random) -> dict[str, Any]:
    return {
        "lr": 0.02 * 25 ** generator.random(),
        "epochs": generator.randint(2, 9),
        "label_smoothing": generator.uniform(0, 0.3),
        "widths": generator.choice(SPACE["widths"]["choices"]),
        "flip": "random",
    }


def make_sweep(count: int = 20, **changed: Any) -> dict[str, Any]:
    """ASHA, two at once: the lower half stops at epoch 1, half of the rest at 3; the last trial failed."""
    generator = random.Random(0)
    drawn = [draw_values(generator) for _ in range(count)]
    order = sorted(range(count), key=lambda number: -(make_trial(number, drawn[number], 1)["score"] or 0))
    trials = []
    for number in range(count):
        place = order.index(number) / max(count, 1)
        epochs = 9 if place < 0.25 else 3 if place < 0.5 else 1
        trials.append(make_trial(number, drawn[number], epochs, "completed" if epochs == 9 else "stopped"))
    if count > 1:
        error = "RuntimeError: the loss is not finite at epoch 1; lower --lr"
        trials[-1] |= {"state": "failed", "reason": error, "score": None, "rung": -1, "epochs": 0, "history": []}
    lanes = [0.0, 0.0]
    for trial in trials:
        lane = lanes.index(min(lanes))
        trial["started"] = lanes[lane]
        lanes[lane] += trial["train_seconds"] + 2
        trial["ended"] = lanes[lane] - 0.5
    return {
        "name": "widths",
        "data": "cifar10",
        "recipe": "fast",
        "space_name": "fast",
        "search": "random",
        "scheduler": "asha",
        "folds": 0,
        "seed": 0,
        "trials_wanted": count,
        "at_once": 2,
        "plan": "Two trials at once, each on one core.",
        "metric": "val_accuracy",
        "state": "finished",
        "started_at": "2026-01-02T03:04:05+00:00",
        "wall_seconds": max(lanes),
        "train_seconds": sum(trial["train_seconds"] for trial in trials),
        "rungs": RUNGS,
        "space": SPACE,
        "trials": trials,
        "confirmed": [],
        "winner": None,
        "luck": None,
        "test": None,
        **changed,
    }


def best_of(sweep: dict[str, Any], count: int) -> list[dict[str, Any]]:
    return sorted((t for t in sweep["trials"] if t["score"]), key=lambda trial: -trial["score"])[:count]


def confirmed_sweep(count: int = 20) -> dict[str, Any]:
    sweep = make_sweep(count)
    for trial in best_of(sweep, 3):
        mean = trial["score"] - 0.006
        sweep["confirmed"].append(
            {
                "number": trial["number"],
                "seeds": [101, 102, 103],
                "scores": [mean - 0.002, mean, mean + 0.002],
                "mean": mean,
                "interval": [mean - 0.005, mean + 0.005],
                "search_score": trial["score"],
                "values": trial["values"],
                "command": trial["command"] + " --seed 101",
            }
        )
    first = sweep["confirmed"][0]
    sweep["winner"] = {"number": first["number"], "command": first["command"], "path": "winner", "confirmed": True}
    luck = {"search_score": first["search_score"], "confirmed_mean": first["mean"], "luck": 0.006}
    sweep["luck"] = luck | {"gain": 0.02, "share": 0.3}
    interval = [0.9150, 0.9256]
    sweep["test"] = {"accuracy": 0.9204, "accuracy_ci95": interval, "count": 10_000, "report": "report.html"}
    return sweep


def folded_sweep(count: int = 12) -> dict[str, Any]:
    sweep = make_sweep(count, folds=3, scheduler="none", rungs=[])
    for trial in sweep["trials"][:-1]:
        trial |= make_trial(trial["number"], trial["values"]) | {"started": trial["started"], "ended": trial["ended"]}
        trial["folds"] = [trial["score"] + shift for shift in (-0.004, 0.001, 0.003)]
        trial["history"] *= 3
    return sweep


def pbt_sweep(count: int = 6) -> dict[str, Any]:
    space = {name: SPACE[name] for name in ("lr", "widths", "label_smoothing")}
    sweep = make_sweep(count, search="pbt", scheduler="none", rungs=[], space=space)
    generator = random.Random(1)
    for trial in sweep["trials"]:
        lr = trial["values"]["lr"]
        trial |= make_trial(trial["number"], trial["values"]) | {"started": 0.0, "ended": 110.0 + trial["number"]}
        for epoch in sorted(generator.sample([2, 4, 6], trial["number"] % 4)):
            lr *= generator.choice([0.8, 1.2])
            source = (trial["number"] + 1) % count
            trial["mutations"].append({"epoch": epoch, "from": source, "values": {"lr": lr}})
    return sweep


def failed_sweep() -> dict[str, Any]:
    sweep = make_sweep(5)
    for trial in sweep["trials"]:
        trial |= {"state": "failed", "reason": "OutOfMemoryError: 3 GiB", "score": None, "rung": -1, "history": []}
    return sweep


def running_sweep() -> dict[str, Any]:
    sweep = make_sweep(12, state="running", trials_wanted=20)
    sweep["trials"][9] |= {"state": "running", "reason": "Running.", "ended": None}
    waiting = {"state": "waiting", "reason": "Waiting.", "started": None, "ended": None, "score": None, "history": []}
    sweep["trials"][10] |= {**waiting, "epochs": 0, "rung": -1, "train_seconds": 0.0}
    return sweep


LONG = "conv3x3-64 conv3x3-128 pool conv3x3-256 pool dropout-0.1 linear " * 2


def nasty_sweep() -> dict[str, Any]:
    """Markup and templates wherever a string goes; long and many choices; ten parameters; numbers that are none."""
    choices = [*NASTY, LONG, *(f"{LONG}{number}" for number in range(5)), True, None, 3]
    names = ["lr", "widths", *NASTY, "a", "b", "c", "fixed"]
    space: dict[str, Any] = {name: {"kind": "float", "low": 1e-6, "high": 1.0, "log": True} for name in names}
    space["widths"] = space[NASTY[1]] = {"kind": "choice", "choices": choices}
    space["fixed"] = {"kind": "int", "low": 3, "high": 3, "log": False}
    sweep = confirmed_sweep(20) | {"space": space, "name": NASTY[0], "plan": NASTY[3], "space_name": NASTY[2]}
    generator = random.Random(2)
    for trial in sweep["trials"]:
        trial["values"] = {name: 10 ** generator.uniform(-6, 0) for name in names}
        trial["values"] |= {name: generator.choice(choices) for name in ("widths", NASTY[1])} | {"fixed": 3}
        trial |= {"reason": NASTY[3], "command": f"echo {NASTY[0]}", "path": NASTY[3]}
    sweep["trials"][0]["score"] = math.nan
    sweep["trials"][1]["history"][0]["val_accuracy"] = math.inf
    sweep["trials"][2]["history"][0]["val_accuracy"] = None
    del sweep["trials"][3]["values"]["a"]
    sweep["test"]["report"] = "javascript:alert(1)"
    return sweep


SWEEPS: dict[str, Callable[[], dict[str, Any]]] = {
    "asha": make_sweep,
    "confirmed": confirmed_sweep,
    "folds": folded_sweep,
    "pbt": pbt_sweep,
    "many": lambda: confirmed_sweep(200),
    "failed": failed_sweep,
    "none": lambda: make_sweep(0),
    "one": lambda: make_sweep(1),
    "running": running_sweep,
    "nasty": nasty_sweep,
}


@pytest.fixture(params=SWEEPS)
def sweep(request: pytest.FixtureRequest) -> dict[str, Any]:
    return SWEEPS[request.param]()


def read(tmp_path: Path, sweep: dict[str, Any], command: str = "") -> Page:
    return Page(write_sweep_report(tmp_path, sweep, command).read_text())


def titles(found: Page) -> list[str]:
    return [svg["aria-label"] or "" for svg in found.all("svg")]


def test_every_sweep_becomes_one_small_file_that_loads_nothing_and_warns_of_nothing(tmp_path, sweep, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = write_sweep_report(tmp_path, sweep)
    assert capfd.readouterr() == ("", "")
    assert [found.name for found in tmp_path.iterdir()] == ["sweep.html"]
    assert path == tmp_path / "sweep.html"
    assert path.stat().st_size < 1_500_000
    html = path.read_text()
    found = Page(html)
    assert all(not attributes.keys() & {"src", "srcset", "data"} for _, attributes in found.tags)
    assert not found.all("link")
    assert re.findall(r"url\((?!#)|@import", html) == []
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [link["href"] or "" for link in found.all("a")]
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    assert all(link.startswith(("#", "./")) for link in links)


def test_no_number_on_the_page_is_none(tmp_path, sweep):
    html = write_sweep_report(tmp_path, sweep).read_text()
    html = html.replace("isNaN", "")
    assert re.findall(r"\b(?:nan|inf|infinity)\b", html, re.IGNORECASE) == []
    if "None" not in str(sweep["space"]):
        assert "None" not in html


def test_pictures_have_a_text_for_those_who_cannot_see_them_and_a_caption(tmp_path, sweep):
    html = write_sweep_report(tmp_path, sweep).read_text()
    assert all(titles(Page(html)))
    alone = Page(re.sub(r'<p[^>]*>[^<]+</p>\s*<div class="panels broad">.*?</div>', "", html, flags=re.DOTALL))
    assert len(alone.all("figcaption")) == len(alone.all("figure"))  # those in panels have a paragraph together


def test_what_the_sweep_holds_is_not_changed(tmp_path, sweep):
    before = copy.deepcopy(sweep)
    write_sweep_report(tmp_path, sweep)
    assert str(sweep) == str(before)


def test_names_values_and_errors_are_text_never_markup_or_templates(tmp_path):
    found = read(tmp_path, nasty_sweep(), command="echo <script>")
    assert len(found.all("script")) == 1  # the page's own
    assert not found.all("img")
    assert all(not name.startswith("on") for _, attributes in found.tags for name in attributes)
    assert all(name in found.text for name in NASTY)
    assert "echo <script>" in found.text
    assert any((link["href"] or "").startswith("./javascript") for link in found.all("a"))  # a file, no script


@pytest.mark.parametrize("name", ["asha", "confirmed", "folds", "pbt", "running", "failed", "many"])
def test_every_trial_is_in_the_table_with_its_cost_values_and_reason(tmp_path, name):
    sweep = SWEEPS[name]()
    html = write_sweep_report(tmp_path, sweep).read_text()
    table = html[html.index('<table class="sortable">') :].partition("</table>")[0]
    rows = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in table.split("<tr>")[2:]]
    cells = {int(row[0]): [re.sub(r"<[^>]*>", "", cell) for cell in row] for row in rows}
    assert len(rows) == len(cells) == len(sweep["trials"])
    for trial in sweep["trials"]:
        said = cells[trial["number"]]
        assert trial["state"] in said
        assert trial["reason"] in said
        assert f"{trial['epochs']} of {trial['epochs_planned']}" in said
        assert f"{trial['train_seconds']:.1f}" in said
        assert f"{last_values(trial)['lr']:.4g}" in said
        assert trial["values"]["widths"] in said
        if trial["score"] is not None:
            assert f"{100 * trial['score']:.2f}\u00a0%" in said
    scores = [trial["score"] or 0 for number in cells for trial in sweep["trials"] if trial["number"] == number]
    assert scores == sorted(scores, reverse=True)


def test_the_headline_tells_the_confirmed_mean_its_interval_and_the_test_accuracy():
    sweep = confirmed_sweep()
    first = sweep["confirmed"][0]
    best, luck, cost = headline(sweep)
    assert f"Trial {first['number']} is the best: trained again with 3 fresh seeds" in best
    low, high = (f"{100 * end:.2f}\u00a0%" for end in first["interval"])
    assert f"reaches {100 * first['mean']:.2f}\u00a0% val accuracy (mean, 95 % interval {low} to {high})" in best
    assert "92.04\u00a0% of 10,000 test images correctly (95 % interval 91.50\u00a0% to 92.56\u00a0%)" in best
    assert "noisy" not in best
    assert "0.60 points, or 30\u00a0% of the 2.00 points by which it led the median trial, were luck" in luck
    assert "20 trials: 4 completed, 15 stopped early, 1 failed." in cost
    assert "up to 2 at once. Stopping early saved 110 of the 135 epochs" in cost


def test_the_headline_does_not_praise_what_was_not_confirmed():
    best, cost = headline(make_sweep())
    assert (
        "has not been confirmed with fresh seeds: the highest of 19 noisy numbers is too high by construction" in best
    )
    assert "not been tried on the test images" in best
    assert cost.startswith("20 trials: ")


def test_one_fresh_seed_has_no_interval():
    sweep = confirmed_sweep()
    sweep["confirmed"][0] |= {"seeds": [101], "scores": [0.9], "interval": None}
    assert "with 1 fresh seed it reaches" in headline(sweep)[0]
    assert "(mean, too few for an interval)" in headline(sweep)[0]


def test_a_confirmation_whose_seeds_all_failed_is_none(tmp_path):
    sweep = confirmed_sweep()
    for row in sweep["confirmed"]:
        row |= {"scores": [], "mean": math.nan, "interval": None}
    sweep["winner"] = sweep["luck"] = None
    found = read(tmp_path, sweep)
    assert "too high by construction" in found.text
    assert not any("fresh seed" in title for title in titles(found))


@pytest.mark.parametrize(
    ("luck", "gain", "share", "words"),
    [
        (-0.001, 0.02, -0.05, "no luck is to be seen"),
        (0.03, 0.02, 1.5, "its lead was nothing but luck"),
        (0.006, 0.0, None, "0.60 points of its score were luck"),
    ],
)
def test_luck_is_told_whatever_its_share(luck, gain, share, words):
    said = {"search_score": 0.93, "confirmed_mean": 0.93 - luck, "luck": luck, "gain": gain, "share": share}
    assert words in headline(confirmed_sweep() | {"luck": said})[1]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("failed", "No trial has a score, so there is no best configuration."),
        ("none", "No trial has a score"),
        ("one", "It is the only one with a score"),
        ("running", "The sweep is still running"),
        ("folds", "the mean over its folds"),
    ],
)
def test_the_headline_suits_the_sweep(name, words):
    assert words in headline(SWEEPS[name]())[0]


def test_trials_that_have_not_begun_are_told_with_the_reason():
    assert "1 running, 1 waiting, 8 not begun." in headline(running_sweep())[-1]
    spent = make_sweep(12, trials_wanted=20, state="budget spent")
    assert "8 not begun: the budget was spent." in headline(spent)[-1]


def test_a_finished_sweep_has_each_figure_and_a_failed_one_only_its_timeline(tmp_path):
    found = titles(read(tmp_path, confirmed_sweep()))
    for words in ("Parallel coordinates of 19 trials", "Importance", "against lr", "against widths", "by epoch of 19"):
        assert any(words in title for title in found), words
    assert any("fresh seed" in title for title in found)
    assert not any("flip" in title for title in found)  # it has one value
    assert titles(read(tmp_path, failed_sweep())) == ["When each of 5 trials ran"]
    assert titles(read(tmp_path, make_sweep(0))) == []


def test_parallel_coordinates_are_drawn_for_wide_and_for_narrow_screens(tmp_path):
    html = write_sweep_report(tmp_path, make_sweep()).read_text()
    wide, tall = (html.index(f'<div class="{name}">') for name in ("wide", "tall"))
    sizes = [re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', html[at:]) for at in (wide, tall)]
    assert sizes[0]
    assert sizes[1]
    assert float(sizes[0][1]) > 600
    assert float(sizes[1][1]) < 400
    for text in ("lr (log)", "64 128 256", "val accuracy"):
        assert html[wide:tall].count(f">{text}</text>") == 1


def test_folds_have_their_figure_and_their_table(tmp_path):
    sweep = folded_sweep()
    found = read(tmp_path, sweep)
    assert "Val accuracy of each fold, by trial" in titles(found)
    assert all(f"{100 * fold:.2f}\u00a0%" in found.text for trial in sweep["trials"] for fold in trial["folds"])


def test_each_mutation_is_told_and_drawn_for_the_parameters_that_changed(tmp_path):
    sweep = pbt_sweep()
    found = read(tmp_path, sweep)
    assert [title for title in titles(found) if title.endswith(" by epoch")] == ["lr by epoch"]
    text = " ".join(found.text.split())
    for trial in sweep["trials"]:
        for row in trial["mutations"]:
            said = f"{trial['number']}{row['epoch']}trial {row['from']}lr {row['values']['lr']:.4g}"
            assert said.replace(" ", "") in text.replace(" ", "")
    mutated = next(trial for trial in sweep["trials"] if trial["mutations"])
    assert last_values(mutated)["lr"] == mutated["mutations"][-1]["values"]["lr"] != mutated["values"]["lr"]


def test_the_best_configurations_are_there_as_commands(tmp_path):
    sweep = confirmed_sweep()
    html = write_sweep_report(tmp_path, sweep, command="python jobs/tune.py").read_text()
    shown = re.findall(r'<pre class="command"><code>(.*?)</code>', html)
    commands = [re.sub("</?span>", "", command) for command in shown]
    assert commands[:3] == [row["command"] for row in sweep["confirmed"]]
    assert commands[3:] == [trial["command"] for trial in best_of(sweep, 5)[3:]]
    assert "<pre><code><span>python jobs/tune.py</span></code></pre>" in html


def test_the_space_is_printed(tmp_path):
    text = read(tmp_path, make_sweep()).text
    text = text[text.index("What the search chose from") :]
    words = (
        "lr",
        "0.02 to 0.5",
        "logarithmic",
        "epochs",
        "2 to 9",
        "whole numbers",
        "32 64 128",
        "choice of 3",
        "fixed",
    )
    assert all(said in text for said in words)


def ranked_trials(count: int, **changed: Any) -> list[dict[str, Any]]:
    generator = random.Random(0)
    return [make_trial(number, draw_values(generator)) | changed for number in range(count)]


def varied() -> list[Scale]:
    return [scale(name, SPACE[name], []) for name in ("lr", "label_smoothing", "widths")]


def test_the_parameter_that_decides_is_the_most_important_and_the_same_each_time():
    trials = ranked_trials(40)
    shares, method = importances(trials, varied())
    assert next(iter(shares)) == "lr"
    assert shares["label_smoothing"] < 0.1
    assert math.isclose(sum(shares.values()), 1.0)
    assert "fANOVA" in method
    assert "40 trials" in method
    assert importances(trials, varied())[0] == shares


@pytest.mark.parametrize(
    ("trials", "why"),
    [
        (ranked_trials(7), "It takes 8 trials with a score to tell them; there are 7."),
        (ranked_trials(20, state="running"), "there are 0"),
        (ranked_trials(8, score=0.9), "the same score"),
        (ranked_trials(8, values=draw_values(random.Random(0))), "No parameter took more than one value"),
    ],
)
def test_importances_that_cannot_be_told_are_missing_with_the_reason(tmp_path, trials, why):
    assert importances(trials, varied())[0] == {}
    found = read(tmp_path, make_sweep(8) | {"trials": trials})
    assert why in found.text
    assert "Importance of each parameter" not in titles(found)


def test_a_parameter_with_one_value_has_no_importance():
    trials = ranked_trials(8)
    for trial in trials:
        trial["values"]["widths"] = "64 128 256"
    assert "widths" not in importances(trials, varied())[0]


def test_a_scale_places_values_as_the_space_does():
    lr, widths = scale("lr", SPACE["lr"], []), scale("widths", SPACE["widths"], [])
    assert [lr.place(value) for value in (0.02, 0.1, 0.5)] == pytest.approx([0, 0.5, 1])
    assert [label for _, label in lr.ticks(10)] == ["0.02", "0.05", "0.1", "0.2", "0.5"]
    assert [label for _, label in scale("epochs", SPACE["epochs"], []).ticks(10)] == ["2", "4", "6", "8"]
    assert widths.ticks(10) == [(pytest.approx((at + 0.5) / 3), name) for at, name in enumerate(widths.choices)]
    assert math.isnan(lr.place(None))
    assert math.isnan(widths.place("1 2 3"))


def test_choices_that_look_alike_when_cut_are_numbered(tmp_path):
    alike = scale("widths", {"kind": "choice", "choices": [f"{LONG}{number}" for number in range(3)]}, [])
    assert [label for _, label in alike.ticks(10)] == ["#1", "#2", "#3"]
    assert "have the numbers of the space" in read(tmp_path, nasty_sweep()).text
    assert "have the numbers of the space" not in read(tmp_path, make_sweep()).text


def test_a_scale_holds_values_that_a_mutation_took_out_of_the_space():
    trials = [{"values": {"lr": 0.7, "widths": "1 2 3"}}]
    assert scale("lr", SPACE["lr"], trials).high == 0.7
    assert scale("widths", SPACE["widths"], trials).choices[-1] == "1 2 3"


def test_hopeless_trials_do_not_squeeze_the_good_ones_together(tmp_path):
    """The axis of scores ends near the good ones; what is below is counted."""
    trials = ranked_trials(10)
    for trial, score in zip(trials, (0.93, 0.92, 0.92, 0.92, 0.91, 0.91, 0.91, 0.91, 0.9, 0.1), strict=True):
        trial["score"] = score
    assert 0.85 < floor(trials) < 0.9
    assert floor(trials[:4]) == 0.92  # the lowest, when none is far below
    text = read(tmp_path, make_sweep(10) | {"trials": trials}).text
    assert "of 1 trial, end where that axis does" in text
    assert "Triangles at the lower edge" in text


def test_curves_are_cut_where_a_fold_begins_and_where_a_number_is_missing():
    rows = [{"epoch": epoch, "val_accuracy": accuracy} for epoch, accuracy in ((1, 0.5), (2, None), (3, 0.7), (1, 0.4))]
    assert lines(rows) == [[(1, 0.5), (3, 0.7)], [(1, 0.4)]]
    assert lines([]) == []


def test_sweep_json_as_it_is_read_from_disk_makes_the_same_page(tmp_path):
    sweep = confirmed_sweep()
    again = json.loads(json.dumps(sweep))
    assert read(tmp_path / "a", sweep).text == read(tmp_path / "b", again).text


def test_missing_confirmation_winner_luck_and_test_are_as_null(tmp_path):
    sweep = make_sweep()
    for name in ("confirmed", "winner", "luck", "test"):
        del sweep[name]
    assert "too high by construction" in read(tmp_path, sweep).text


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium or google-chrome on the PATH")
def test_the_page_fits_a_phone_and_its_table_sorts_by_a_click(tmp_path):
    sweep = nasty_sweep()
    path = write_sweep_report(tmp_path, sweep)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 420, "height": 900})
        errors: list[str] = []
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("dialog", lambda dialog: errors.append(dialog.message))
        tab.goto(path.as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") == 420
        assert tab.locator(".wide svg").is_hidden()
        assert tab.locator(".tall svg").is_visible()
        smallest = """() => Math.min(...[...document.querySelectorAll("svg text")]
            .filter(text => text.checkVisibility())
            .map(text => { const at = text.getScreenCTM();
                           return Math.hypot(at.a, at.b) * parseFloat(getComputedStyle(text).fontSize); }))"""
        assert tab.evaluate(smallest) >= 8

        def column(place: int) -> list[str]:
            return tab.locator(f".sortable tbody tr > :nth-child({place})").all_inner_texts()

        tab.get_by_role("button", name="Score").click()
        scores = [float(text.rstrip("\u00a0%")) for text in column(3) if text]
        assert scores == sorted(scores)
        assert column(3)[-2:] == ["", ""]  # those without a score stay last
        tab.get_by_role("button", name="Score").click()
        assert [float(text.rstrip("\u00a0%")) for text in column(3) if text] == scores[::-1]
        assert column(3)[-2:] == ["", ""]
        tab.get_by_role("button", name="Trial", exact=True).click()
        assert column(1) == [str(number) for number in range(20)]
        assert errors == []
        browser.close()
