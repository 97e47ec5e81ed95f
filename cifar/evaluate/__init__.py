"""A model and labelled images to numbers, and what lies behind them."""

from cifar.evaluate.confidence import calibrate
from cifar.evaluate.evaluation import (
    NUM_MISTAKES,
    Bin,
    Evaluation,
    Mistake,
    Rows,
    Slice,
    Worst,
    assess,
    evaluate,
    score,
    to_dict,
)

__all__ = [
    "NUM_MISTAKES",
    "Bin",
    "Evaluation",
    "Mistake",
    "Rows",
    "Slice",
    "Worst",
    "assess",
    "calibrate",
    "evaluate",
    "score",
    "to_dict",
]
