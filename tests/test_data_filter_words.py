"""What is typed for a filter: steps, recipes and splits, the table of steps, and what the command reports."""

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))
from data_world import talk, write_rows

from data_preprocessing.curate.steps import STEPS, read_recipe, read_steps, spelled
from toolkits.commands.data import data
from toolkits.foundation.errors import UsageError


def test_steps_read_the_same_from_words_and_from_recipes(tmp_path):
    yaml = pytest.importorskip("yaml")
    said = [
        "length:min=20,max=8_000",
        "language:keep=en,zh",
        "exact",
        "near:threshold=80%",
        "sample:n=5,per=key.source",
    ]
    steps, split = read_steps(said, "valid=2%,test=0.1,seed=7")
    recipe = {
        "steps": [
            {"length": {"min": 20, "max": 8000}},
            {"language": {"keep": ["en", "zh"]}},
            "exact",
            {"near": {"threshold": 0.8}},
            "sample:n=5,per=key.source",
        ],
        "split": {"valid": 0.02, "test": 0.1, "seed": 7},
    }
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    for name in ("recipe.json", "recipe.yaml"):
        assert read_recipe(tmp_path / name) == (steps, split)
    assert dict(split.shares) == {"valid": 0.02, "test": 0.1} and split.seed == 7
    assert read_steps([spelled(step) for step in steps])[0] == steps


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ("lenght:min=3", "no step is called 'lenght'; there are length, language, exact"),
        ("length", "length needs min or max"),
        ("length:min=5,max=4", "min=5 is above max=4: no row would stay"),
        ("length:mini=5", "length has no setting 'mini'; it has min, max, unit, of"),
        ("length:min=five", "min=five: it must be a whole number"),
        ("length:min=5,6", "min=5,6: it must be one value"),
        ("length:min=5,min=6", "min=5,6: it must be one value"),
        ("length:max=9,unit=words", "'words' is none of characters, tokens"),
        ("length:max=9,unit=tokens,of=prompt", "unit=tokens counts whole rows"),
        ("language", "needs either keep or drop"),
        ("language:keep=english", "'english' is none of en, de"),
        ("exact:of=question", "'question' is none of row, prompt, answers"),
        ("exact:of", "of=: it must be one value"),
        ("near:threshold=0.1", "threshold=0.1 must be from 0.2 to 1"),
        ("near:threshold=nan", "it must be a finite number"),
        ("quality:signs=rude", "'rude' is none of mojibake"),
        ("diverse", "diverse needs keep"),
        ("diverse:keep=0", "keep=0 must be above 0"),
        ("sample:n=3,share=0.1", "needs either n or share"),
        ("sample:share=2", "share=2 must be above 0 and at most 1"),
        ("sample:n=3,per=mood", "per=mood: it must be all, language, layout, file or key.NAME"),
    ],
)
def test_steps_that_cannot_be_read_are_refused(said, complaint):
    with pytest.raises(UsageError, match="--list-steps explains them") as caught:
        read_steps([said])
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ("", "name at least one part, as in valid=0.02"),
        ("valid=1.5", "valid=1.5 must be above 0 and below 1"),
        ("a=0.6,b=0.5", "the shares leave no row for OUT itself"),
        ("a/b=0.1", "'a/b' cannot be a part of a file's name"),
        ("rejects=0.1", "'rejects' cannot be a part of a file's name"),
        ("valid=x", "valid=x: it must be a number, such as 0.8 or 2%"),
        ("valid=0.1,threshold=7", "threshold=7 must be from 0.2 to 1"),
    ],
)
def test_splits_that_cannot_be_read_are_refused(said, complaint):
    with pytest.raises(UsageError) as caught:
        read_steps([], said)
    assert complaint in str(caught.value)


def test_all_complaints_come_at_once(tmp_path):
    with pytest.raises(UsageError, match="4 problems"):
        read_steps(["lenght", "length:min=x", "near:threshold=9"], "valid=7")
    (tmp_path / "recipe.json").write_text('{"steps": [{"near": 3}, {"lenght": {}}, 5], "split": {"valid": 2}}')
    with pytest.raises(UsageError, match=r"recipe.json cannot be read .*: \d problems") as caught:
        read_recipe(tmp_path / "recipe.json")
    assert all(word in str(caught.value) for word in ("{'near': 3}", "lenght", ": 5", "valid=2"))
    for content, complaint in (("[1]", "has a list `steps`"), ('{"step": []}', "found step"), ("{", "is not JSON")):
        (tmp_path / "recipe.json").write_text(content)
        with pytest.raises(UsageError, match=complaint):
            read_recipe(tmp_path / "recipe.json")
    with pytest.raises(UsageError, match="cannot be read"):
        read_recipe(tmp_path / "nowhere.yaml")


def test_the_command_explains_its_steps_and_reports_what_they_did(tmp_path):
    listed = CliRunner().invoke(data, ["filter", "--list-steps"])
    assert listed.exit_code == 0
    for name, step in STEPS.items():
        assert f"\n{name}\n" in f"\n{listed.output}" and all(reason in listed.output for reason in step.reasons)
    source = write_rows(tmp_path / "in.jsonl", [talk("q", "a"), talk("q", "a"), talk("q", "long " * 20)])
    words = ["filter", str(source), str(tmp_path / "out.jsonl"), "--step", "exact", "--step", "length:max=50"]
    done = CliRunner().invoke(data, words, catch_exceptions=False)
    out = [" ".join(line.split()) for line in done.output.splitlines()]
    assert "read in.jsonl: JSONL, 3 rows, messages 3" in out
    assert "step 1 exact 3 -> 2 duplicate 1" in out
    assert "step 2 length:max=50 2 -> 1 long 1" in out
    assert f"written {tmp_path / 'out.jsonl'}: 1 rows" in out
    assert f"dropped 2 rows, each with its reason in {tmp_path / 'out.jsonl.rejects.jsonl'}" in out
    with pytest.raises(UsageError, match="leave --step and --split out"):
        CliRunner().invoke(data, [*words, "--recipe", "x.json"], catch_exceptions=False)
    with pytest.raises(UsageError, match="--embed is for the step diverse"):
        CliRunner().invoke(data, [*words, "--embed", "model"], catch_exceptions=False)
