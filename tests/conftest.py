"""Settings of every test: one thread a process, since many run at once on few cores."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
