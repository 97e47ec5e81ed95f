"""How sure a model may be of its answers: goes into its folder, beside the weights that it belongs to."""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

CALIBRATION = "calibration.json"


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Fitted on images that the model was not trained on. The defaults leave its answers as they are."""

    temperature: float = 1.0
    """What logits are divided by, so that probabilities are as high as answers are often right (Guo 2017)."""
    threshold: float = 0.0
    """Probability from which on answers are accepted; 0: of no probability it was certain that `target` would be kept.
    """
    target: float = 0.0
    """Accuracy that the accepted answers should have at least."""
    split: str = ""
    count: int = 0
    """Images of `split` that it was fitted on."""

    def __post_init__(self) -> None:
        if not (0 < self.temperature < math.inf and 0 <= self.threshold <= 1 and 0 <= self.target <= 1):
            raise ValueError("temperature must be positive, threshold and target shares")

    def threshold_or(self, wanted: float) -> float:
        """Probability below which answers abstain: `wanted`, or of -1 the fitted one."""
        return self.threshold if wanted < 0 else wanted

    def to_json(self) -> bytes:
        return (json.dumps(dataclasses.asdict(self), indent=2) + "\n").encode()

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Calibration":
        """Inverse of `to_json`; KeyError, TypeError or ValueError for anything else."""
        numbers = {name: float(values[name]) for name in ("temperature", "threshold", "target")}
        return cls(**numbers, split=str(values["split"]), count=int(values["count"]))
