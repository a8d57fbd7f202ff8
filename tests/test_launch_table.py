"""The launchers' tables: every value of every position, --help, the README."""

import json
import string
from pathlib import Path

import pytest
from launch_world import NAMES, NODE, QWEN, REPOSITORY, SEED_LINE, SEVEN_B, check, line, refusal

from conversion.families import FAMILIES
from toolkits.foundation.errors import MachineError, UsageError
from toolkits.launch.__main__ import launch
from toolkits.launch.arguments import CLUSTER_VARIABLES, LAUNCHERS, VARIABLES, Entry, Launcher
from toolkits.launch.checks import check_call
from toolkits.launch.table import LAUNCHER_MARKS, MARKS, markdown_launchers, markdown_table
from toolkits.training.config import all_settings

pytestmark = pytest.mark.usefixtures("home")

CASES = [
    (entry, word, position)
    for position, entries in ((True, QWEN.positions), (False, (*VARIABLES, *CLUSTER_VARIABLES)))
    for entry in entries
    for word in entry.kind.examples
]


@pytest.mark.parametrize(("entry", "word", "position"), CASES, ids=[f"{entry.name}={word}" for entry, word, _ in CASES])
def test_every_value_works_or_is_refused_by_name(entry: Entry, word: str, position: bool) -> None:
    if word == "fp8":
        error = refusal(PR=word)
        assert isinstance(error, MachineError) and "this machine has no GPU; use bf16" in str(error)
        return
    if position and entry.kind.__class__.__name__ != "Text":
        call = dict(zip(NAMES, line(), strict=True)) | _companions(entry.name, word) | {entry.name: word}
        assert check(NODE if word == "dlc" else {}, **call)
    elif entry in CLUSTER_VARIABLES:
        assert check({**NODE, **_companions(entry.name, word), entry.name: word}, ENV="dlc")
    elif not position and entry.kind.__class__.__name__ != "Text":
        adapters = {"PEFT": "lora"} if entry.name.startswith("LORA_") else {}
        assert check({**adapters, entry.name: word}, **_companions(entry.name, word))


def _companions(name: str, word: str) -> dict[str, str]:
    """Words that make `word` at `name` consistent with the rest of the line."""
    if name == "MODEL_SIZE":
        _fake_size(word)
    if word == "raw":
        Path("DATA").touch()
        Path("VALID").touch()
    return {
        "GLOBAL_BATCH_SIZE": {"BATCH_SIZE": "1"},
        "SEQ_LEN": {"PAD_LEN": "2"},
        "MIN_LR": {"LR": "5"},
        "LR": {"MIN_LR": "0"},
        "WORLD_SIZE": {"RANK": "0"},
        "MP_PP0_LAYERS": {"PP": "2"},
        "MP_VP": {"PP": "7", "GLOBAL_BATCH_SIZE": "7"},
        "TRAIN_TOKENS_OR_ITERS": {"WARMUP_TOKENS_OR_ITERS": "0"},
        "SFT": {"TRAIN_TOKENS_OR_ITERS": "1000000"},  # tokens, when it is false
    }.get(name, {})


def _fake_size(word: str) -> None:
    """Give the checkpoint about as many parameters as `word` says, by its number of layers."""
    if word == "auto":
        return
    wanted = float(word[:-1]) * (1e9 if word[-1] == "B" else 1e6)
    small = SEVEN_B | {
        "hidden_size": 896,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
    }
    small |= {"vocab_size": 1024}
    layer = 896 * (896 * 2 + 256) + 3 * 896 * 4864
    config = small | {"num_hidden_layers": max(1, round(wanted / layer))}
    Path("CKPT/hf/config.json").write_text(json.dumps(config))


def test_the_documented_values_are_the_ones_that_are_tried() -> None:
    documented = {
        "ENV": "dsw dlc", "PR": "bf16 fp16 fp32 fp8", "SP": "true false", "DO": "true false", "FL": "true false",
        "SFT": "true false", "AC": "full sel offload false none", "MODEL_SIZE": "0.5B 1.5B 3B 7B 14B 32B 72B auto",
        "OPTIMIZER_OFFLOAD": "false static auto 0.5", "MP_DATASET_TYPE": "idxmap raw", "RESUME": "auto never",
        "MP_SFT_PACKING": "true false", "EXPORT_HF": "true false",
    }  # fmt: skip
    tried = {entry.name: set(entry.kind.examples) for entry in (*QWEN.positions, *VARIABLES)}
    for name, words in documented.items():
        assert set(words.split()) <= tried[name], name
    assert len(QWEN.positions) == 25


