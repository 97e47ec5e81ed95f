"""A fault on purpose: one process of this driver's own Ray job is killed while a run is in its middle.

Imports neither torch nor Ray's libraries: the process that kills, on the node of its victim, has to be there soon.
"""

import threading
from collections.abc import Callable
from typing import Any, Self

import ray
from ray._private.state import actors  # of the control store; the public ones ask the dashboard, which may not run
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

LOOK_SECONDS = 0.05
ANSWER_SECONDS = 60.0
LEAVE_SECONDS = 2.0


class Killers:
    """One on each node where it was wanted. It takes seconds to start, more than some runs: faults share them."""

    def __init__(self) -> None:
        self._by_node: dict[str, Any] = {}

    def at(self, node: str) -> Any:
        if node not in self._by_node:
            place = NodeAffinitySchedulingStrategy(node, soft=False)
            killer: Any = ray.remote(num_cpus=0)(Killer)
            self._by_node[node] = killer.options(scheduling_strategy=place).remote()
        answer(self._by_node[node].ready.remote())
        return self._by_node[node]

    def close(self) -> None:
        for killer in self._by_node.values() if ray.is_initialized() else ():  # else ray.kill would start it
            ray.kill(killer)


class Fault:
    """Kills, with -9 and once, a process of an actor as soon as `middle()`; the block is the run that it disturbs."""

    def __init__(self, killers: Killers, actor: str, middle: Callable[[], bool]):
        """`actor` is how the name of the actor's class begins, without what the class is defined in."""
        self._killers, self._actor, self._middle = killers, actor, middle
        self._job = ray.get_runtime_context().get_job_id()
        self._before: set[str] = set()
        """Actors that earlier runs have left, some of which live on for a while."""
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.killed = False
        self.struck = False
        """Was the run still in its middle after the kill?"""
        self.error = ""

    def __enter__(self) -> Self:
        self._before = {one["ActorID"] for one in own_actors(self._job, self._actor)}
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._done.set()
        # After an error not for long, but Ray is going to be shut down, and who asks it then would start it anew.
        self._thread.join(ANSWER_SECONDS if kind is None else LEAVE_SECONDS)

    def _watch(self) -> None:
        try:
            while not self._done.wait(LOOK_SECONDS):
                found = own_actors(self._job, self._actor)
                victim = next((one for one in found if one["ActorID"] not in self._before), None)
                if victim is None:
                    continue
                killer = self._killers.at(victim["Address"]["NodeID"])
                if self._middle() and not self._done.is_set():
                    self.killed = answer(killer.kill.remote(victim["Pid"], self._actor, self._job))
                    if self.killed:
                        self.struck = self._middle()
                        return
        except Exception as error:  # said where the drill is; the run goes on
            self.error = " ".join(str(error).split())[:300]


def answer(reference: Any) -> Any:
    return ray.get(reference, timeout=ANSWER_SECONDS)


def own_actors(job: str, name: str) -> list[dict[str, Any]]:
    """Those of the job, by its hex id, that are alive and whose class is called so, or so at the beginning.

    A class that a function defines has the function's name before its own, but only from the second one on.
    """
    found = actors(job_id=ray.JobID(bytes.fromhex(job)), actor_state_name="ALIVE").values()
    return [one for one in found if one["JobID"] == job and one["ActorClassName"].rpartition(".")[2].startswith(name)]


class Killer:
    """An actor on the victim's node."""

    def ready(self) -> bool:
        return True

    def kill(self, pid: int, name: str, job: str) -> bool:
        """Kill the process, if it is still that of an actor of this class and of this Ray job."""
        import psutil  # pyright: ignore[reportMissingModuleSource]  # Ray's copy, on the path since Ray's import

        try:
            process = psutil.Process(pid)
            title = process.cmdline()[0]
            if not title.startswith("ray::") or name not in title or process.environ().get("RAY_JOB_ID") != job:
                return False
            process.kill()  # refuses a process that got the id of one that ended
        except (psutil.Error, IndexError):
            return False
        return True
