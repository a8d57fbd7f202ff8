"""Matrices in 4 and in 8 bits, in the formats of bitsandbytes; this file is their reference in plain torch.

NF4 with double quantisation (Dettmers et al., 2023):

    codes    uint8 [rows, columns / 2]    two weights a byte, the first in its upper half
    scales   uint8 [rows, columns / 64]   the largest absolute weight of a block, less `offset`, as one of 256 values
    nested   fp32 [n]                     the largest absolute value of 256 such scales, row after row
    offset   fp32 []                      the mean of what the scales stand for

A weight is LEVELS[code] x (value of its scale x nested + offset), in fp32 and rounded once. int8 (Dettmers et al.,
2022) has codes int8 [rows, columns] and fp32 [rows], the largest absolute weight of each row: a weight is code x that
/ 127.

Each HuggingFace matrix is quantised by itself and whole, from the type that a run computes in: that is what
transformers does with a `BitsAndBytesConfig` and a `dtype`. So nothing depends on how a run divides the matrix.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal, Protocol

import torch

Format = Literal["nf4", "int8"]
BLOCK, NESTED_BLOCK = 64, 256
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_SMALLEST = 1e-38  # what a block of zeros is divided by
_GRID = 65_536


@dataclass(frozen=True)
class BaseFormat:
    """What the frozen matrices of a run were: quantised to `format`, from `dtype`, on a device of type `device`."""

    format: str
    dtype: str
    device: str


@dataclass(frozen=True)
class Nf4:
    """A matrix in NF4 with double quantisation; see the head of this file."""

    codes: torch.Tensor
    scales: torch.Tensor
    nested: torch.Tensor
    offset: torch.Tensor

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Return rows `start` to `stop` as weights [rows, columns]."""
        blocks = self.scales.shape[1]
        numbers = torch.arange(start * blocks, stop * blocks) // NESTED_BLOCK
        absmax = dynamic_values()[self.scales[start:stop].long()] * self.nested[numbers].view(-1, blocks) + self.offset
        codes = self.codes[start:stop]
        pairs = torch.stack([codes >> 4, codes & 15], -1).flatten(1).long()
        return (nf4_levels()[pairs].unflatten(1, (-1, BLOCK)) * absmax[..., None]).flatten(1).to(dtype)


