"""What megatron-core 0.16.1 needs on every machine without Transformer Engine, one reason each."""

import queue


def install() -> None:
    """Apply the patches of this file to the process; a second call does nothing more."""
    _write_results_through_a_plain_queue()


def _write_results_through_a_plain_queue() -> None:
    # The checkpoint writer starts a manager process for a queue that a synchronous save uses within one
    # process only. The manager re-imports the main module (3 s a rank), and a SIGTERM to the process group
    # kills it, so that the save during the grace period fails.
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._get_write_results_queue = queue.Queue
