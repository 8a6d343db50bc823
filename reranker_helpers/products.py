"""Matrix products on a CPU: which of the ways to compute one is right and fastest here, found by trying them once."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# What was measured, by what can change the answer. Under the lock, so that threads don't disturb each other's clocks.
_measured: dict[tuple, object] = {}
_measuring = threading.RLock()


def _renew_lock() -> None:
    global _measuring
    _measuring = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)  # as in tokenising.py


def linear(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return `rows @ weight.T + bias`: rows (n, inputs), weight (outputs, inputs), bias (outputs), all of one type."""
    return _route(weight, bias)(rows, weight, bias)


def _onednn_linear(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The product that torch.compile's generated code calls. Unlike `set_float32_matmul_precision` it changes nothing
    global, and in its default state it never rounds to bfloat16: torch sets oneDNN's `fpmath_mode` only on request."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def _route(weight: Tensor, bias: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Choose between torch's own product (MKL in float32) and oneDNN's, by measuring both once for each shape.

    MKL reaches half of what oneDNN does on AMD processors with AVX-512, and 10 to 20 % more on those with AVX2 only.
    """
    if weight.dtype != torch.float32:
        return F.linear
    return measure_once(("route", weight.shape), lambda: _faster_route(weight, bias))


def _faster_route(weight: Tensor, bias: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if not torch.backends.mkldnn.enabled:
        return F.linear
    rows = torch.randn(512, weight.shape[1], generator=torch.Generator().manual_seed(0))  # as many as a batch has
    try:
        exact = F.linear(rows[:16].double(), weight.double(), bias.double())
        error = (_onednn_linear(rows, weight, bias)[:16] - exact).abs().max() / exact.abs().max()
    except (AttributeError, RuntimeError):  # a build of torch without oneDNN, or a processor it does not know
        return F.linear
    # Measured, not assumed: float32 is wrong by about 1e-6 here, TensorFloat32 by 3e-4, bfloat16 by 3e-3.
    if not error < 2e-5:
        return F.linear
    ours, torchs = seconds(lambda: _onednn_linear(rows, weight, bias), lambda: F.linear(rows, weight, bias))
    return _onednn_linear if ours < 0.95 * torchs else F.linear


def measure_once(question: tuple, measure: Callable[[], object]):
    # The number of threads and torch's settings can change while the program runs, and with them the answer.
    onednn = torch.backends.mkldnn
    precision = onednn.matmul.fp32_precision if hasattr(onednn, "matmul") else torch.get_float32_matmul_precision()
    question = (*question, torch.get_num_threads(), onednn.enabled, precision)
    with _measuring:
        if question not in _measured:
            _measured[question] = measure()
        return _measured[question]


def seconds(*works: Callable[[], object]) -> list[float]:
    """Return the shortest of a few runs of each, in seconds, all in turn: the first run also prepares things, and what
    else the machine does disturbs one or the other."""
    shortest = [math.inf] * len(works)
    for _ in range(4):
        for i, work in enumerate(works):
            begin = time.perf_counter()
            work()
            shortest[i] = min(shortest[i], time.perf_counter() - begin)
    return shortest
