"""Reports: complete, self-contained, safe against what class names hold; and the jobs that write them."""

import base64
import dataclasses
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cifar.config import AugmentConfig, ConfigError, DataConfig
from cifar.data import prepare
from cifar.evaluate import Bin, Evaluation, evaluate
from cifar.model_dir import save_model
from cifar.predictor import Predictor
from cifar.report import page, read_history, views, write_data_report, write_report
from cifar.report.data import find_samples
from cifar.report.evaluation import calibration_sentence
from cifar.report.history import verdict
from jobs import evaluate as evaluate_job
from jobs import prepare as prepare_job
from tests.images import write_folder
from tests.test_evaluate import CLASSES, SIZE, write_prepared
from tests.test_predictor import loaded_model

NASTY = ("<script>alert(1)</script>", "$x^{$", "{{ 7 * 7 }}", '"><img src=x onerror=alert(1)>')
VOID = {"meta", "img", "br", "input", "link", "hr"}


class Page(HTMLParser):
    """Collects what the tests ask for and checks that tags are closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def history(val_losses: list[float], train_accuracy: float = 0.9, val_accuracy: float = 0.88) -> list[dict[str, float]]:
    """Train loss falls all the time."""
    return [
        {
            "epoch": epoch,
            "train_loss": 1 / epoch,
            "train_accuracy": train_accuracy,
            "val_loss": loss,
            "val_accuracy": val_accuracy,
            "lr": 0.1,
            "images_per_second": 2850.0,
            "seconds": 16.0,
        }
        for epoch, loss in enumerate(val_losses, start=1)
    ]


def make_evaluation(folder: Path, classes: tuple[str, ...] = CLASSES, count: int = 210) -> Evaluation:
    prepared = write_prepared(folder, classes, {"train": 40, "val": 8, "test": count})
    return evaluate(Predictor(loaded_model(SIZE, classes), device="cpu"), prepared)


@pytest.fixture
def evaluation(tmp_path) -> Evaluation:
    return make_evaluation(tmp_path / "prepared")


def pictures(uri: str, side: int, gap: int = 2) -> list[np.ndarray]:
    """The images that `page.strip` put side by side."""
    row = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB"))
    return [row[:, start : start + side] for start in range(0, row.shape[1], side + gap)]


def test_the_report_has_every_file_and_its_pictures_are_not_blank(tmp_path, evaluation):
    path = write_report(tmp_path / "run", evaluation, history=history([1.0, 0.8, 0.7, 0.69]), command="python x.py")
    assert path == tmp_path / "run/report.html"
    found = sorted(str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*") if p.is_file())
    expected = ["curves.png", "figures/confusion.png", "figures/reliability.png", "report.html", "report.json"]
    assert found == expected
    for name in expected[:3]:
        picture = np.asarray(Image.open(tmp_path / "run" / name).convert("L"))
        assert picture.std() > 5


def test_report_json_holds_the_promised_keys_and_what_it_takes_to_repeat_it(tmp_path, evaluation):
    write_report(tmp_path, evaluation, history=history([1.0, 0.8, 0.7, 0.69]), command="python x.py")
    values = json.loads((tmp_path / "report.json").read_text())
    promised = {"data", "split", "count", "accuracy", "accuracy_ci95", "loss", "macro_f1", "per_class"}
    promised |= {"confusion_matrix", "top5_accuracy", "ece", "train_seconds", "command", "versions", "config"}
    assert promised <= values.keys()
    assert values["command"] == "python x.py"
    assert values["learning"]["kind"] == "balanced"
    assert values["versions"].keys() >= {"cifar", "python", "torch", "ray"}


def test_the_page_says_the_numbers_that_the_evaluation_holds(tmp_path, evaluation):
    text = Page(write_report(tmp_path, evaluation, command="python x.py --a 'b c'").read_text()).text
    assert f"{100 * evaluation.accuracy:.2f}\u00a0%" in text
    assert f"{evaluation.ece:.4f}" in text
    assert "python x.py --a 'b c'" in text
    assert all(mistake.id in text for mistake in evaluation.mistakes)
    pair = evaluation.confused_pairs[0]
    assert re.search(rf"{pair.label}\s*{pair.prediction}\s*{pair.count}", text)


def test_the_page_says_what_an_answer_is_the_mean_over(tmp_path, evaluation):
    assert "mirror image" not in write_report(tmp_path / "plain", evaluation).read_text()
    config = evaluation.model.config
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, tta="shift"))
    shifted = dataclasses.replace(evaluation, model=dataclasses.replace(evaluation.model, config=config))
    text = write_report(tmp_path / "shift", shifted).read_text()
    assert "is the mean over the image and its mirror image, in place and shifted by a pixel." in text


def test_a_page_loads_nothing_from_elsewhere_and_its_ids_are_unique(tmp_path, evaluation):
    html = write_report(tmp_path, evaluation, history=history([1.0, 0.8, 0.7, 0.69])).read_text()
    found = Page(html)
    assert not found.all("script")
    assert not found.all("link")
    assert all((image["src"] or "").startswith("data:image/") for image in found.all("img"))
    assert all((link["href"] or "").startswith("#") for link in found.all("a"))
    assert re.findall(r"url\((?!#)", html) == []
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {(link["href"] or "")[1:] for link in found.all("a")} <= set(ids)


def test_pictures_have_a_text_for_those_who_cannot_see_them(tmp_path, evaluation):
    found = Page(write_report(tmp_path, evaluation, history=history([1.0, 0.8, 0.7, 0.69])).read_text())
    assert len(found.all("svg")) == 4
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in found.all("svg"))
    assert all(image["alt"] for image in found.all("img"))


def test_without_a_history_there_are_no_curves(tmp_path, evaluation):
    html = write_report(tmp_path, evaluation).read_text()
    assert "Learning curves" not in html
    assert not (tmp_path / "curves.png").exists()
    assert json.loads((tmp_path / "report.json").read_text())["learning"] is None


def test_class_names_and_commands_are_text_never_markup_or_templates(tmp_path):
    evaluation = make_evaluation(tmp_path / "prepared", NASTY)
    found = Page(write_report(tmp_path, evaluation, command="echo <script>").read_text())
    assert not found.all("script")
    assert all("onerror" not in attributes for _, attributes in found.tags)
    assert all(name in found.text for name in NASTY)


def test_a_hundred_classes_stay_readable_and_small(tmp_path):
    classes = tuple(f"class_{number:02}" for number in range(100))
    path = write_report(tmp_path, make_evaluation(tmp_path / "prepared", classes, 400))
    found = Page(path.read_text())
    assert path.stat().st_size < 2_000_000
    assert len(found.all("svg")) == 3  # the heat map and the reliability diagram
    assert len(found.all("td")) < 1000  # not 100 x 100 cells
    assert all(name in found.text for name in classes)


def test_a_faultless_model_has_no_mistakes_and_no_division_by_zero(tmp_path, evaluation):
    perfect = dataclasses.replace(
        evaluation, accuracy=1.0, confused_pairs=[], mistakes=[], confusion_matrix=np.diag([210, 0, 0, 0])
    )
    assert "every image is classified correctly" in Page(write_report(tmp_path, perfect).read_text()).text


@pytest.mark.parametrize(
    ("confidence", "word"), [(0.95, "overconfident"), (0.80, "underconfident"), (0.901, "as sure as it is right")]
)
def test_the_calibration_sentence_compares_confidence_with_accuracy(evaluation, confidence, word):
    bins = [Bin(0.0, 1.0, 100, confidence, 0.9)]
    changed = dataclasses.replace(evaluation, count=100, accuracy=0.9, reliability=bins)
    assert word in calibration_sentence(changed)


@pytest.mark.parametrize(
    ("rows", "kind", "words"),
    [
        (history([1.0, 0.8, 0.7]), "short", "3 epochs"),
        (history([1.0, 0.5, 0.6, 0.7]), "overfitting", "after epoch 2 the val loss rose by 40\u00a0%"),
        (history([1.0, 0.8, 0.7, 0.69], 0.99, 0.80), "overfitting", "19 points"),
        (history([1.0, 0.9, 0.8, 0.6], 0.7, 0.7), "underfitting", "fell by 25\u00a0% over the last epoch"),
        (history([1.0, 0.9, 0.8, 0.6], 0.98, 0.95), "balanced", "98.0\u00a0% of the train"),
        (history([1.0, 0.8, 0.7, 0.69]), "balanced", "90.0\u00a0% of the train"),
    ],
)
def test_the_verdict_on_learning_follows_its_documented_rules(rows, kind, words):
    found = verdict(rows)
    assert found.kind == kind
    assert words in found.text


def test_a_history_has_one_row_per_epoch_the_last_written(tmp_path):
    rows = history([1.0, 0.9, 0.8])
    again = {**rows[1], "val_loss": 0.5}
    lines = [json.dumps(row) for row in (*rows[:2], again, rows[2], {"epoch": 4, "event": "stopped"})]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert read_history(tmp_path / "metrics.jsonl") == [rows[0], again, rows[2]]
    assert read_history(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[" * 100_000,
        "[1]",
        "7",
        "\udcff",
        json.dumps({**history([1.0])[0], "val_loss": "low"}),
        json.dumps({**history([1.0])[0], "lr": None}),
        json.dumps({**history([1.0])[0], "epoch": [1]}),
        json.dumps(history([1.0])[0]) + "\n" + json.dumps({**history([1.0])[0], "epoch": "2"}),
    ],
)
def test_a_damaged_history_is_named(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text, errors="surrogateescape")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl"):
        read_history(tmp_path / "metrics.jsonl")


def test_an_interrupted_write_leaves_no_remains(tmp_path):
    (tmp_path / "a.html/full").mkdir(parents=True)
    with pytest.raises(OSError, match=r"a\.html"):
        page.write(tmp_path / "a.html", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]


def test_small_pictures_are_kept_exactly_and_large_ones_become_small():
    images = [np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8) for seed in (0, 1)]
    for found, image in zip(pictures(page.strip(images), 32), images, strict=True):
        np.testing.assert_array_equal(found, image)
    assert len(page.strip([np.zeros((512, 512, 3), np.uint8)])) < 2000


def test_every_augmentation_is_shown():
    """A field or choice that AugmentConfig gains must get its row."""
    shown = [(name, value) for fields in views.examples(32).values() for name, value in fields.items()]
    fields = {field.name for field in dataclasses.fields(AugmentConfig)} - {"augment_on"}
    assert {name for name, _ in shown} == fields
    choices = {("flip", "random"), ("flip", "alternating"), ("crop_fill", "reflect"), ("crop_fill", "zero")}
    choices |= {("policy", "trivial"), ("policy", "rand")}
    assert choices <= set(shown)
    assert {"rotate", "shift", "shear", "zoom"} in [set(fields) for fields in views.examples(32).values()]


def test_each_row_begins_with_the_image_and_its_views_differ_between_epochs():
    generator = np.random.default_rng(0)
    samples = [(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8), index) for index in range(3)]
    config = AugmentConfig(rotate=10, mixup=0.5)
    rows = views.rows(samples, config, seed=0)
    assert rows[-1].name == "This configuration"
    assert "--rotate 10" in rows[-1].flags
    originals = [pictures(row.strip, 32)[0] for row in rows]
    assert all((original == originals[0]).all() for original in originals)
    for row in rows:
        found = pictures(row.strip, 32)
        assert len(found) == 1 + views.NUM_VIEWS
        assert len({picture.tobytes() for picture in found}) > 1, row.name


def test_samples_are_of_their_class_and_as_many_as_there_are(tmp_path):
    prepared = write_prepared(tmp_path / "prepared", CLASSES, {"train": 42, "val": 8, "test": 8})
    batch = next(prepared.batches("train", 100))
    found = find_samples(prepared, 11)
    assert [len(images) for images in found] == [11, 11, 10, 10]
    for label, images in enumerate(found):
        for image, index in images:
            row = batch.indices.tolist().index(index)
            assert batch.labels[row] == label
            np.testing.assert_array_equal(image, batch.images[row])


def test_the_data_report_tells_counts_statistics_quarantine_and_duplicates(tmp_path):
    pairs = {"within_train": 1, "train_test": 2, "pairs": [["train/1.png", "test/4.png"]]}
    shapes = [[32, 32, 200], [640, 480, 7], [9, 12, 2], [9, 13, 2], [9, 14, 2], [10, 711, 1]]
    stats = {"shapes": shapes, "num_shapes": 31, "short_sides": [9, 33, 480], "modes": {"RGB": 203, "CMYK": 5}}
    prepared = write_prepared(
        tmp_path / "prepared",
        (*CLASSES[:3], NASTY[0]),
        quarantined=3,
        duplicates=pairs,
        source_stats=stats | {"value_range": [3, 251]},
    )
    reasons = ["truncated", "label missing", "truncated"]
    bad = {"id": ["a.png", "b.png", NASTY[3]], "path": ["p"] * 3, "label": ["cat", None, "dog"], "reason": reasons}
    pq.write_table(pa.table(bad), f"{prepared.path}/quarantine.parquet")
    path = write_data_report(tmp_path / "out", prepared, AugmentConfig(), command="python jobs/prepare.py")
    found = Page(path.read_text())
    assert not found.all("script")
    assert all("onerror" not in attributes for _, attributes in found.tags)
    wanted = ("125.300", "66.700", "640 x 480", "of 31", "CMYK", "from 3 to 251", "label missing", "train/1.png")
    assert all(words in found.text for words in (*wanted, *NASTY[::3], "TrivialAugment", "python jobs/prepare.py"))
    assert "9 to 480 pixels, the median 33" in found.text
    assert "9 x 14" in found.text
    assert "10 x 711" not in found.text, "one image of 258 is not worth a line"
    values = json.loads((tmp_path / "out/data_report.json").read_text())
    assert values["quarantine_reasons"] == {"truncated": 2, "label missing": 1}
    assert values["counts"] == {"train": 40, "val": 8, "test": 210}
    assert values["duplicates"] == pairs
    assert len(found.all("img")) == 4 + len(views.examples(SIZE)) + 1


def test_the_jobs_prepare_and_evaluate_a_model_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CIFAR_CACHE", str(tmp_path / "cache"))
    flags = ["--data", "digits", "--image-size", "16"]
    assert prepare_job.main([*flags, "--output", str(tmp_path / "data"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert sum(said["counts"].values()) == 1797
    assert Path(said["report"]).exists()

    prepared = prepare(DataConfig(data="digits", image_size=16))
    loaded = loaded_model(16, prepared.classes)
    config = dataclasses.replace(loaded.info.config, data=DataConfig(data="digits", image_size=16))
    save_model(tmp_path / "run/model", loaded.model, dataclasses.replace(loaded.info, config=config), loaded.metrics)
    rows = history([1.0, 0.8, 0.7, 0.69])
    (tmp_path / "run/metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    places = [(str(tmp_path / model), str(tmp_path / "out" / model)) for model in ("run", "run/model")]
    places += [(f"file://{model}", f"file://{out}_far") for model, out in places]
    for model, out in places:
        assert evaluate_job.main(["--model", model, "--output", out, "--json"]) == 0
        out = Path(out.removeprefix("file://"))
        said = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert said["count"] == prepared.counts["test"]
        assert said["accuracy"] == json.loads((out / "report.json").read_text())["accuracy"]
        assert (out / "curves.png").exists()


@pytest.mark.parametrize("job", [prepare_job, evaluate_job])
def test_help_has_a_line_of_text_and_the_default_of_each_flag(job, capsys):
    assert job.main(["--help"]) == 0
    text = capsys.readouterr().out
    flags = re.findall(r"^[^\w\n]+(--[a-z][\w-]+)", text, re.MULTILINE)
    assert len(flags) >= 5
    assert text.count("(default:") + text.count("(required)") >= len(flags)


def test_the_default_data_is_what_auto_took(tmp_path, capsys):
    """Where CIFAR-10 appears later, a model of digits still meets digits."""
    loaded = loaded_model(16, tuple("0123456789"))
    config = dataclasses.replace(loaded.info.config, data=DataConfig(data="auto", image_size=16))
    save_model(tmp_path / "model", loaded.model, dataclasses.replace(loaded.info, config=config), loaded.metrics)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CIFAR10_DIR", str(tmp_path / "elsewhere"))
        assert evaluate_job.main(["--model", str(tmp_path / "model"), "--output", str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["data"] == "digits"


def test_prepare_says_duplicates_and_writes_to_uris(tmp_path, capsys):
    write_folder(tmp_path / "set/train")
    write_folder(tmp_path / "set/test", per_class=5, seed=500)
    flags = ["--data", str(tmp_path / "set"), "--output", f"file://{tmp_path}/far"]
    assert prepare_job.main(flags) == 0
    assert "duplicates: " not in capsys.readouterr().out
    shutil.copy(tmp_path / "set/train/class_0/0003.png", tmp_path / "set/train/class_0/again.png")
    assert prepare_job.main([*flags, "--val-fraction", "0.01"]) == 0
    assert "duplicates: 1 within train, 0 of test in train\n" in capsys.readouterr().out
    assert (tmp_path / "far/data_report.html").exists()


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_missing_model_is_bad_usage_in_one_line(tmp_path, capsys, scheme):
    assert evaluate_job.main(["--model", f"{scheme}{tmp_path}/none"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
