"""Row ranges read, and if wanted augmented, by Ray Data tasks anywhere in the cluster, ahead of the training step."""

from collections.abc import Generator
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from cifar.augment import augment
from cifar.config import AugmentConfig
from cifar.data.loader import OpenStream
from cifar.data.prepared import Prepared, RowRange, to_arrays


def ray_stream(prepared: Prepared, config: AugmentConfig, seed: int) -> OpenStream:
    """An `open_stream` for `StreamingLoader` on Ray Data; augments there if `config.augment_on` is `data`.

    Each worker runs its own pipeline over its own rows, so which worker sees which row never depends on timing.
    """

    def open_stream(ahead: list[tuple[int, RowRange]]) -> Generator[pa.Table]:
        import ray.data

        def load(item: Any) -> pa.Table:
            epoch, rows = ahead[int(item["id"][0])]
            table = prepared.read(rows, columns=["image", "label", "index"])
            return augment_table(table, config, seed, epoch) if config.augment_on == "data" else table

        context = ray.data.DataContext.get_current().copy()
        context.execution_options.preserve_order = True
        # What is opened fits the store. Held back, the executor spins on the interpreter's lock until rows are taken,
        # and the training thread, which needs that lock for every operation, ran at a third of its rate.
        context.set_config("backpressure_policies.enabled", [])
        with ray.data.DataContext.current(context):
            # A block, and so a task, for each row range; reading is fused with making the number.
            tables = ray.data.range(len(ahead), override_num_blocks=len(ahead)).map_batches(load, batch_size=None)
        yield from tables.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)

    return open_stream


def augment_table(table: pa.Table, config: AugmentConfig, seed: int, epoch: int) -> pa.Table:
    """The table with its images changed as the worker would change them in that epoch."""
    arrays = to_arrays(table)
    images = torch.from_numpy(np.array(arrays.images)).permute(0, 3, 1, 2)
    changed = augment(images, torch.from_numpy(np.array(arrays.indices)), config, seed=seed, epoch=epoch)
    pixels = changed.permute(0, 2, 3, 1).contiguous().numpy()
    column = pa.FixedSizeBinaryArray.from_buffers(
        table.schema.field("image").type, len(pixels), [None, pa.py_buffer(pixels)]
    )
    return table.set_column(table.schema.get_field_index("image"), "image", column)
