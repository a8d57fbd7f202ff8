"""One rank of a training run: `torchrun ... -m toolkits.training OBJECTIVE --flags`."""

import sys
import warnings

from ..foundation.errors import UsageError
from ..launch.rank import run_rank
from .objectives import OBJECTIVES


def main() -> None:
    """Read the command line and train; heavy imports wait until the signal handler stands."""
    word, *flags = sys.argv[1:] or [""]
    if word not in OBJECTIVES:
        raise UsageError(f"unknown objective {word!r}; there is {', '.join(OBJECTIVES)}")
    from .options import parse_flags

    config = parse_flags(flags)
    _quieten()
    from .run import run

    run(config, OBJECTIVES[word])


def _quieten() -> None:
    """Keep what users cannot act on off their screen: both libraries are pinned, and tests run with warnings on."""
    warnings.filterwarnings("ignore", module="megatron")  # regrets the absence of packages that are not used
    warnings.filterwarnings("ignore", category=FutureWarning)  # about torch names that megatron-core calls
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")


if __name__ == "__main__":
    run_rank(main)
