"""Run batches side by side on a CPU, each on threads of its own, instead of each batch on all threads.

Threads that share a batch wait for each other after each of hundreds of small operations, and if another process holds
one of them up, all wait. Batches side by side meet only at the end.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TypeVar

import torch

Work = TypeVar("Work")
Result = TypeVar("Result")

_settings = threading.Lock()


@contextmanager
def side_by_side(count: int) -> Iterator[Callable[[Callable[[Work], Result], list[Work]], Iterator[Result]]]:
    """Give a function that maps works to results, in order, several at a time while the block lasts.

    Args:
        count: how many works there are at least. With fewer than torch has threads, each work has several.

    The threads that the caller may use are those that `torch.get_num_threads()` says in his thread, no more. Neither
    this number nor that of any other thread changes, and no thread stays when the block ends.
    """
    threads = torch.get_num_threads()
    workers = min(threads, count)
    if workers < 2:
        yield lambda work, works: map(work, works)
        return
    caller = threading.get_native_id()

    def start() -> None:
        # Where gevent has made threads greenlets, this would be the caller's own thread.
        if threading.get_native_id() != caller:
            with suppress(RuntimeError):  # no thread can be started: go on with all threads
                _use_threads(threads // workers)

    pool = ThreadPoolExecutor(workers, "rerank", start)

    def begin(work: Callable[[Work], Result], one: Work) -> Future[Result]:
        try:
            return pool.submit(work, one)
        except RuntimeError:  # no thread can be started, as when the interpreter is about to end
            future: Future[Result] = Future()
            future.set_result(work(one))
            return future

    def run(work: Callable[[Work], Result], works: list[Work]) -> Iterator[Result]:
        waiting: deque[Future[Result]] = deque()
        for one in works:
            waiting.append(begin(work, one))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    try:
        yield run
    finally:
        pool.shutdown(cancel_futures=True)


def _use_threads(count: int) -> None:
    """Let torch use `count` threads in the current thread, a new one.

    `torch.set_num_threads` sets the number of the thread that calls it, and that of all threads which use torch for the
    first time later (ATen/ParallelOpenMP.cpp). The latter is set back, by a thread that ends.
    """
    with _settings:
        others, is_set = torch.get_num_threads(), threading.Event()

        def restore() -> None:
            is_set.wait()
            torch.set_num_threads(others)

        thread = threading.Thread(target=restore)
        thread.start()  # first: where no thread can be started, nothing is changed
        torch.set_num_threads(count)
        is_set.set()
        thread.join()
