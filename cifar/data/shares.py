"""How the rows of a split divide among workers and batches. Imports no torch: the driver asks this first."""

from cifar.config import ConfigError


def share(total: int, rank: int, world_size: int, micro_batches: int = 1) -> tuple[int, int]:
    """First and last+1 row of the rank's share of `total` rows: equal shares, what does not divide is left out.

    A share is that of as many `micro_batches`, so that two workers of one and one worker of two divide the rows alike.
    """
    rows = total // (world_size * micro_batches) * micro_batches
    return rank * rows, (rank + 1) * rows


def num_batches(rows: int, batch_size: int, world_size: int) -> int:
    """Full batches that each worker gets per epoch; ConfigError when there is not even one."""
    count = rows // world_size // (batch_size // world_size)
    if count == 0:
        raise ConfigError(f"--batch-size {batch_size}: train has only {rows} images; use --batch-size {rows} or less")
    return count