@dataclass(frozen=True)
class Int8:
    """A matrix in int8 with a scale for each row; see the head of this file."""

    codes: torch.Tensor
    scales: torch.Tensor

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Return rows `start` to `stop` as weights [rows, columns]."""
        return int8_weights(self.codes[start:stop], self.scales[start:stop], dtype)


class Kernels(Protocol):
    """What quantises to NF4: our reference, or bitsandbytes."""

    def nf4(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes uint8 [rows, columns / 2] and the largest of each block fp32 [rows, columns / 64]."""

    def dynamic(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return codes uint8 of fp32 values [n], and the largest of every 256 of them."""


@dataclass(frozen=True)
class Reference:
    """The kernels in plain torch.

    bitsandbytes' CPU kernel looks 8-bit codes up on a grid of 65,536 values, so that about one in a thousand is not
    the nearest but stands beside it; `grid` does as it does. Its GPU kernels, and these without `grid`, find the
    nearest.
    """

    grid: bool = False

    def nf4(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Kernels`; a weight exactly between two levels gets the lower one."""
        blocks = rows.float().unflatten(1, (-1, BLOCK))
        absmax = blocks.abs().amax(-1)
        scaled = (blocks * (1.0 / absmax.clamp(min=_SMALLEST))[..., None]).clamp(-1, 1)
        codes = torch.bucketize(scaled.flatten(1), _midpoints(nf4_levels()), out_int32=True).to(torch.uint8)
        return codes[:, ::2] << 4 | codes[:, 1::2], absmax

    def dynamic(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Kernels`."""
        padded = torch.nn.functional.pad(values, (0, -len(values) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
        absmax = padded.abs().amax(1)
        scaled = (padded * (1.0 / absmax.clamp(min=_SMALLEST))[:, None]).clamp(-1, 1)
        if self.grid:
            place = ((scaled + 1.0) * (0.5 * (_GRID - 1)) + 0.5).long()
            codes = torch.where(absmax[:, None] > 0, _nearest_on_grid()[place], 0)
        else:
            codes = torch.bucketize(scaled, _midpoints(dynamic_values()))
        return codes.to(torch.uint8).flatten()[: len(values)], absmax


def quantize_nf4(runs: Iterable[torch.Tensor], kernels: Kernels) -> Nf4:
    """Quantise a matrix that comes as runs of rows [rows, columns], columns a multiple of 64, in a float type."""
    found = [kernels.nf4(rows) for rows in runs]
    codes, absmax = (torch.cat(pieces) for pieces in zip(*found, strict=True))
    offset = _mean(absmax)
    scales, nested = kernels.dynamic(absmax.flatten() - offset)
    return Nf4(codes, scales.view(absmax.shape), nested, offset)


def quantize_int8(runs: Iterable[torch.Tensor]) -> Int8:
    """Quantise a matrix that comes as runs of rows; as bitsandbytes does it, by way of fp16."""
    found = [_int8_rows(rows) for rows in runs]
    return Int8(*(torch.cat(pieces) for pieces in zip(*found, strict=True)))


def _int8_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    half = rows.to(torch.float16)
    absmax = half.abs().amax(1).float()
    codes = torch.round(half * (127.0 / absmax)[:, None])  # of a row of zeros not a number
    return codes.nan_to_num(0.0).to(torch.int8), absmax


def int8_weights(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return int8 codes [rows, columns] with scales [rows] as weights, rounded once."""
    return codes.to(dtype).mul_((scales * (1.0 / 127.0))[:, None])


def quantized(
    runs: Iterable[torch.Tensor], kind: Format, kernels: Kernels, *, dtype: torch.dtype | None = None
) -> Nf4 | Int8:
    """Quantise a matrix that comes as runs of rows, from `dtype` if that is given and not the type they have."""
    cast: Iterator[torch.Tensor] = (rows if dtype is None else rows.to(dtype) for rows in runs)
    return quantize_nf4(cast, kernels) if kind == "nf4" else quantize_int8(cast)


def _mean(values: torch.Tensor) -> torch.Tensor:
    """Return the mean as one thread sums it: with more of them the last bit would depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return values.mean()
    finally:
        torch.set_num_threads(threads)


def _midpoints(levels: torch.Tensor) -> torch.Tensor:
    return (levels[:-1] + levels[1:]) / 2


@cache
def nf4_levels() -> torch.Tensor:
    """Return the 16 levels of NF4, fp32."""
    return torch.tensor(LEVELS)


@cache
def dynamic_values() -> torch.Tensor:
    """Return the 256 values of the dynamic 8-bit type (Dettmers, 2016), fp32, in order.

    In each of seven decades lie twice as many as in the one below: the middles of equal pieces of it.
    """
    positive = []
    for decade in range(7):
        borders = torch.linspace(0.1, 1, 2**decade + 1)
        positive.append(10.0 ** (decade - 6) * ((borders[:-1] + borders[1:]) / 2))
    middles = torch.cat(positive)
    return torch.cat([middles, -middles, torch.tensor([0.0, 1.0])]).sort().values


@cache
def _nearest_on_grid() -> torch.Tensor:
    """Return the code nearest to each value of an even grid from -1 to 1, the lower of two equally near."""
    grid = 2 * torch.arange(_GRID, dtype=torch.float32) / (_GRID - 1) - 1
    values = dynamic_values()
    above = torch.searchsorted(values, grid).clamp(max=255)
    below = (above - 1).clamp(min=0)
    return torch.where((values[above] - grid).abs() < (grid - values[below]).abs(), above, below)
