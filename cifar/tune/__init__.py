"""Search over settings: a space, trials that Ray Tune runs, and what they came to."""

from cifar.tune.space import Choice, Float, Int

__all__ = ["Choice", "Float", "Int"]
