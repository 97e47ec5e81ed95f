"""Who waits is told for what, and who keeps the others waiting is named."""

import threading
from collections.abc import Mapping
from typing import Any

import pytest

from cifar.waiting import AGAIN_SECONDS, STALLED_SECONDS, WAITING_SECONDS, Pulse, Request, Watchdog, missing

THREE = Request(name="workers", count=3, each={"CPU": 1.0}, remedy="--workers 2")
WITH_GPU = Request(name="workers", count=2, each={"CPU": 4.0, "GPU": 1.0}, remedy="--workers 1")


def cpus(*counts: float) -> list[dict[str, float]]:
    return [{"CPU": count} for count in counts]


def test_nothing_is_missing_where_there_is_room() -> None:
    assert missing(THREE, cpus(2, 1), cpus(2, 1), "") is None


def test_a_fragment_on_each_node_is_no_room() -> None:
    text = missing(THREE, cpus(1.5, 1.5), cpus(1.5, 1.5), "")
    assert text == (
        "waiting for 3 workers of 1 CPU: 3 of 3 CPU free on 2 nodes; add nodes with room for 1 more, or --workers 2"
    )


def test_what_others_hold_comes_free() -> None:
    text = missing(THREE, cpus(4), cpus(0.5), "")
    assert text is not None
    assert "0.5 of 4 CPU free on 1 node; they start when other jobs end, or --workers 2" in text


def test_gpus_are_counted_beside_cpus() -> None:
    text = missing(WITH_GPU, [{"CPU": 64.0, "GPU": 1.0}], [{"CPU": 60.0, "GPU": 1.0}], "")
    assert text is not None
    assert "2 workers of 4 CPU and 1 GPU: 60 of 64 CPU and 1 of 1 GPU free" in text
    assert "room for 1 more" in text


def test_nodes_on_their_way_are_told() -> None:
    assert str(missing(THREE, cpus(1), cpus(1), "2 nodes are being started")).endswith("; 2 nodes are being started")


class Cluster:
    """Workers whose beats a test sets, and a clock that it turns."""

    def __init__(self, lacking: str | None = None) -> None:
        self.now, self.beats, self.lacking = 0.0, {}, lacking
        self.watchdog = Watchdog(lambda: self.beats, lambda: self.lacking, lambda: self.now)
        self._alive: dict[int, dict[str, Any]] = {}

    def worker(self, rank: int, doing: str, waits: bool = False, world_size: int = 2) -> None:
        self._alive[rank] = {
            "pid": 100 + rank,
            "node": f"10.0.0.{rank}",
            "world_size": world_size,
            "number": 0,
            "doing": doing,
            "waits": waits,
            "since": self.now,
        }

    def stop(self, rank: int) -> None:
        """It hangs as a whole, or its node is gone; its last beat is still read."""
        del self._alive[rank]

    def said(self, seconds: float) -> list[str]:
        """While these pass with a beat and a look every two of them."""
        told, end = [], self.now + seconds
        while self.now < end:
            self.now += 2
            for rank, beat in self._alive.items():
                beat["number"] += 1
                self.beats[rank] = {**beat, "seconds": self.now - beat["since"]}
            told += [text for text in [self.watchdog.look()] if text]
        return told


def test_who_waits_for_resources_hears_it_after_ten_seconds_and_once() -> None:
    cluster = Cluster("waiting for 2 workers")
    assert cluster.said(WAITING_SECONDS - 2) == []
    assert cluster.said(AGAIN_SECONDS - 2) == ["waiting for 2 workers"]
    assert cluster.said(4) == ["waiting for 2 workers"]


def test_workers_that_start_are_given_their_time() -> None:
    cluster = Cluster()
    assert cluster.said(STALLED_SECONDS - 2) == []
    assert "no worker gives a sign of life" in cluster.said(4)[0]


def test_the_rank_that_the_others_wait_for_is_named_with_its_stage() -> None:
    cluster = Cluster()
    cluster.worker(0, "exchanging gradients", waits=True)
    cluster.worker(1, "loading batch 7 in epoch 2")
    assert cluster.said(STALLED_SECONDS - 2) == []
    (text,) = cluster.said(60)
    assert text == "nothing moves: worker 1 on 10.0.0.1 (process 101): loading batch 7 in epoch 2; 1 other waits"


def test_a_rank_that_is_silent_is_named_though_it_said_that_it_waits() -> None:
    cluster = Cluster()
    for rank in range(2):
        cluster.worker(rank, "exchanging gradients", waits=True)
    cluster.said(10)
    cluster.stop(1)
    (text,) = cluster.said(100)
    assert "worker 1 on 10.0.0.1 (process 101) gives no sign of life; last: exchanging gradients" in text


def test_when_all_wait_it_is_the_network() -> None:
    cluster = Cluster()
    for rank in range(2):
        cluster.worker(rank, "adding up val", waits=True)
    (text,) = cluster.said(90)
    assert "all workers wait for each other; check the network between 10.0.0.0, 10.0.0.1" in text


def test_a_worker_that_moves_is_slow_and_not_stuck() -> None:
    cluster = Cluster()
    cluster.worker(0, "exchanging gradients", waits=True)
    for batch in range(10):
        cluster.worker(1, f"loading batch {batch} of val")
        assert cluster.said(30) == []


def test_all_workers_gone_and_no_room_for_new_ones() -> None:
    cluster = Cluster("waiting for 2 workers")
    for rank in range(2):
        cluster.worker(rank, "computing batch 1 in epoch 1")
    assert cluster.said(20) == []
    for rank in range(2):
        cluster.stop(rank)
    assert cluster.said(30) == ["waiting for 2 workers"]


def test_ranks_of_before_the_group_shrank_are_not_missed() -> None:
    cluster = Cluster()
    for rank in range(2):
        cluster.worker(rank, "computing batch 1 in epoch 1")
    cluster.said(4)
    cluster.stop(1)
    cluster.worker(0, "computing batch 1 in epoch 1", world_size=1)
    (text,) = cluster.said(90)
    assert "worker 1" not in text


def test_looking_for_the_first_time_late_is_no_alarm() -> None:
    cluster = Cluster("waiting for 2 workers")
    cluster.worker(0, "computing batch 1 in epoch 1", world_size=1)
    cluster.now = 1000.0
    cluster.worker(0, "computing batch 900 in epoch 1", world_size=1)
    assert cluster.said(30) == []


def test_a_pulse_goes_on_when_the_store_is_away_for_a_beat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pulse, "SECONDS", 0.01)
    beats: list[Mapping[str, Any]] = []
    enough = threading.Event()

    def put(beat: dict[str, Any]) -> None:
        if beat["number"] == 1:
            raise ConnectionError
        beats.append(beat)
        if beat["doing"] == "loading":
            enough.set()

    pulse = Pulse(put, world_size=2, node="10.0.0.1")
    pulse.doing("loading")
    assert enough.wait(10)
    pulse.close()
    assert 1 not in [beat["number"] for beat in beats]
    assert beats[-1]["waits"] is False
    assert beats[-1]["world_size"] == 2
