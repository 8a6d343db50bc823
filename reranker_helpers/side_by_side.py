"""Run batches side by side on a CPU, each on threads of its own, instead of each batch on all threads.

Threads that share a batch wait for each other after each of hundreds of small operations, and if another process holds
one of them up, all wait. Batches side by side meet only at the end.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

import torch

from .tokenising import in_a_thread

Work = TypeVar("Work")
Result = TypeVar("Result")

_settings = threading.Lock()


def side_by_side(work: Callable[[Work], Result], works: list[Work]) -> Generator[Result]:
    """Yield `work(one)` for each of `works`, in order, several of them at a time.

    The threads that the caller may use are those that `torch.get_num_threads()` says in his thread, no more; with fewer
    works than that, each work has several. Neither this number nor that of any other thread changes. Closing the
    generator waits for what has begun and leaves out the rest, and no thread stays.
    """
    threads = torch.get_num_threads()
    workers = min(threads, len(works))
    if workers < 2:
        yield from map(work, works)
        return
    caller = threading.get_native_id()
    results: list[Future[Result]] = [Future() for _ in works]
    waiting = deque(zip(works, results, strict=True))

    def take_works() -> None:
        # Where gevent has made threads greenlets, this would be the caller's own thread.
        if threading.get_native_id() != caller:
            with suppress(RuntimeError):  # no thread can be started: go on with all threads
                _use_threads(threads // workers)
        while True:
            try:
                one, result = waiting.popleft()
            except IndexError:
                return
            try:
                result.set_result(work(one))
            except BaseException as error:
                waiting.clear()  # nobody will read what comes after this
                result.set_exception(error)

    ended: list[Future[None]] = []
    try:
        ended += [in_a_thread(take_works) for _ in range(workers)]
        for result in results:
            yield result.result()
    finally:
        waiting.clear()
        for end in ended:
            end.exception()


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
