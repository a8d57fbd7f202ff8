"""Weights in FP8 with a scale for each block, as DeepSeek-V3 is published (arXiv 2412.19437, section 3.3).

`X.weight` is float8_e4m3fn `[rows, columns]`, `X.weight_scale_inv` float32 `[ceil(rows / a), ceil(columns / b)]`;
config.json says `quantization_config` with `weight_block_size: [a, b]`. A weight is its stored value times the
scale of its block.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from toolkits.foundation.errors import CheckpointError, raise_all

from .safetensors_file import StoredTensor

FIELD = "quantization_config"
DTYPE = torch.bfloat16  # what weights become


def require_plain(directory: Path, config: Mapping[str, object], tensors: Mapping[str, StoredTensor]) -> None:
    """Raise CheckpointError when weights are quantized, and say what can be done."""
    quantized = [name for name, stored in tensors.items() if stored.dtype == "F8_E4M3"]
    if config.get(FIELD) is None and not quantized:
        return
    said = f"{directory} is quantized ({FIELD} {_method(config)!r}, {len(quantized)} tensors of F8_E4M3)"
    if _method(config) == "fp8" and quantized:
        raise CheckpointError(
            f"{said}: `temper convert hf2mcore --dequantize` makes them {str(DTYPE).removeprefix('torch.')}"
        )
    raise CheckpointError(f"{said}: take the model's unquantized weights")


def block_of(directory: Path, config: Mapping[str, object]) -> tuple[int, int]:
    """Return the rows and columns of a block; raise CheckpointError when the weights are quantized otherwise."""
    said = config.get(FIELD)
    block = said.get("weight_block_size") if isinstance(said, Mapping) else None
    if _method(config) != "fp8" or not isinstance(block, list) or [type(size) for size in block] != [int, int]:
        raise CheckpointError(
            f"{directory}: nothing to dequantize; that is for {FIELD} fp8 with a weight_block_size of two numbers, "
            f"config.json says {said}"
        )
    if min(block) < 1:
        raise CheckpointError(f"{directory}: config.json says weight_block_size {block}")
    return block[0], block[1]


def scales_of(directory: Path, tensors: Mapping[str, StoredTensor], block: tuple[int, int]) -> dict[str, str]:
    """Return the name of its scales for each FP8 weight; raise CheckpointError that lists what does not fit."""
    scales = {name: f"{name}_scale_inv" for name, stored in tensors.items() if stored.dtype == "F8_E4M3"}
    problems = []
    for name, scale in scales.items():
        expected = tuple(map(math.ceil, (size / step for size, step in zip(tensors[name].shape, block, strict=False))))
        if len(tensors[name].shape) != 2:
            problems.append(f"{name}: {list(tensors[name].shape)} is no matrix")
        elif scale not in tensors:
            problems.append(f"{scale} is missing")
        elif tensors[scale].dtype != "F32" or tensors[scale].shape != expected:
            found = tensors[scale]
            problems.append(f"{scale}: {found.dtype} {list(found.shape)}, expected F32 {list(expected)}")
    raise_all(CheckpointError, f"{directory}: FP8 weights without the scales of their blocks", problems)
    return scales


def dequantized(weight: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Return `[rows, columns]` in bfloat16; a row of blocks at a time is in memory twice."""
    rows, columns = weight.shape
    result = torch.empty(weight.shape, dtype=DTYPE)
    for number, start in enumerate(range(0, rows, block[0])):
        part = slice(start, start + block[0])
        result[part] = weight[part].float() * scales[number].repeat_interleave(block[1])[:columns]
    return result


def plain_config(config: Mapping[str, object]) -> dict[str, object]:
    """Return config.json of the same model with the weights that dequantizing gives."""
    field = "torch_dtype" if "torch_dtype" in config else "dtype"
    return {
        **{name: value for name, value in config.items() if name != FIELD},
        field: str(DTYPE).removeprefix("torch."),
    }


def _method(config: Mapping[str, object]) -> object:
    said = config.get(FIELD)
    return said.get("quant_method") if isinstance(said, Mapping) else said
