"""The file of temper pipeline: what may stand in it, what is wrong with it, and the page that explains it."""

import inspect
import re
import shlex
import shutil
from pathlib import Path

import click
import pytest
from pipeline_world import change, run, write_world

from toolkits.commands.pipeline import pipeline
from toolkits.foundation.errors import UsageError, exit_code_of
from toolkits.pipeline.kinds import HOW, KINDS
from toolkits.pipeline.options import options_of, parsed
from toolkits.pipeline.reading import read_pipeline
from toolkits.training.config import all_settings

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return write_world(tmp_path)


def assert_said(file, marker, words):
    """One of the complaints is of the first line with `marker` in it, and has these words."""
    with pytest.raises(UsageError) as caught:
        read_pipeline(file)
    line = next(number for number, text in enumerate(file.read_text().splitlines(), start=1) if marker in text)
    found = [each for each in str(caught.value).splitlines() if f"pipeline.yaml:{line}: " in each and words in each]
    assert found, (line, words, str(caught.value))


# ------------------------------------------------------------------------------------------------- what a file may say


BETTER, CHATS = '[["(.*)", "better"]]', '"{chats}"\n'


def test_every_stage_is_the_line_that_one_would_type(world):
    lines = {stage.name: stage.lines() for stage in read_pipeline(world).stages}
    tuned, aligned = "out/tuned/huggingface/tuned", "out/aligned/huggingface/aligned"
    assert [" ".join(line) for each in lines.values() for line in each] == [
        "data build chats.jsonl out/chats/chats --tokenizer base --overwrite",
        "train sft --checkpoint base --data out/chats/chats --train-iters 3 --lr 0.001 --output out/tuned --name tuned"
        " --export-hf",
        f"data pairs chats.jsonl out/said/said.jsonl --model {tuned} --replace (.*) better --overwrite",
        "data build out/said/said.jsonl out/better/better --tokenizer base --overwrite",
        f"train dpo --checkpoint {tuned} --data 0.5 out/better/better 0.5 out/chats/chats --train-iters 2 --lr 1e-05"
        " --beta 0.2 --output out/aligned --name aligned --export-hf",
        f"generate {tuned} --prompt who --prompt what [x] | y --output out/answers/before.jsonl --overwrite",
        f"generate {aligned} --prompt who --prompt what [x] | y --output out/answers/after.jsonl --overwrite",
    ]


