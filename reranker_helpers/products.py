"""Matrix products on a CPU: find out, once per process, which way to compute one is exact and fastest here.

What changes a score by more than float32's rounding is never left to a clock: whether a processor has instructions for
a dtype is looked up, and whether a product is exact is tried.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Answer = TypeVar("Answer")

# Answers by question. Without a lock, because a thread that waits for one in the middle of a forward pass would keep
# torch's inference mode on, and greenlets share their thread's modes.
_found: dict[tuple[object, ...], Any] = {}

# The processor's time that this thread took, on which other processes have little influence. Windows counts it in steps
# of 16 ms, too long for one product.
_clock = time.thread_time if time.get_clock_info("thread_time").resolution < 1e-4 else time.perf_counter


def linear(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return `rows @ weight.T + bias`, (n, outputs), for rows (n, inputs), weight (outputs, inputs), bias (outputs).

    All three have one dtype, which is that of the result.
    """
    return _route(weight, bias)(rows, weight, bias)


def multiplies_in(dtype: torch.dtype) -> bool:
    """Whether this processor has instructions that multiply matrices in bfloat16 or float16; else they are emulated,
    which is slower than float32. Where torch is too old to tell, the answer is no."""

    def has(*names: str) -> bool:
        return any(getattr(torch.cpu, name, bool)() for name in names)

    try:
        if platform.machine().lower() in ("arm64", "aarch64"):
            name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}[dtype]
            return bool(getattr(torch.ops.mkldnn, name)())
        if dtype == torch.bfloat16:
            return has("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return has("_is_amx_fp16_supported") or bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    except (AttributeError, RuntimeError):  # a build of torch without oneDNN
        return False


def _onednn_linear(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The op that code from torch.compile calls; it is not public. Unlike `torch.set_float32_matmul_precision` it sets
    nothing global, and by default it does not round to bfloat16: torch sets oneDNN's `fpmath_mode` only on request."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return result


def _route(weight: Tensor, bias: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return torch's own product (MKL in float32), or oneDNN's for shapes where that is clearly faster.

    Against oneDNN, MKL was half as fast on an AMD processor with AVX-512, 10 to 20 % faster on one with AVX2 only, and
    about equal on Intel's.
    """
    if weight.dtype != torch.float32:
        return F.linear
    return find_once(("route", weight.shape), lambda: _faster_route(weight, bias))


def _faster_route(weight: Tensor, bias: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if not torch.backends.mkldnn.enabled:
        return F.linear
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(512, weight.shape[1], generator=generator, dtype=torch.float32, device="cpu")  # as in a batch
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
    return _onednn_linear if ours < 0.8 * torchs else F.linear


def find_once(question: tuple[object, ...], find: Callable[[], Answer]) -> Answer:
    """Return `find()`, called once per process for each question and setting of torch."""
    onednn = torch.backends.mkldnn
    precision = onednn.matmul.fp32_precision if hasattr(onednn, "matmul") else torch.get_float32_matmul_precision()
    question = (*question, onednn.enabled, precision)
    if question not in _found:
        _found.setdefault(question, find())  # of threads that find it at the same time, the first
    answer: Answer = _found[question]
    return answer


def seconds(*works: Callable[[], object]) -> list[float]:
    """Return the shortest of six runs of each, in seconds of this thread's processor time. They run in turn, so that
    other load hits all alike; the shortest leaves out the first run, which is slower."""
    shortest = [math.inf] * len(works)
    for _ in range(6):
        for i, work in enumerate(works):
            begin = _clock()
            work()
            shortest[i] = min(shortest[i], _clock() - begin)
    return shortest
