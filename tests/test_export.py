"""An exported file answers as the Predictor does, where there is no cifar."""

import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from cifar.calibration import Calibration
from cifar.config import Config, ConfigError, DataConfig, ModelConfig, RunFailed
from cifar.export import export
from cifar.model_dir import LoadedModel, ModelInfo, save_model
from cifar.models import build_model
from cifar.predictor import Predictor
from cifar.run_dir import write_calibration
from cifar.store import Store
from jobs import export as job

MEAN, STD = (120.0, 110.0, 100.0), (60.0, 50.0, 40.0)
CLASSES = ("a", "é, ü", 'say "c"')

RUN_ONNX = """if True:
    import sys
    sys.modules["cifar"] = sys.modules["torch"] = None
    import json, numpy as np, onnxruntime
    session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
    answers = [session.run(None, {"images": images})[0] for images in np.load(sys.argv[2]).values()]
    np.savez(sys.argv[3], *answers)
    (images,), (probabilities,) = session.get_inputs(), session.get_outputs()
    signature = [images.name, images.type, images.shape, probabilities.name, probabilities.type, probabilities.shape]
    print(json.dumps([session.get_modelmeta().custom_metadata_map, signature]))
"""
RUN_TORCH = """if True:
    import sys
    sys.modules["cifar"] = None
    import numpy as np, torch
    extra = {"metadata.json": ""}
    network = torch.export.load(sys.argv[1], extra_files=extra).module()
    answers = [network(torch.from_numpy(images)).numpy() for images in np.load(sys.argv[2]).values()]
    np.savez(sys.argv[3], *answers)
    print(extra["metadata.json"])
"""


def loaded_model(architecture: Literal["cnn", "notebook"] = "cnn", tta: Literal["none", "mirror"] = "none"):
    """Untrained, but sure of its answers, or all probabilities would be alike."""
    torch.manual_seed(0)
    config = Config(
        data=DataConfig(image_size=16, resize="pad"), model=ModelConfig(model=architecture, widths=(8, 8), tta=tta)
    )
    model = build_model(config, len(CLASSES), MEAN, STD)
    with torch.no_grad():
        model.head.weight.mul_(30)
    info = ModelInfo(config=config, classes=CLASSES, mean=MEAN, std=STD, fingerprint="f", source="digits")
    calibration = Calibration(temperature=1.7, threshold=0.9)
    return LoadedModel(model=model.eval(), info=info, metrics={}, calibration=calibration)


def save(loaded: LoadedModel, folder: Path) -> Path:
    save_model(folder / "model", loaded.model, loaded.info, loaded.metrics)  # pyright: ignore[reportArgumentType]
    write_calibration(str(folder / "model"), loaded.calibration)
    return folder


def images_of_all_kinds() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    batches = [rng.integers(0, 256, (count, 3, 16, 16), dtype=np.uint8) for count in (1, 3, 64, 0)]
    return [*batches, np.zeros((1, 3, 16, 16), np.uint8), np.full((2, 3, 16, 16), 255, np.uint8)]


def answers_elsewhere(script: str, file: Path) -> tuple[list[np.ndarray], Any]:
    """In a process that cannot import cifar: the probabilities of every batch, and what it printed."""
    given, found = file.with_name("given.npz"), file.with_name("found.npz")
    np.savez(given, *images_of_all_kinds())
    command = [sys.executable, "-c", script, file, given, found]
    done = subprocess.run(command, cwd=file.parent, check=True, capture_output=True, text=True)
    return list(np.load(found).values()), json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["cnn", "notebook"])
@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_the_file_answers_as_the_predictor_where_there_is_no_cifar(
    kind: Literal["onnx", "torch"], architecture: Literal["cnn", "notebook"], tmp_path: Path
) -> None:
    loaded = loaded_model(architecture)
    exported = export(loaded, kind, "digits/1")
    assert exported.difference < 1e-5
    file = tmp_path / f"model.{kind}"
    file.write_bytes(exported.data)
    found, said = answers_elsewhere(RUN_ONNX if kind == "onnx" else RUN_TORCH, file)
    expected = [
        Predictor(loaded, "cpu", precision="fp32").predict(torch.from_numpy(images)) for images in images_of_all_kinds()
    ]
    assert np.ptp(expected[2], axis=0).max() > 0.1
    for here, there in zip(expected, found, strict=True):
        assert there.dtype == np.float32
        np.testing.assert_allclose(there, here, rtol=0, atol=1e-5)
    if kind == "onnx":
        said, signature = said
        assert signature == ["images", "tensor(uint8)", ["N", 3, 16, 16], "probabilities", "tensor(float)", ["N", 3]]
        said |= {key: json.loads(said[key]) for key in ("classes", "image_size", "threshold")}
    assert said == exported.metadata
    assert (said["classes"], said["image_size"], said["resize"]) == (list(CLASSES), 16, "pad")
    assert (said["version"], said["tta"], said["threshold"]) == ("digits/1", "none", 0.9)


