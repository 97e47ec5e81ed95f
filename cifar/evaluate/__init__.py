"""A model and labelled images to numbers, and what lies behind them."""

from cifar.evaluate.evaluation import (
    NUM_MISTAKES,
    Bin,
    Evaluation,
    Mistake,
    Rows,
    Worst,
    assess,
    evaluate,
    score,
    to_dict,
)

__all__ = ["NUM_MISTAKES", "Bin", "Evaluation", "Mistake", "Rows", "Worst", "assess", "evaluate", "score", "to_dict"]
