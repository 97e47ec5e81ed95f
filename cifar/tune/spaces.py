"""The spaces that come with the project; `--space` takes their names."""

from cifar.tune.space import Choice, Float, Int, Space

FAST: Space = {
    "widths": Choice((32, 64, 128), (64, 128, 256), (64, 192, 256), (96, 192, 384)),
    "dropout": Float(0.0, 0.3),
    "lr": Float(0.03, 0.5, log=True),
    "momentum": Float(0.4, 0.9),
    "label_smoothing": Float(0.0, 0.2),
    "schedule": Choice("linear", "cosine"),
    "batch_size": Choice(250, 500, 1000),
    "epochs": Int(6, 12),
    "skip_easy": Choice(0.0, 0.5),
    "flip": Choice("random", "alternating"),
    "crop_padding": Int(1, 4),
    "cutout": Int(0, 12),
}
"""Around recipe `fast`: its network, augmentation, Muon and its rates."""

NOTEBOOK: Space = {
    "widths": Choice((16, 32, 64), (32, 64, 128), (64, 128, 256)),
    "dropout": Choice(0.1, 0.2, 0.3, 0.4),
    "epochs": Choice(10, 25, 50),
    "batch_size": Choice(32, 64, 128),
}
"""What the notebooks searched: layer sizes, dropout, epochs and batch size."""

OPTIMIZER: Space = {
    "optimizer": Choice("sgd", "adam", "adamw", "rmsprop", "muon"),
    "lr": Float(1e-4, 0.3, log=True),
    "weight_decay": Float(1e-6, 1e-2, log=True),
    "schedule": Choice("constant", "step", "cosine", "onecycle", "linear"),
    "warmup": Float(0.0, 0.3),
}
"""Optimizer, rates and schedule of any network."""

AUGMENT: Space = {
    "rotate": Float(0.0, 20.0),
    "shift": Float(0.0, 0.15),
    "zoom": Float(0.0, 0.2),
    "shear": Float(0.0, 15.0),
    "cutout": Int(0, 12),
    "mixup": Float(0.0, 0.4),
    "label_smoothing": Float(0.0, 0.2),
}
"""Strengths of augmentation; all of them can change while a network trains, so that `--search pbt` takes them."""

SPACES: dict[str, Space] = {"fast": FAST, "notebook": NOTEBOOK, "optimizer": OPTIMIZER, "augment": AUGMENT}


def space_for(model: str) -> str:
    """Name of the space that suits a network."""
    return {"cnn": "fast", "notebook": "notebook"}.get(model, "optimizer")