def test_it_tells_nothing_of_the_machine_that_it_was_made_on(tmp_path: Path) -> None:
    """Torch notes the source line of every operation."""
    here = str(Path(__file__).parent.parent).encode()
    data = export(loaded_model(), "onnx", "v").data
    assert here not in data
    assert all(not node.metadata_props for node in onnx.load_from_string(data).graph.node)
    (tmp_path / "model.pt2").write_bytes(export(loaded_model(), "torch", "v").data)
    with zipfile.ZipFile(tmp_path / "model.pt2") as archive:
        assert not [name for name in archive.namelist() if here in archive.read(name)]


def test_the_model_itself_stays_as_it_was() -> None:
    loaded = loaded_model()
    before = {name: (value.clone(), value.stride()) for name, value in loaded.model.state_dict().items()}
    export(loaded, "torch", "v")
    for name, value in loaded.model.state_dict().items():
        torch.testing.assert_close(value, before[name][0], rtol=0, atol=0)
        assert value.stride() == before[name][1]
    assert loaded.model.head.weight.requires_grad


def test_with_test_time_augmentation_in_the_config_the_file_asks_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It agrees with the plain answer, and the output says that cifar's own may differ."""
    run, output = save(loaded_model(tta="mirror"), tmp_path / "r"), tmp_path / "made/model.pt2"
    assert job.main(["--model", str(run), "--format", "torch", "--output", str(output), "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("test-time augmentation: none in the file" in line and "--tta mirror" in line for line in lines)
    result = json.loads(lines[-1])
    assert (result["tta"], result["model_tta"], result["version"]) == ("none", "mirror", "r")
    images = torch.from_numpy(images_of_all_kinds()[2])
    plain, mirror = (Predictor(loaded_model(tta=tta), "cpu", precision="fp32") for tta in ("none", "mirror"))
    found = torch.export.load(output).module()(images).numpy()
    np.testing.assert_allclose(found, plain.predict(images), rtol=0, atol=1e-5)
    assert np.abs(found - mirror.predict(images)).max() > 1e-3


def test_a_published_model_is_exported_under_its_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    version = Store(str(tmp_path / "store")).publish(str(save(loaded_model(), tmp_path / "r")), "digits", half=True)
    monkeypatch.chdir(tmp_path)
    assert job.main(["--model", "digits", "--store", "store", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["version"], result["output"]) == (str(version), str(tmp_path / "digits.onnx"))
    assert result["bytes"] == (tmp_path / "digits.onnx").stat().st_size
    assert result["largest_difference"] < 1e-5
    opsets = onnx.load(tmp_path / "digits.onnx").opset_import
    assert [(opset.domain, opset.version >= 18) for opset in opsets] == [("", True)]


@pytest.mark.parametrize("kind", ["onnx", "torch"])
def test_a_file_that_answers_otherwise_is_not_written(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def hotter(self: Any, images: Tensor) -> Tensor:
        return (self.model(images) * 1.01).softmax(1)

    monkeypatch.setattr("cifar.export._Probabilities.forward", hotter)
    run = save(loaded_model(), tmp_path / "r")
    output = tmp_path / "made/model"
    assert job.main(["--model", str(run), "--format", kind, "--output", str(output)]) == 1
    shown = capsys.readouterr()
    assert "not written" in shown.err
    assert shown.out == ""
    assert not output.parent.exists()


def test_a_network_that_answers_no_numbers_is_not_exported() -> None:
    loaded = loaded_model()
    with torch.no_grad():
        loaded.model.head.weight.fill_(float("nan"))
    with pytest.raises(RunFailed, match="differ by nan"):
        export(loaded, "torch", "v")


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_names_the_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"{package} is missing; pip install 'cifar\[export\]'"):
        export(loaded_model(), "onnx", "v")


def test_weights_that_one_file_cannot_hold_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cifar.export.ONNX_BYTES", 1000)
    with pytest.raises(ConfigError, match=r"--format onnx: .* use --format torch"):
        export(loaded_model(), "onnx", "v")


def test_bad_usage_is_one_clear_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = save(loaded_model(), tmp_path / "r")
    damaged = save(replace(loaded_model(), metrics={}), tmp_path / "damaged")
    weights = damaged / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    (tmp_path / "file").write_text("")
    for flags, message in (
        (["--model", str(run), "--format", "tflite"], "tflite"),
        (["--model", str(run), "--formats", "onnx"], "--formats"),
        (["--model", str(tmp_path / "none")], "no folder of a run or a model"),
        (["--model", str(damaged)], "model.safetensors: not the weights"),
        (["--model", str(run), "--format", "torch", "--output", str(tmp_path)], "cannot be written"),
        (["--model", str(run), "--format", "torch", "--output", str(tmp_path / "file/x")], "cannot be written"),
    ):
        assert job.main([*flags, "--store", str(tmp_path / "store")]) == 2, flags
        shown = capsys.readouterr()
        assert message in shown.err
        assert "Traceback" not in shown.err
        assert shown.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "file", "r"]