@pytest.mark.parametrize("launcher", LAUNCHERS.values(), ids=lambda launcher: launcher.model)
def test_the_table_names_real_settings_and_the_name_real_positions(launcher: Launcher) -> None:
    fields = {setting.name for setting in all_settings()}
    for entry in (*launcher.positions, *VARIABLES):
        assert entry.setting is None or entry.setting in fields
    parts = {part for _, part, _, _ in string.Formatter().parse(launcher.name_shape) if part}
    assert parts <= {*(entry.name for entry in launcher.positions), "task", "model"}
    assert {"EP", "ETP"} & parts == {"EP", "ETP"} & {entry.name for entry in launcher.positions}


def test_every_family_keeps_the_order_that_its_users_know() -> None:
    order = {word: [entry.name for entry in launcher.positions] for word, launcher in LAUNCHERS.items()}
    assert all(order[word] == NAMES for word in ("qwen", "llama", "phi", "glm"))
    for word in ("qwen2", "mistral", "deepseek_v2"):
        assert order[word] == [*NAMES[:12], "EP", *NAMES[12:]], word
    for word in ("qwen3", "deepseek_v3"):
        assert order[word] == [*NAMES[:12], "ETP", "EP", *NAMES[12:]], word
    for word in ("qwen", "llama", "qwen3"):
        assert order[f"{word}_dpo"] == [*order[word], "BETA"], word


def test_a_family_has_a_launcher_or_does_not_train() -> None:
    started = {family for launcher in LAUNCHERS.values() for family in launcher.families}
    assert started <= {family.name for family in FAMILIES}
    assert {family.name for family in FAMILIES if not family.never_exact} == started


def test_the_wrong_launcher_for_a_checkpoint_names_the_right_one() -> None:
    with pytest.raises(UsageError, match=r"is a qwen2, run_mcore_qwen3\.sh is for qwen3 and qwen3_moe: use run_mcore"):
        check_call(LAUNCHERS["qwen3"], [*SEED_LINE[:12], "1", "1", *SEED_LINE[12:]], {})
    with pytest.raises(UsageError, match="EP=2 needs a model with experts"):
        check_call(LAUNCHERS["qwen2"], [*SEED_LINE[:12], "2", *SEED_LINE[12:]], {"NPROC_PER_NODE": "2"})
    job = check_call(LAUNCHERS["qwen2"], [*SEED_LINE[:12], "1", *SEED_LINE[12:]], {})
    assert "-cp-1-ep-1-ac-false-" in job.config.output.name


def test_the_readme_lists_the_launchers() -> None:
    opening, closing = LAUNCHER_MARKS
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert readme.split(opening)[1].split(closing)[0].strip() == markdown_launchers()
    assert {launcher.script for launcher in LAUNCHERS.values()} == {
        path.name for path in (REPOSITORY / "run_scripts").glob("run_mcore_*.sh")
    }


def test_a_call_with_beta_trains_on_pairs(home) -> None:
    job = check_call(LAUNCHERS["qwen_dpo"], [*SEED_LINE, "0.3"], {})
    assert job.call.objective.word == "dpo" and job.config.data.rows == "pairs"
    assert job.config.reference.beta == 0.3 and job.config.output.name.startswith("dpo-mcore-qwen2.5-")
    for beta, said in (("0", "BETA 0 must be above 0"), ("no", "BETA .position 26. 'no' must be a number")):
        with pytest.raises(UsageError, match=said):
            check_call(LAUNCHERS["qwen_dpo"], [*SEED_LINE, beta], {})
    place = [entry.name for entry in QWEN.positions].index("SFT")
    with pytest.raises(UsageError, match="'false' must be one of true"):
        check_call(LAUNCHERS["qwen_dpo"], [*SEED_LINE[:place], "false", *SEED_LINE[place + 1 :], "0.1"], {})


def test_help_prints_the_table(capsys) -> None:
    assert launch(["qwen", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in NAMES) and "EXTRA_ARGS" in out


def test_a_wrong_number_of_arguments_shows_what_was_given(capsys) -> None:
    shifted = [*SEED_LINE[:12], "4", *SEED_LINE[12:]]
    with pytest.raises(UsageError, match="takes 25 arguments, 26 were given"):
        launch(["qwen", *shifted])
    err = capsys.readouterr().err
    assert "too many" in err and "does not fit" in err
    with pytest.raises(UsageError, match="0 were given"):
        launch(["qwen"])
    with pytest.raises(UsageError, match="say which launcher"):
        launch(["gpt"])


def test_the_readme_shows_this_table() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    opening, closing = MARKS
    if opening not in readme:
        pytest.skip("the README has no launcher table yet")
    assert readme.split(opening)[1].split(closing)[0].strip() == markdown_table(QWEN)


def test_every_entry_is_a_setting_or_the_launchers_own_business() -> None:
    own = {"ENV", "MODEL_SIZE", "PAD_LEN", "SFT", "DRY_RUN", "EXTRA_ARGS", "NPROC_PER_NODE"}
    own |= {"MP_DATASET_TYPE", "PEFT"}
    entries = (*QWEN.positions, *VARIABLES)
    assert {entry.name for entry in entries if entry.setting is None} == own
