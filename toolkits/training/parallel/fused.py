"""What is done in one kernel: pointwise operations compiled for a GPU, and extensions that may be installed.

On a CPU every operation is the plain function, so that results there do not depend on a compiler.
"""

import importlib.util
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def fused(function: Callable[P, R]) -> Callable[P, R]:
    """Return `function` compiled where there is a GPU, and as it is elsewhere.

    Shapes are taken for constants: all micro batches of a run have as many tokens. It is compiled at its
    first call, once for each shape and for training and validation.
    """
    return torch.compile(function, dynamic=False) if torch.cuda.is_available() else function


def has_transformer_engine() -> bool:
    """Say whether Transformer Engine is installed and has the GPU that it needs."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return HAVE_TE and torch.cuda.is_available()


def has_fused_weight_gradient() -> bool:
    """Say whether Apex's kernel is installed: it adds a weight's gradient to the accumulated one in one pass."""
    return torch.cuda.is_available() and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
