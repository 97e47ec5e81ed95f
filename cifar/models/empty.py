"""Networks without memory for their weights."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class EmptyParameters(TorchFunctionMode):
    """Within the block, in this thread, what is allocated for weights lies on the meta device, which holds no memory.

    Not `torch.device("meta")`, on which some networks of torchvision compute their widths in vain.
    """

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if function is torch.empty and options.get("device") is None:
            options["device"] = "meta"
        return function(*args, **options)
