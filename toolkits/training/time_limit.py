"""When a run ends by itself, before the time limit of its job does."""

import time

import psutil

from .settings import OutputSettings


def is_out_of_time(output: OutputSettings) -> bool:
    """Whether --stop-after has passed since this process began, before its imports and loading."""
    return bool(output.stop_after) and time.time() - psutil.Process().create_time() > 60 * output.stop_after
