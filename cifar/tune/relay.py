"""From the controller of a trial's workers to Tune, through the trial's process."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray import tune
from ray.train import UserCallback
from ray.util.queue import Queue


class Relay(UserCallback):
    """The workers go on when Tune has heard of their epoch before, so that a trial that it ends does not run far ahead.

    Ray's TuneReportCallback (2.60) has another thread hand the epochs to Tune, through a queue of one that the trial's
    own last report goes through, too: when both came at once, the trial hung. Here they come one after the other.
    """

    def __init__(self, queue: Queue):
        self._queue = queue

    @classmethod
    @contextmanager
    def started(cls) -> Iterator["Relay"]:
        """To be given to the trainer within the block, at whose end Tune has heard of all epochs."""
        queue = Queue(1, actor_options={"num_cpus": 0})
        thread = threading.Thread(target=hand_over, args=(queue,), daemon=True)
        thread.start()
        try:
            yield cls(queue)
        finally:
            queue.put(None)
            thread.join()
            queue.shutdown(force=True)

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Runs in the controller, after the checkpoint is safe."""
        if "val_accuracy" in metrics[0]:  # not in mid-epoch
            self._queue.put(metrics[0])


def hand_over(queue: Queue) -> None:
    while (row := queue.get()) is not None:
        tune.report(row)
