"""The README's walk-through, word for word, on a folder of another kind; and that all floors see the same pixels."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cifar.batch.part import decode_part
from cifar.batch.source import list_rows, plan_parts
from cifar.config import DataConfig, Precision, RunConfig, TrainConfig
from cifar.data import prepare
from cifar.data.prepared import to_arrays
from cifar.predictor import Predictor
from cifar.recipes import fast
from cifar.train import fit
from tests.images import encode
from tests.signs import BROKEN, COUNTS, greyed, paint, write_signs
from tests.test_predictor import loaded_model

ROOT = Path(__file__).parent.parent
SIZE = 24


def commands() -> list[str]:
    """The shell commands of the README's section, in order, without comments."""
    section = (ROOT / "README.md").read_text().split("## Your own images")[1].split("\n## ")[0]
    lines = [line for block in re.findall(r"```sh\n(.*?)```", section, re.DOTALL) for line in block.splitlines()]
    return [command for line in lines if (command := line.partition(" # ")[0].strip())]


class Walk:
    """Runs commands in a folder; a service goes on in the background, on a port of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.service = folder, None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = str(probe.getsockname()[1])
        self.environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def run(self, command: str) -> str:
        """What the command prints; the first line of a service."""
        command = command.replace("jobs/", f"{ROOT}/jobs/").replace(":8000", f":{self.port}")
        if "serve.py" in command:
            arguments = [*shlex.split(command), "--port", self.port]
            self.service = subprocess.Popen(
                arguments, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, text=True
            )
            assert self.service.stdout is not None
            return self.service.stdout.readline()
        done = subprocess.run(
            command, shell=True, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        return done.stdout

    def close(self) -> None:
        if self.service is not None:
            self.service.send_signal(signal.SIGTERM)
            self.service.communicate(timeout=60)


@pytest.mark.ray
@pytest.mark.slow
def test_from_a_folder_to_a_served_model_by_the_readmes_walk_through(tmp_path: Path) -> None:
    """Images of 7 classes, 10 to 400 of each, of many shapes, a third grey, some broken."""
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    write_signs(tmp_path / "photos")
    rng = np.random.default_rng(7)
    (tmp_path / "new").mkdir()
    for number, name in enumerate(COUNTS):
        image = paint(name, rng)
        (greyed(image, number % 3) if number % 2 else image).save(tmp_path / f"new/{name}.png")
    shutil.copy(tmp_path / "new/star.png", tmp_path / "new.png")
    (tmp_path / "new/broken.jpg").write_bytes(b"\xff\xd8\xff")
    said: dict[str, str] = {}
    walk = Walk(tmp_path)
    try:
        for command in commands():
            (name,) = re.findall(r"^curl|jobs/(\w+)\.py", command) or [command]
            said[name or "curl"] = walk.run(command)
    finally:
        walk.close()
    assert set(said) >= {"prepare", "train", "models", "serve", "curl", "predict"}

    assert f"{BROKEN} quarantined" in said["prepare"]
    assert "imbalanced: " in said["prepare"]
    (report,) = tmp_path.glob("runs/*/report.json")
    values = json.loads(report.read_text())
    assert set(values["per_class"]) == set(COUNTS)
    assert min(of_class["support"] for of_class in values["per_class"].values()) >= 1
    assert values["accuracy"] > 0.8
    assert values["macro_f1"] > 0.5
    answer = json.loads(said["curl"])
    (prediction,) = answer["predictions"]
    assert prediction["label"] in COUNTS
    (folder,) = {path.parent for path in tmp_path.glob("*/predictions/part-*.parquet")}
    rows = pq.read_table(folder).to_pylist()
    assert len(rows) == len(COUNTS)
    assert pq.read_table(folder.parent / "quarantine.parquet").num_rows == 1
    by_name = {Path(row["id"]).stem: row["label"] for row in rows}
    assert sum(name == label for name, label in by_name.items()) >= 4
    assert by_name["star"] == prediction["label"], "the batch and the service agree"


def kinds() -> dict[str, bytes]:
    """One picture in every mode that files come in, none square."""
    image = paint("star", np.random.default_rng(3)).resize((90, 61))
    grey = image.convert("L")
    alpha = Image.fromarray(np.tile(np.arange(90, dtype=np.uint8) * 2, (61, 1)))
    turned = Image.Exif()
    turned[274] = 6
    see_through, pale = image.copy(), grey.copy()
    see_through.putalpha(alpha)
    pale.putalpha(alpha)
    return {
        "rgb.jpg": encode(image, "jpeg"),
        "l.png": encode(grey),
        "l.jpg": encode(grey, "jpeg"),
        "la.png": encode(pale),
        "1.png": encode(grey.convert("1")),
        "i16.png": encode(greyed(image, 2)),
        "i16.tiff": encode(greyed(image, 2), "tiff"),
        "p.png": encode(image.quantize(64)),
        "p-grey.gif": encode(grey.quantize(64), "gif"),
        "cmyk.jpg": encode(image.convert("CMYK"), "jpeg"),
        "rgba.png": encode(see_through),
        "turned.jpg": encode(image, "jpeg", exif=turned),
    }


@pytest.mark.parametrize("resize", ["crop", "pad", "stretch"])
def test_training_batch_and_service_see_the_same_pixels_of_every_kind_of_file(tmp_path: Path, resize: Any) -> None:
    for label in ("one", "two"):
        (tmp_path / "set" / label).mkdir(parents=True)
        for name, data in kinds().items():
            (tmp_path / "set" / label / name).write_bytes(data)
    config = DataConfig(data=str(tmp_path / "set"), image_size=SIZE, resize=resize)
    prepared = prepare(config)
    assert prepared.quarantined == 0
    trained: dict[str, np.ndarray] = {}
    for split in prepared.counts:
        table = prepared.table(split)
        trained |= dict(zip(table.column("id").to_pylist(), to_arrays(table).images, strict=True))
    model = loaded_model(SIZE, prepared.classes)
    data = replace(model.info.config.data, image_size=SIZE, resize=resize)
    model = replace(model, info=replace(model.info, config=replace(model.info.config, data=data)))
    (part,) = plan_parts(list_rows(config.data, prepared.classes), data, 2)
    predicted = decode_part(part)
    assert len(predicted.ids) == len(trained) == 2 * len(kinds())
    predictor = Predictor(model, device="cpu")
    for row_id, image in zip(predicted.ids, predicted.images, strict=True):
        np.testing.assert_array_equal(image, trained[row_id])
        np.testing.assert_array_equal(predictor.decode((tmp_path / "set" / row_id).read_bytes()), image)
    upright, turned = trained["one/rgb.jpg"].astype(int), trained["one/turned.jpg"].astype(int)
    assert np.abs(np.rot90(upright, -1) - turned).mean() < 3, "the codec's error, resized"
    light = [trained[f"one/{name}"].astype(int) for name in ("l.png", "i16.png", "i16.tiff")]
    assert np.abs(light[0] - light[1]).max() <= 1
    assert np.abs(light[0] - light[2]).max() <= 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_set_all_of_grey_images_trains(tmp_path: Path, precision: Precision) -> None:
    """Three equal channels, whose patches vary in four directions of twelve."""
    rng = np.random.default_rng(0)
    for name in ("disc", "cross"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for number in range(60):
            greyed(paint(name, rng), number % 3).save(tmp_path / f"set/{name}/{number}.png")
    config = replace(
        fast(),
        data=DataConfig(data=str(tmp_path / "set"), image_size=SIZE),
        train=TrainConfig(epochs=12, precision=precision),
        run=RunConfig(storage=str(tmp_path / "runs"), workers="0"),
    )
    run = fit(replace(config, model=replace(config.model, widths=(16, 32, 64))))
    assert len(set(run.prepared.mean)) == 1
    assert run.history[-1]["train_loss"] < run.history[0]["train_loss"] - 0.2
    assert all(np.isfinite([row["train_loss"], row["val_loss"]]).all() for row in run.history)
    assert run.history[-1]["train_accuracy"] > 0.85
