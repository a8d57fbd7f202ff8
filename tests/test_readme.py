"""The README says what is on disk and what runs."""

import re
from pathlib import Path

from click.testing import CliRunner

from conversion.families import FAMILIES
from toolkits.cli import COMMANDS, temper
from toolkits.foundation.errors import BUG_EXIT_CODE, TemperError

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README.zh.md").read_text(encoding="utf-8")


def folders_of_the_tree():
    """Read the folders out of the picture under "The house"."""
    picture = README.split("## The house")[1].split("```")[1]
    folders, parents = [], []
    for line in filter(str.strip, picture.splitlines()):
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        parents = [*parents[:depth], name.rstrip("/")]
        folders.append("/".join(parents))
    return folders


def test_the_tree_is_the_one_on_disk():
    said = set(folders_of_the_tree())
    on_disk = {
        str(path.parent.relative_to(ROOT))
        for package in ("toolkits", "conversion", "data_preprocessing")
        for path in (ROOT / package).rglob("__init__.py")
    }
    assert said == on_disk | {"run_scripts", "tests"}


def test_ci_runs_the_readmes_own_test_command():
    assert "sh run_scripts/test.sh" in README
    assert "/run_scripts/test.sh" in (ROOT / ".ci" / "run").read_text()


def test_every_command_line_names_a_command_that_exists():
    for text in (README, CHINESE):
        for group, command in re.findall(r"temper (convert|data|verify) (\w+)", text):
            result = CliRunner().invoke(temper, [group, command, "--help"])
            assert result.exit_code == 0, f"temper {group} {command}"
    assert set(COMMANDS) == {
        "chat",
        "convert",
        "data",
        "generate",
        "pipeline",
        "plan",
        "runs",
        "score",
        "train",
        "verify",
    }


def test_every_script_named_exists():
    for text in (README, CHINESE):
        for script in re.findall(r"run_scripts/\w+\.sh", text):
            assert (ROOT / script).is_file(), script


def test_the_families_are_those_of_the_registry():
    rows = re.findall(r"^\| [^|]+ \| (`\w+`(?:, `\w+`)*) \|", README, re.MULTILINE)
    said = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert said == {name for family in FAMILIES for name in family.architectures}


def test_the_exit_codes_are_those_of_the_errors():
    sentence = README.split("### Exit codes")[1].split("A launcher")[0]
    said = {int(number) for number in re.findall(r"\b(\d+) ", sentence)}
    assert said == {0, BUG_EXIT_CODE, *(kind.exit_code for kind in TemperError.__subclasses__())}
