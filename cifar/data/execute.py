"""Where chunks are converted: in this process, in a few local ones, or as Ray Data tasks on a cluster."""

import os
import pickle
import queue
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress

from cifar.data.convert import Chunk, Summary, convert_chunk, try_convert
from cifar.machine import usable_cpus

# Up to here local processes are done before Ray Data has made its plan and started its workers.
_LOCAL_ROWS = 200_000
_LOCAL_BYTES = 4 << 30
_INLINE_ROWS = 2_000
_INLINE_BYTES = 64 << 20


def convert(chunks: list[Chunk], start_ray: Callable[[], object]) -> Generator[Summary, None, None]:
    """Summaries as they come; the files do not depend on where or in which order chunks are converted.

    Close the generator to stop early: no local process writes any more after that.
    """
    rows = sum(len(chunk.labels) for chunk in chunks)
    size = sum(len(chunk.labels) * chunk.row_bytes for chunk in chunks)
    workers = min(usable_cpus(), len(chunks))
    if rows > _LOCAL_ROWS or size > _LOCAL_BYTES:
        start_ray()
        yield from _on_ray(chunks)
    elif workers < 2 or (rows <= _INLINE_ROWS and size <= _INLINE_BYTES):
        yield from map(convert_chunk, chunks)
    else:
        yield from _in_processes(chunks, workers)


def _in_processes(chunks: list[Chunk], workers: int) -> Iterator[Summary]:
    """Plain subprocesses: fork is unsafe beside Ray's threads, and multiprocessing's spawn imports the caller's main
    module, which for a training job is torch and Ray (2 s a process)."""
    idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()

    def run(chunk: Chunk) -> Summary:
        process = idle.get()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pickle.dump(chunk, process.stdin)
            process.stdin.flush()
            answer = pickle.load(process.stdout)
        except (EOFError, OSError) as error:
            raise RuntimeError(f"a worker process died (exit {process.wait()}); out of memory?") from error
        idle.put(process)
        return _checked(answer)

    with ExitStack() as stack:
        for _ in range(workers):
            idle.put(stack.enter_context(_worker()))
        pool = ThreadPoolExecutor(workers)
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        yield from pool.map(run, chunks)


@contextmanager
def _worker() -> Iterator[subprocess.Popen[bytes]]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", "from cifar.data.convert import serve; serve()"]
    # A session of its own: Ctrl-C is the driver's to handle.
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
    )
    try:
        yield process
    finally:
        process.kill()
        with suppress(BrokenPipeError):  # closing flushes what a dead process never read
            process.communicate()


def _on_ray(chunks: list[Chunk]) -> Iterator[Summary]:
    """Tasks of Ray Data, a chunk each. Pixels go to the part files; only summaries cross the object store."""
    import ray.data

    from cifar.probe import other_nodes, probe, probe_source  # not above: it imports this package

    if others := other_nodes():
        probe(chunks[0].target, "$CIFAR_CACHE", others)
        probe_source(chunks[0].source, "--data", others)
    items = [{"chunk": pickle.dumps(chunk)} for chunk in chunks]
    answers = ray.data.from_items(items, override_num_blocks=len(items)).map(_convert_row)
    for answer in answers.iter_rows():
        yield _checked(pickle.loads(answer["summary"]))


def _convert_row(row: dict[str, bytes]) -> dict[str, bytes]:
    return {"summary": pickle.dumps(try_convert(pickle.loads(row["chunk"])))}


def _checked(answer: Summary | Exception) -> Summary:
    if isinstance(answer, Exception):
        raise answer
    return answer
