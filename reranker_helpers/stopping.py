"""Stop a long call of `rerank` or `score` from within: look between its batches whether to go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_check: ContextVar[Callable[[], object]] = ContextVar("check", default=lambda: None)


@contextmanager
def before_each_batch(check: Callable[[], object]) -> Iterator[None]:
    """Call `check()` before each batch of `rerank` and `score` in this block. What it raises ends them.

    Calls in other threads or asyncio tasks go on. Batches that have begun are finished: on a CPU up to one for each of
    torch's threads, which may take seconds; a GPU is given a few in advance.

    Example, with the `reranker` that `load_reranker` returned:

    >>> import time
    >>> end = time.monotonic() + 60
    >>> def check():
    ...     if time.monotonic() > end:
    ...         raise TimeoutError
    >>> with before_each_batch(check):
    ...     logits = score([("what is a panda?", "The panda is a bear.")], *reranker)
    """
    token = _check.set(check)
    try:
        yield
    finally:
        _check.reset(token)


def check() -> None:
    """Call the function that was passed to `before_each_batch`, if there is one."""
    _check.get()()
