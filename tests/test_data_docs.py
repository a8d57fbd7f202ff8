"""The page "Prepare data": every example builds and is what the page says; commands and flags exist; Chinese equals."""

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from data_world import write_rows, write_tokenizer
from template_styles import STYLES, marked

from data_preprocessing.build import build
from data_preprocessing.dataset import open_dataset
from data_preprocessing.layouts import LAYOUTS
from toolkits.cli import temper

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = {name: (DOCS / f"prepare-data{name}.md").read_text(encoding="utf-8") for name in ("", ".zh")}
EXAMPLE = re.compile(r"```json\n(.*?)```\n`build` \S+ `([^`]+)`[^`]*`(\w+)`", re.DOTALL)


def examples(page):
    return [(json.loads(row), layout, kind) for row, layout, kind in EXAMPLE.findall(PAGES[page])]


@pytest.mark.parametrize(("row", "layout", "kind"), examples(""))
def test_every_example_is_what_the_page_says(tmp_path, row, layout, kind):
    tokenizer = write_tokenizer(tmp_path / "tiny", marked("thinking"))
    manifest = build(write_rows(tmp_path / "rows.jsonl", [row]), tmp_path / "out", tokenizer=tokenizer)
    assert manifest["input"]["layouts"] == {layout: 1}
    assert open_dataset(tmp_path / "out").kind == kind


def test_the_page_leaves_no_layout_and_no_kind_out():
    found = examples("")
    assert len(found) == PAGES[""].count("```json") == 14 and "thinking" in STYLES
    assert {kind for _, _, kind in found} == {"conversations", "text", "preferences", "labelled", "prompts"}
    assert set(LAYOUTS) <= {layout for _, layout, _ in found}


def test_both_languages_have_the_same_examples_and_commands():
    assert examples(".zh") == examples("")
    words = {page: re.findall(r"^(temper data [^#\n]*?) *(?:#.*)?$", text, re.M) for page, text in PAGES.items()}
    assert words[".zh"] == words[""] and len(words[""]) == 13
    assert [text.count("\n#") for text in PAGES.values()] == [PAGES[""].count("\n#")] * 2


@pytest.mark.parametrize("page", PAGES)
def test_every_command_and_flag_exists(page):
    commands = re.findall(r"^temper data (\w+) ([^#\n]*)", PAGES[page], re.M)
    assert {name for name, _ in commands} == {"build", "show", "check", "diff", "convert", "filter", "mix"}
    for name, words in commands:
        said = CliRunner().invoke(temper, ["data", name, "--help"]).output
        for flag in re.findall(r"(?<!\S)--?[a-z][a-z-]*", words):
            assert re.search(rf"(?<!\S){flag}\b", said), f"temper data {name} {flag}"
