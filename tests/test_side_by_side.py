"""Batches that run side by side: the same results, the caller's threads left alone, and an end within a batch."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from reranker_helpers import before_each_batch, load_reranker, score
from reranker_helpers.side_by_side import side_by_side

PAIRS = [(f"question {i}", "word " * (5 + 37 * i % 300)) for i in range(40)]


@pytest.fixture(scope="module")
def stand_in():
    return load_reranker("tests/stand_in_model", device="cpu")


@pytest.fixture
def threads():
    """Set the number of torch's threads, and set it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def in_a_new_thread(work):
    results = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0]


@pytest.mark.parametrize("count", [2, 3, 5])
def test_scores_are_those_of_one_thread(stand_in, threads, count):
    threads(1)
    expected = score(PAIRS, *stand_in)
    threads(count)
    assert score(PAIRS, *stand_in) == pytest.approx(expected, abs=1e-4)


def test_no_number_of_threads_is_left_changed_and_no_thread_stays(stand_in, threads):
    threads(3)
    alive = threading.active_count()
    seen = []
    with before_each_batch(lambda: seen.append(torch.get_num_threads())):
        score(PAIRS, *stand_in)
    assert set(seen) == {3}
    assert torch.get_num_threads() == 3
    assert in_a_new_thread(torch.get_num_threads) == 3
    assert threading.active_count() == alive


def test_works_share_the_threads(threads):
    threads(4)

    def work(_):
        time.sleep(0.05)
        return torch.get_num_threads(), threading.current_thread().name

    for count, each in ((8, 1), (2, 2), (1, 4)):
        results = list(side_by_side(work, range(count)))
        assert {number for number, _ in results} == {each}
        assert len({name for _, name in results}) == min(count, 4)


def test_results_come_in_order_and_an_error_where_it_happened(threads):
    threads(3)

    def work(number):
        time.sleep(0.01 * (number % 3))
        if number == 7:
            raise ArithmeticError("seven")
        return number

    results = side_by_side(work, range(9))
    assert [next(results) for _ in range(7)] == list(range(7))
    with pytest.raises(ArithmeticError, match="seven"):
        next(results)


def test_several_callers_at_once(stand_in, threads):
    threads(2)
    expected = score(PAIRS, *stand_in)
    results = {}

    def call(name):
        results[name] = score(PAIRS, *stand_in)

    callers = [threading.Thread(target=call, args=(name,)) for name in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    for name in range(3):
        assert results[name] == pytest.approx(expected, abs=1e-4)
    assert in_a_new_thread(torch.get_num_threads) == 2


def test_what_check_raises_stops_the_batches_that_wait(stand_in, threads):
    threads(2)
    begun = []

    def check():
        begun.append(None)
        if len(begun) == 3:
            raise TimeoutError

    with before_each_batch(check), pytest.raises(TimeoutError):
        score(PAIRS, *stand_in, batch_tokens=64)
    assert len(begun) == 3


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_an_interrupt_ends_a_long_call_at_once():
    program = (
        "from reranker_helpers import load_reranker, score\n"
        "import torch; torch.set_num_threads(2)\n"
        "reranker = load_reranker('tests/stand_in_model', device='cpu')\n"
        "print('loaded', flush=True)\n"
        "score([(f'question {i}', 'word ' * 400) for i in range(5000)], *reranker)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline().strip() == b"loaded"
    time.sleep(3)
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - sent < 5
    assert b"KeyboardInterrupt" in errors
