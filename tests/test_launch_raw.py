"""MP_DATASET_TYPE=raw: JSON files are built once for each content, and the ranks get the datasets."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from data_world import talk, write_rows, write_tokenizer
from launch_world import line

from data_preprocessing.dataset import document_prefix, open_dataset
from toolkits.foundation.errors import DataError, UsageError
from toolkits.launch import __main__ as launcher
from toolkits.launch.arguments import LAUNCHERS
from toolkits.launch.checks import check_call

RAW = {"DATASET_PATH": "train.jsonl", "VALID_DATASET_PATH": "train.jsonl"}

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture
def started(home, monkeypatch):
    """The configs that runs were started with, in a folder with a checkpoint that has a tokenizer."""
    found = []
    write_tokenizer(Path("CKPT") / "hf")
    write_rows(Path("train.jsonl"), [talk("q", "a")] * 3)
    monkeypatch.setenv("MP_DATASET_TYPE", "raw")
    monkeypatch.setattr(launcher, "start_run", lambda word, config, **_: found.append(config) or 0)
    return found


def test_a_json_file_is_built_once_and_again_when_its_content_or_the_template_changes(started, capsys):
    def begin():
        assert launcher.launch(["qwen", *line(**RAW)]) == 0
        return started[-1].data.data, capsys.readouterr().err

    prefix, said = begin()
    assert started[-1].data.valid_data == prefix and Path(prefix).parent == Path("OUT/data")
    assert "messages 3" in said and "built already" in said, "the same file twice is built once"
    assert "nothing is padded to PAD_LEN" in said
    assert len(open_dataset(prefix)) == 3
    again, said = begin()
    assert again == prefix and "messages 3" not in said
    write_rows(Path("train.jsonl"), [talk("q", "b")] * 3)
    other, _ = begin()
    template = Path("CKPT/hf/chat_template.jinja")
    template.write_text(template.read_text() + "{# changed #}")
    third, _ = begin()
    assert len({prefix, other, third}) == 3


def test_a_blend_of_json_files_becomes_a_blend_of_datasets(started):
    write_rows(Path("my texts.jsonl"), [{"text": "t"}] * 2)
    words = line(DATASET_PATH="0.5 train.jsonl 1.5 'my texts.jsonl'", VALID_DATASET_PATH="train.jsonl", SFT="false")
    words[22:24] = ["1000000", "0"]
    assert launcher.launch(["qwen", *words]) == 0
    weight, first, other_weight, second = launcher.shlex.split(started[0].data.data)
    assert (weight, other_weight) == ("1", "3")
    assert [open_dataset(path).kind for path in (first, second)] == ["conversations", "text"]


def test_a_dry_run_builds_nothing_and_says_where_it_would(started, monkeypatch, capsys):
    monkeypatch.setenv("DRY_RUN", "1")
    assert launcher.launch(["qwen", *line(**RAW)]) == 0
    assert "--data OUT/data/train-" in capsys.readouterr().out
    assert not Path("OUT").exists() and not started


def test_what_is_wrong_is_said_before_anything_starts(started):
    environment = {"MP_DATASET_TYPE": "raw"}
    with pytest.raises(DataError, match=r"DATASET_PATH DATA: DATA missing; MP_DATASET_TYPE=raw reads JSON files"):
        check_call(LAUNCHERS["qwen"], line(**RAW | {"DATASET_PATH": "DATA"}), environment)
    nodes = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "29500", "NPROC_PER_NODE": "1"}
    with pytest.raises(UsageError, match=r"MP_DATASET_TYPE=raw is for one node"):
        check_call(LAUNCHERS["qwen"], line(ENV="dlc", **RAW), environment | nodes)
    write_rows(Path("train.jsonl"), [talk("q", "a"), {"x": 1}])
    with pytest.raises(DataError, match=r"train.jsonl:2: no known layout"):
        launcher.launch(["qwen", *line(**RAW)])
    assert not started and not document_prefix(Path("OUT/data/train")).with_suffix(".bin").exists()
