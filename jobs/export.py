"""A model as one file that runs without cifar: python jobs/export.py --model runs/NAME"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cifar.cli import run_job
from cifar.config import ConfigError


@dataclass(frozen=True, kw_only=True)
class Flags:
    model: str = ""
    """Folder or URI of a run or a model, or a published NAME, NAME@ALIAS or NAME/VERSION; empty: the one in the box."""
    store: str = "./models"
    """Folder or URI of the published models."""
    format: Literal["onnx", "torch"] = "onnx"
    """For ONNX Runtime, or a program for torch.export.load."""
    output: str = ""
    """File or URI; empty: the model's name with .onnx or .pt2, in this folder."""


def export_model(flags: Flags) -> dict[str, Any]:
    """Export a model as one file, which answers from the image alone, without test-time augmentation."""
    # Not above: --help needs no torch.
    from cifar.data.prepared import absolute, write_file
    from cifar.export import export
    from cifar.model_dir import load_model
    from cifar.store import find_model, model_path

    with find_model(flags.model, flags.store) as found:
        model = load_model(found.folder)
    # Not the folder's path, which is nobody's business who gets the file.
    version = found.name if model_path(flags.model) else found.version
    exported = export(model, flags.format, version)
    output = absolute(flags.output or f"{found.name}.{'onnx' if flags.format == 'onnx' else 'pt2'}")
    try:
        write_file(output, exported.data)
    except OSError as error:
        raise ConfigError(f"--output {output}: cannot be written ({error}); name another file") from error
    tta, size = model.info.config.model.tta, model.info.config.data.image_size
    print(f"images: uint8 (N, 3, {size}, {size}), RGB; probabilities: float32 (N, {len(model.info.classes)})")
    print(f"largest difference from cifar's probabilities: {exported.difference:.1e}, {exported.images} images")
    if tta != "none":
        print(f"test-time augmentation: none in the file; cifar's own answers to unsure images use --tta {tta}")
    print(f"exported: {output}, {len(exported.data):,} bytes")
    return {
        "output": output,
        "format": flags.format,
        "bytes": len(exported.data),
        "largest_difference": exported.difference,
        "images_compared": exported.images,
        "model_tta": tta,
        **exported.metadata,
    }


def main(argv: Sequence[str] | None = None) -> int:
    return run_job(export_model, Flags, argv)


if __name__ == "__main__":
    sys.exit(main())
