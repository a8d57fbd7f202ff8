"""Settings of every test: one thread a process, since many run at once on few cores; Ctrl-C as a terminal has it."""

import json
import os
import signal

import pytest

os.environ["OMP_NUM_THREADS"] = "1"

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell starts what runs behind `&`
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # as nohup starts what it runs
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


# Files whose tests start ranks: first, so that no process is left alone with one of them in the end.
STARTS_RANKS = ("test_training_", "test_planning_truth", "test_conversion_mcore", "test_quickstart", "test_launch_cl")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: not item.path.name.startswith(STARTS_RANKS))


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with a space that holds all that the seed's line names, on a machine without a GPU."""
    from launch_world import SEVEN_B

    from toolkits.launch import checks
    from toolkits.launch.arguments import CLUSTER_VARIABLES, VARIABLES

    folder = tmp_path / "with space"
    (folder / "CKPT" / "hf").mkdir(parents=True)
    (folder / "CKPT" / "hf" / "config.json").write_text(json.dumps(SEVEN_B))
    for name in ("DATA", "VALID"):
        for ending in (".bin", ".idx"):
            (folder / f"{name}_text_document{ending}").touch()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(checks, "visible_gpus", lambda: 0)
    for entry in (*VARIABLES, *CLUSTER_VARIABLES):
        monkeypatch.delenv(entry.name, raising=False)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny model that temper generate answers with."""
    from generate_world import write_base

    return write_base(tmp_path_factory.mktemp("generate") / "base")


@pytest.fixture(scope="module")
def generator(base):
    from generate_world import generator_of

    return generator_of(base)
