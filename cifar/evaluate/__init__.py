"""A model and labelled images to numbers, and what lies behind them."""

from cifar.evaluate.confidence import calibrate
from cifar.evaluate.ensemble import Ensemble
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
    without_pixels,
)
from cifar.evaluate.label_errors import LabelErrors, LabelReview, find_label_errors, review_to_dict
from cifar.evaluate.mistakes import explain

__all__ = [
    "NUM_MISTAKES",
    "Bin",
    "Ensemble",
    "Evaluation",
    "LabelErrors",
    "LabelReview",
    "Mistake",
    "Rows",
    "Slice",
    "Worst",
    "assess",
    "calibrate",
    "evaluate",
    "explain",
    "find_label_errors",
    "review_to_dict",
    "score",
    "to_dict",
    "without_pixels",
]
