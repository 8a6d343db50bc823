"""A linear layer in int8: its inputs are rounded token by token, and the product of the rounded numbers is exact."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from .products import find_once, linear


class _Rounded(NamedTuple):
    """The inputs of a product, one row per token."""

    values: Tensor
    """(tokens, inputs): uint8, or float32 if nothing is rounded."""
    step: Tensor | None
    """(tokens, 1), float32: what a difference of 1 in `values` stands for. None if nothing is rounded."""
    low: Tensor | None
    """(tokens, 1), float32: what 0 in `values` stands for. None if that follows from `step`."""


class Grid(torch.nn.Module):
    """Shifts, scales and rounds the inputs of a layer, or of several layers that read the same rows.

    Args:
        shift: (inputs,), subtracted from each row.
        stretch: (inputs,), above zero; each row is divided by it after that.
        levels: steps between a token's lowest and highest value: 255, or 127 where products of 8 bits overflow, or
            None to round nothing. `levels_for` says which.
        one_sided: whether the steps reach from a token's minimum to its maximum, or lie evenly on both sides of zero.
    """

    def __init__(self, shift: Tensor, stretch: Tensor, levels: int | None, one_sided: bool):
        super().__init__()
        self.factor, self.offset = (1 / stretch).float(), (-shift / stretch).float()
        self.levels, self.one_sided = levels, one_sided

    def forward(self, rows: Tensor) -> _Rounded:
        """Round rows (tokens, inputs) in float32."""
        rows = torch.addcmul(self.offset, rows, self.factor)
        if self.levels is None:
            return _Rounded(rows, None, None)
        if self.one_sided:
            low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
            step = ((high - low) / self.levels).clamp_min_(1e-30)
        else:
            step = (rows.abs().amax(1, keepdim=True) / (self.levels // 2)).clamp_min_(1e-30)
            low = step * -(self.levels // 2 + 1)
        # Conversion truncates, so adding a half rounds. NaN survives in `step`.
        values = torch.addcmul(0.5 - low / step, rows, 1 / step).to(torch.uint8)
        return _Rounded(values, step, low if self.one_sided else None)


class QuantisedLinear(torch.nn.Module):
    """A linear layer with int8 weights, one scale per output, to take the place of a `torch.nn.Linear`.

    Args:
        source: the layer to replace, weights (outputs, inputs) in float32 on the CPU. It is not changed.
        grid: rounds the inputs.

    >>> linear, rows = torch.nn.Linear(64, 32), torch.randn(100, 64)
    >>> grid = Grid(rows.mean(0), torch.ones(64), levels_for(32, 64), one_sided=False)
    >>> layer = QuantisedLinear(linear, grid)
    >>> assert layer(rows).shape == (100, 32)
    >>> assert (layer(rows) - linear(rows)).norm() < 0.05 * linear(rows).norm()
    """

    def __init__(self, source: torch.nn.Linear, grid: Grid):
        super().__init__()
        shift = -grid.offset.double() / grid.factor.double()
        self.bias = torch.addmv(source.bias.detach().double(), source.weight.detach().double(), shift).float()
        weight = source.weight.detach() / grid.factor  # the only copy that stays: what follows works in place
        self.scale = (torch.maximum(weight.amax(1), -weight.amin(1)) / 127).clamp_min_(1e-30)
        self.sums = weight.div_(self.scale[:, None]).round_().sum(1) * self.scale
        self.weight = weight.to(torch.int8)
        self.grid = grid
        if grid.levels is not None:
            self.zeros = torch.zeros_like(self.scale, dtype=torch.int32)
            self.low = None if grid.one_sided else self.sums * -(grid.levels // 2 + 1)
            self.weight = torch.ops.onednn.qlinear_prepack(self.weight, None)  # in oneDNN's own order

    def forward(self, rows: Tensor) -> Tensor:
        """Return (..., outputs) for rows (..., inputs), computed in float32, in the dtype of the rows."""
        result = self.product(self.grid(rows.reshape(-1, rows.shape[-1]).float()))
        return result.view(*rows.shape[:-1], -1).to(rows)

    def product(self, rows: _Rounded) -> Tensor:
        """Return (tokens, outputs) in float32 for rows that `grid` has rounded."""
        if rows.step is None:
            return linear(rows.values, self.weight.float().mul_(self.scale[:, None]), self.bias)
        result = _int8_linear(rows.values, self.weight, self.scale, self.zeros, self.low)
        if rows.low is None:
            return torch.addcmul(self.bias, result, rows.step, out=result)
        return torch.addcmul(self.bias, rows.low, self.sums).addcmul_(result, rows.step)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantisedLinear:
        stay(self, fn)
        return self

    def _save_to_state_dict(self, *_: object) -> NoReturn:
        raise TypeError(_NOT_SAVED)

    def __getstate__(self) -> NoReturn:
        raise TypeError(_NOT_SAVED)

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantisedLinear:
        # The weight in oneDNN's order has no storage that could be copied. It never changes, so copies share it.
        memo[id(self.weight)] = self.weight
        memo[id(self)] = copied = self.__new__(type(self))
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied


_NOT_SAVED = (
    "an int8 model is made when it is loaded and cannot be saved, nor sent to another process: save the one it was "
    "made from, and load that there"
)


def stay(module: torch.nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> torch.nn.Module:
    """Stand in for `module._apply`: return the module as it is, or raise TypeError if `fn` is to change its dtype or
    device."""
    probe = fn(torch.empty(0, dtype=torch.float32, device="cpu"))
    if probe.device.type != "cpu" or probe.dtype != torch.float32:
        raise TypeError("an int8 model stays on the CPU: load it again with the device and dtype that you want")
    return module


def _int8_linear(rows: Tensor, weight: Tensor, scale: Tensor, zeros: Tensor, bias: Tensor | None) -> Tensor:
    """Return `(rows @ weight.T) * scale + bias`, shape (tokens, outputs), in float32.

    Rows (tokens, inputs) are uint8, weight comes from `qlinear_prepack` of (outputs, inputs) in int8, and scale, zeros
    (int32) and bias are (outputs,). The op is the one behind PyTorch's own int8 on x86 (torch.ao); it is not public.
    """
    result: Tensor = torch.ops.onednn.qlinear_pointwise(
        qx=rows,
        x_scale=1.0,
        x_zero_point=0,
        qw=weight,
        w_scale=scale,
        w_zero_point=zeros,
        bias=bias,
        output_scale=1.0,
        output_zero_point=0,
        output_dtype=torch.float32,
        post_op_name="none",
        post_op_args=[],
        post_op_algorithm="",
    )
    return result


def levels_for(outputs: int, inputs: int) -> int | None:
    """Return the `levels` of a `Grid` for weights of this shape on this processor: the most with which int8 products
    are exact, or None if they are not. Tried once per process.

    Processors without VNNI add pairs of products in 16 bits. With 8 bits on one side and 7 on the other these sums
    saturate without an error; with 7 bits on both they fit (Intel's VPMADDUBSW).
    """
    return find_once(("int8", outputs, inputs), lambda: _exact_levels(outputs, inputs))


def _exact_levels(outputs: int, inputs: int) -> int | None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (outputs, inputs), generator=generator, device="cpu").to(torch.int8)
    weight[: outputs // 2] = 127
    rows = torch.randint(127, 256, (256, inputs), generator=generator, device="cpu").to(torch.uint8)
    try:
        ready = torch.ops.onednn.qlinear_prepack(weight, None)
        return next((n for n in (255, 127) if _is_exact(rows // (256 // (n + 1)), ready, weight)), None)
    except (AttributeError, RuntimeError):  # a build of torch without oneDNN, or a processor it does not know
        return None


def _is_exact(rows: Tensor, ready: Tensor, weight: Tensor) -> bool:
    exact = rows[:8].double() @ weight.double().T
    ones = torch.ones_like(exact[0], dtype=torch.float32)
    result = _int8_linear(rows, ready, ones, torch.zeros_like(ones, dtype=torch.int32), None)[:8]
    return bool(((result - exact).abs() <= exact.abs() * 1e-7).all())  # float32 itself rounds by 6e-8
