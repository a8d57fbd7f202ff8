"""`python -m toolkits.cards [FOLDER]`: bring the tables in a clone's READMEs up to its docs/cards."""

import sys
from pathlib import Path

from ..foundation.errors import run_guarded
from .support import write_tables

if __name__ == "__main__":
    sys.exit(run_guarded(lambda: write_tables(Path(*sys.argv[1:2]))))
