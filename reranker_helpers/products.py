"""Matrix products on a CPU: find out, by trying them once, which way to compute one is exact and fastest here."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# Answers by question. Measured under a lock, so that threads do not disturb each other's timings.
_measured: dict[tuple, object] = {}
_measuring = threading.RLock()


def _renew_lock() -> None:
    global _measuring
    _measuring = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)  # as in tokenising.py


def linear(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return `rows @ weight.T + bias`, (n, outputs), for rows (n, inputs), weight (outputs, inputs), bias (outputs).

    All three have one dtype, which is that of the result.
    """
    return _route(weight, bias)(rows, weight, bias)


def _onednn_linear(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The op that code from torch.compile calls; it is not public. Unlike `torch.set_float32_matmul_precision` it sets
    nothing global, and by default it does not round to bfloat16: torch sets oneDNN's `fpmath_mode` only on request."""
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def _route(weight: Tensor, bias: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the faster of torch's own product (MKL in float32) and oneDNN's, measured once for each shape.

    Against oneDNN, MKL was half as fast on an AMD processor with AVX-512, and 10 to 20 % faster on one with AVX2 only.
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
    # Some settings and processors multiply float32 in a narrower type. The error is about 1e-6 in float32, 3e-4 in
    # TensorFloat32 and 3e-3 in bfloat16.
    if not error < 2e-5:
        return F.linear
    ours, torchs = seconds(lambda: _onednn_linear(rows, weight, bias), lambda: F.linear(rows, weight, bias))
    return _onednn_linear if ours < 0.95 * torchs else F.linear


def measure_once(question: tuple, measure: Callable[[], object]):
    """Return `measure()`, called once per process for each question, number of threads and setting of torch."""
    onednn = torch.backends.mkldnn
    precision = onednn.matmul.fp32_precision if hasattr(onednn, "matmul") else torch.get_float32_matmul_precision()
    question = (*question, torch.get_num_threads(), onednn.enabled, precision)
    with _measuring:
        if question not in _measured:
            _measured[question] = measure()
        return _measured[question]


def seconds(*works: Callable[[], object]) -> list[float]:
    """Return the shortest of four runs of each, in seconds. They run in turn, so that other load hits all alike; the
    shortest leaves out the first run, which is slower."""
    shortest = [math.inf] * len(works)
    for _ in range(4):
        for i, work in enumerate(works):
            begin = time.perf_counter()
            work()
            shortest[i] = min(shortest[i], time.perf_counter() - begin)
    return shortest
