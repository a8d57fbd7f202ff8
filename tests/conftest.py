"""Settings of every test: one thread a process, since many run at once on few cores."""

import json
import os

import pytest

os.environ["OMP_NUM_THREADS"] = "1"


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
