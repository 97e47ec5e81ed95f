"""What the driver hands to the workers of a run: settings, and the decoded data by reference.

Imports no torch: the driver and Ray Train's controller unpickle this, and would each take 1.5 s more to start.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray

from cifar.config import Config
from cifar.data.prepared import Prepared


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """A split in the object store, decoded once, as Arrow tables in file order.

    Which rows a rank gets is arithmetic on row numbers. A streaming split would hand them out by demand, which no
    second run repeats, through an actor that takes 2.5 s to start.
    """

    refs: Sequence[Any]
    """References to the blocks."""
    rows: list[int]

    @classmethod
    def put(cls, prepared: Prepared, split: str) -> "Blocks":
        groups = prepared.row_groups(split)
        refs = [ray.put(prepared.read(rows, ["image", "label", "index"])) for rows in groups]
        return cls(refs=refs, rows=[rows.stop - rows.start for rows in groups])

    @classmethod
    def of(cls, table: pa.Table) -> "Blocks":
        """One block: who reads all of it gets its pages, not a copy."""
        return cls(refs=[ray.put(table.combine_chunks())], rows=[len(table)])

    def read(self, start: int, stop: int) -> pa.Table:
        """Rows start..stop; fetches the blocks that hold them and no others."""
        tables, first = [], 0
        for ref, rows in zip(self.refs, self.rows, strict=True):
            low, high = max(start - first, 0), min(stop - first, rows)
            if low < high:
                table: Any = ray.get(ref)
                tables.append(table.slice(low, high - low))
            first += rows
        if not tables:  # fewer rows than workers
            empty: Any = ray.get(self.refs[0])
            return empty.slice(0, 0)
        return pa.concat_tables(tables)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the driver hands to every worker."""

    config: Config
    prepared: Prepared
    run_path: str
    run_owner: str
    train: Blocks | None
    """None: streamed."""
    val: Blocks | None


def run_worker(loop_config: dict[str, Any]) -> dict[str, Any]:
    """Ray Train's entry into a worker."""
    from cifar.ray_worker import train_job

    return train_job(loop_config["job"])
