"""Images in, prepared rows out."""

from cifar.data.preparation import prepare
from cifar.data.prepared import Prepared

__all__ = ["Prepared", "prepare"]