def test_paths_start_at_the_files_folder_and_lines_at_ours(world, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (line,) = read_pipeline(Path("../pipeline.yaml")).stage("chats").lines()
    assert line[2:4] == [str(tmp_path / "chats.jsonl"), str(tmp_path / "out" / "chats" / "chats")]


def test_settings_are_the_flags_of_the_commands(world):
    for kind in KINDS.values():
        options, ours = options_of(kind.command, renamed=kind.renamed, without=kind.ours)
        names = {*options, *kind.inputs}
        assert set(kind.takes) | set(kind.needs) <= names and set(ours) == set(kind.ours), kind.word
        assert names & {"name", "do"} == set()
        # A path that is not declared as a file would start at the wrong folder.
        assert {name for name, option in options.items() if isinstance(option.parameter.type, click.Path)} <= set(
            kind.takes
        )
    trained = [kind for kind in KINDS.values() if kind.makes == "checkpoint"]
    of_training = {name for kind in trained for name in options_of(kind.command, renamed={}, without=())[0]}
    assert of_training == {setting.name for setting in all_settings()} | {"ranks"}
    known = {name for kind in KINDS.values() for name in options_of(kind.command, renamed={}, without=())[0]}
    assert known >= HOW


def test_values_reach_the_command_as_they_were_typed(world):
    change(
        world,
        ("    lr: 1e-3\n", "    lr: 1e-3\n    packing: no\n    seq_len: 1_024\n    lora_rank: 4\n    lora_alpha: 8\n"),
    )
    (line,) = read_pipeline(world).stage("tuned").lines()
    values = parsed(KINDS["sft"].command, line[2:])
    assert (values["lr"], values["packing"], values["seq_len"], values["lora_alpha"]) == (1e-3, False, 1024, 8.0)
    assert values["rows"] == "conversations" and values["export_hf"] is True
    (line,) = read_pipeline(world).stage("aligned").lines()
    assert parsed(KINDS["dpo"].command, line[2:])["rows"] == "pairs"


def test_mappings_can_be_merged(world):
    change(
        world,
        ("  - name: tuned\n", "  - &tuned\n    name: tuned\n"),
        ("  - name: aligned\n", "  - <<: *tuned\n    name: aligned\n"),
        ("    train_iters: 2\n", ""),
        ("    lr: 1e-5\n", "    lr: 1e-5\n    min_lr: 0\n"),
    )
    (line,) = read_pipeline(world).stage("aligned").lines()
    values = parsed(KINDS["dpo"].command, line[2:])
    assert (values["train_iters"], values["lr"], values["beta"]) == (3, 1e-5, 0.2)
    assert values["checkpoint"] == "out/tuned/huggingface/tuned"


def test_everything_that_is_wrong_is_said_at_once(world):
    changes = (
        ("output: out", "outptu: out"),
        ("input: chats.jsonl", "input: [gone.jsonl]\n    train_on: first\n    overwrite: true"),
        ("train_iters: 3", "train_itres: 3\n    ranks: 0"),
        ("lr: 1e-3", "lr: fast\n    beta: 0.1\n    checkpoint: base\n    lr: 1e-3"),
        ('input: ["{said}"]', 'input: ["{aligned}", "{chats}"]'),
        ('model: "{tuned}"\n    data: "0.5 {better}', 'data: "0.5 {bettr}'),
        ("do: generate", "do: generat"),
    )
    change(world, *changes)
    for marker, words in (
        ("outptu", "output is missing"),
        ("outptu", "outptu is not known here; did you mean output?"),
        ("gone.jsonl", "gone.jsonl: no such file"),
        ("train_on", "chats: train_on: 'first' is not one of 'all', 'last', 'marked'"),
        ("overwrite", "chats: overwrite is given by the pipeline"),
        ("train_itres", "tuned: sft has no setting train_itres; did you mean train_iters"),
        ("ranks", "tuned: ranks: 0 is not in the range"),
        ("    beta: 0.1", "tuned: sft has no setting beta; `temper train sft --help` lists them"),
        ("checkpoint", "tuned: checkpoint is called model here"),
        ("lr: 1e-3", "lr stands twice, in line 14 too"),
        ("{aligned}", "better: input: {aligned} stands below, in line 26"),
        ("{aligned}", "better: input: {chats} makes a dataset, and this takes a file of rows"),
        ("- name: aligned", 'aligned: dpo needs model: "{tuned}" is what the stage before made, "{model}"'),
        ("bettr", "aligned: data: no stage is called 'bettr'; did you mean better"),
        ("generat", "`do` is 'generat'; did you mean generate"),
    ):
        assert_said(world, marker, words)
    result = run(world)
    assert exit_code_of(result.exception) == 2 and not (world.parent / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "marker", "words"),
    [
        (BETTER, '[["(", "better"]]', "name: said", "said: --replace '(' 'better': missing )"),
        (BETTER, '[["a", "b", "c"]]', "replace:", "said: replace takes lists of 2 texts"),
        (BETTER, "[[a, b]]\n    better: base", "name: said", "--replace and --better were given"),
        ("beta: 0.2", "beta: -1", "name: aligned", "aligned: --beta -1 must be above 0"),
        ("beta: 0.2", "beta: 0.2\n    min_lr: 1", "name: aligned", "--min-lr 1.0 is larger than --lr"),
        ("beta: 0.2", "beta: [1, 2]", "beta", "aligned: beta takes a single value, this is a list"),
        ("beta: 0.2", "beta:", "beta", "aligned: beta takes a single value, this is nothing"),
        ("beta: 0.2", "beta: !!binary aGk=", "beta", "a value of another kind"),
        ("    train_iters: 2\n", "", "name: aligned", "aligned: give either --train-iters or --epochs"),
        ('    prompt: [who, "what [x] | y"]\n', "", "name: answers", "answers: say what to answer"),
        ("prompt: [who", "top_p: 0.5\n    prompt: [who", "name: answers", "answers: --top-p and --top-k"),
        ("before:", "'a/b':", "a/b", "answers: 'a/b' must be of letters"),
        ("name: better", "name: model", "name: model", "a stage cannot be called model"),
        ("name: better", "name: a b", "name: a b", "the name of the stage must be of letters"),
        ("model: base", "model: nowhere", "name: chats", "chats: tokenizer: no such folder: "),
        (CHATS, '"{chats}/x"\n', "/x", "tuned: data: '{chats}/x': a reference such as {NAME} stands alone"),
        (CHATS, '"{model}"\n', 'data: "{model}"', "tuned: data: {model} is not a dataset"),
        (CHATS, "nothing\n", "nothing", "tuned: data: no dataset there: "),
        ('"0.5 {better} 0.5 {chats}"', '"0.5 {better} 0.5"', "0.5 {better} 0.5", "is no blend"),
        ('{before: "{tuned}"', '{before: "{said}"', 'before: "{said}', "answers: models: {said} makes a file of rows"),
        ("stages:", "stages: 3\nmore:", "stages: 3", "stages must be a list"),
        ("output: out", "output: [out", "model: base", "not YAML"),
        ("output: out", "output: &o [*o]", "output", "an alias that contains itself"),
        ("  - name: chats", "  - chats\n  - name: chats", "- chats", "a stage has a name, `do` and settings"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(world, old, new, marker, words):
    change(world, (old, new))
    assert_said(world, marker, words)


def test_names_are_given_once(world):
    change(world, ("name: better", "name: tuned"))
    with pytest.raises(UsageError, match=r"pipeline.yaml:17: two stages are called tuned, the other in line 7"):
        read_pipeline(world)


# ------------------------------------------------------------------------------------------------- the page

PAGES = {name: (DOCS / f"pipeline{name}.md").read_text(encoding="utf-8") for name in ("", ".zh")}


def blocks(page, kind):
    """The code of a page without its comments."""
    found = re.findall(rf"```{kind}\n(.*?)```", PAGES[page], re.DOTALL)
    return [re.sub(r" +#.*", "", block) for block in found]


def test_the_pages_file_is_a_pipeline_in_both_languages(tmp_path):
    assert blocks("", "yaml") == blocks(".zh", "yaml") and blocks("", "sh") == blocks(".zh", "sh")
    (text,) = blocks("", "yaml")
    file = write_world(tmp_path, text)
    (tmp_path / "base").rename(tmp_path / "Qwen2.5-7B-Instruct")
    shutil.copy(tmp_path / "chats.jsonl", tmp_path / "ask.jsonl")
    assert [stage.name for stage in read_pipeline(file).stages][-1] == "answers"
    file.write_text(inspect.cleandoc(pipeline.help).split("\b\n")[1])
    assert len(read_pipeline(file).stages) == 6


def test_the_page_names_what_there_is():
    for page, text in PAGES.items():
        rows = re.findall(r"^\| `(\w+)`[^|]*\| `temper", text, re.M)
        assert set(rows) == {"build", "pairs", "sft", "generate"}, page
        for name in HOW:
            assert f"`{name}`" in text, (page, name)
        for line in filter(str.strip, "\n".join(blocks(page, "sh")).splitlines()):
            words = shlex.split(line)
            if words[0] == "temper":
                command = KINDS["pairs"].command if words[1] == "data" else pipeline
                options = {flag for option in command.params for flag in option.opts}
                assert {word for word in words if word.startswith("--")} <= options, line
            else:
                assert (ROOT / words[1]).is_file()
