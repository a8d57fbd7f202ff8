"""`temper plan`: the figures that people quote, the recommendation, the launcher's line, and what it refuses."""

import json
import shlex
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
from click.testing import CliRunner
from launch_world import SEVEN_B

from conversion.plan import plan_for
from toolkits.cli import temper
from toolkits.commands.plan import SEARCHED, TAKEN
from toolkits.foundation.errors import UsageError
from toolkits.launch import checks
from toolkits.launch.arguments import LAUNCHERS, VARIABLES
from toolkits.launch.checks import check_call
from toolkits.planning.figures import quoted
from toolkits.planning.layouts import Question, answer
from toolkits.planning.line import AC_WORDS, launcher_line
from toolkits.planning.memory import USABLE, offload_that_fits, run_memory
from toolkits.planning.states import ELEMENT, Share, Storage, buckets, states
from toolkits.planning.timing import flops_per_token, step_time
from toolkits.planning.weights import Tuning, Weight, adapter_parameters, stage_weights
from toolkits.training.config import TrainConfig, all_settings
from toolkits.training.layout import layout_of

ROOT = Path(__file__).resolve().parents[1]
SEVENTY_TWO_B = SEVEN_B | {
    "hidden_size": 8192,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 29568,
}
PLAN = plan_for(SEVEN_B)
G = 2**30


def config(**values):
    fields = {"checkpoint": "CKPT", "data": Path("DATA"), "output": Path("OUT"), "train_iters": 10, "seq_len": 4096}
    return TrainConfig.from_values(fields | {"global_batch_size": 64} | values)


def question(plan=PLAN, *, gpus=8, gpu_memory=80, method="full", fixed=(), **values):
    return Question(plan, config(**values), Tuning(method), gpus, gpu_memory * G, fixed=frozenset(fixed))


def figure(name, rank=8):
    return next(each for each in quoted(PLAN, Tuning(lora_rank=rank)) if each.name.startswith(name))


@pytest.mark.parametrize(
    ("name", "gigabytes"),
    [("Megatron", 137), ("ZeRO", 122), ('"full"', 112), ("bf16 gradients", 91), ("QLoRA", 5.5)],
)
def test_the_figures_of_7b_that_people_quote(name, gigabytes):
    assert PLAN.num_parameters == 7_615_616_512
    assert figure(name).value / 1e9 == pytest.approx(gigabytes, abs=0.5 if gigabytes > 10 else 0.05)
    assert figure(name).derivation


def test_lora_on_every_matrix_of_7b_is_20_million():
    """Per layer r x (rows + columns): q 7168, k and v 4096, o 7168, gate, up and down 22528 each."""
    assert adapter_parameters(PLAN, Tuning("lora", 8)) == 8 * 28 * (7168 + 2 * 4096 + 7168 + 3 * 22528) == 20_185_088
    assert figure("LoRA", rank=64).value == 20_185_088  # what is quoted, whatever is asked for
    assert "0.265%" in figure("LoRA").derivation and figure("LoRA r=64", rank=64).value == 8 * 20_185_088


def test_lora_of_7b_with_other_matrices_is_21_million():
    """32 layers of 4096 wide, 8 key/value heads of 128, 14336 feed-forward units, 32,000 tokens: 0.29%, say 0.3%."""
    other = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    said = quoted(plan_for(SEVEN_B | other | {"intermediate_size": 14336, "vocab_size": 32000}), Tuning())
    lora = next(each for each in said if each.name.startswith("LoRA"))
    assert lora.text == "21.0 M" and lora.value == 20_971_520 and "0.290%" in lora.derivation


@pytest.mark.parametrize(("precision", "distributed", "whole", "shared"), [
    ("bf16", False, 18, 0), ("bf16", True, 6, 12), ("fp32", False, 16, 0), ("fp32", True, 8, 8),
])  # fmt: skip
def test_bytes_of_a_parameter(precision, distributed, whole, shared):
    weights = [Weight("a", 4096), Weight("b", 1024)]
    held = states([weights], Tuning(), Storage(ELEMENT[precision], Share(of=4), distributed=distributed))
    assert held.total == 5120 * whole + 5120 // 4 * shared and held.host == 0


def test_buffers_pad_weights_to_64_and_buckets_to_128_and_every_rank():
    laid = list(buckets([Weight("first", 100, shared=True), Weight("second", 70), Weight("third", 1)], 3))
    assert [(one.start, one.end, one.weights) for one in laid] == [
        (0, 384, ((0, 1), (64, 134))),
        (384, 768, ((384, 484),)),
    ]
    assert sum(one.owned(replica, 3) for one in laid for replica in range(3)) == 171


def test_pipeline_stages_hold_the_whole_model_once():
    for first, virtual in ((0, 0), (10, 0), (0, 7), (0, 1)):
        values = {"pipeline_parallel": 4, "first_stage_layers": first, "virtual_stage_layers": virtual}
        layout = layout_of(config(**values), PLAN.settings, 8)
        stages = [list(chain(*stage_weights(PLAN, layout, stage))) for stage in range(4)]
        assert sum(weight.count for weights in stages for weight in weights) == PLAN.num_parameters
        assert sum(weight.name.endswith("fc2.weight") for weight in stages[0]) == (first or 7)


def test_flops_of_a_token():
    matrices = PLAN.num_parameters - 152064 * 3584  # the input embedding is a look-up
    assert flops_per_token(PLAN, 4096, Tuning()) == pytest.approx(6 * matrices + 6 * 28 * 3584 * 4096, rel=1e-4)


def test_state_in_cpu_memory_leaves_the_gpu_by_its_share():
    weights = [[Weight("a", 4096), Weight("b", 1024)]]
    held = [states(weights, Tuning(), Storage(2, Share(of=4), offload=share)) for share in (0.0, 0.5, 1.0)]
    assert [each.optimizer for each in held] == [12 * 1280, 6 * 1280, 0]
    assert [each.host for each in held] == [0, 16 * 640, 16 * 1280]  # there the fp32 gradient too
    assert len({each.parameters + each.gradients for each in held}) == 1


def test_the_smallest_tenth_of_the_optimizer_that_fits_goes_to_cpu_memory():
    settings = config(global_batch_size=8, recompute="full", seq_len=2048)
    layout = layout_of(settings, PLAN.settings, 1)

    def needed(share):
        return max(rank.total for rank in run_memory(PLAN, settings, layout, Tuning(), offload=share))

    share = offload_that_fits(PLAN, settings, layout, 80 * G)
    assert 0 < share < 1 and needed(share) <= 80 * G * USABLE < needed(share - 0.1)
    assert offload_that_fits(PLAN, settings, layout, 200 * G) == 0.0
    with pytest.raises(UsageError, match=r"still needs 5\d.\d GB of 39.5 GB .92% of a GPU's 42.9 GB."):
        offload_that_fits(PLAN, settings, layout, 40 * G)


def test_context_parallelism_divides_activations_and_the_optimizer():
    def planned(**values):
        layout = layout_of(settings := config(seq_len=8192, **values), PLAN.settings, 8)
        return run_memory(PLAN, settings, layout, Tuning())[0]

    alone, shared = planned(), planned(context_parallel=4)
    assert shared.states == alone.states  # over DP x CP
    # A quarter, more by gathered keys and values, less by the rank's own.
    assert shared.activations / alone.activations == pytest.approx(1 / 4, rel=0.02)


def test_rows_that_fit_no_other_layout_are_divided_by_context_parallelism():
    found = answer(question(seq_len=2**19, global_batch_size=8))
    assert found.chosen is not None and found.chosen.layout.context > 1
    assert "because no layout without it fits: TP 4 x PP" in found.reason
    assert all(each.layout.context == 1 for each in answer(question()).candidates)  # where TP does


def test_virtual_stages_wait_less_and_keep_more():
    def planned(**values):
        settings = config(pipeline_parallel=4, **values)
        layout = layout_of(settings, PLAN.settings, 8)
        return run_memory(PLAN, settings, layout, Tuning())[0], step_time(PLAN, settings, layout, Tuning())

    (plain, slow), (virtual, fast) = planned(), planned(virtual_stage_layers=1)
    assert fast.bubble == slow.bubble / 7
    # 4 micro batches of 7 layers in flight, or 31 parts of one layer: 1 + (PP - 1) / (PP x 7) times as much
    assert virtual.activations / plain.activations == pytest.approx(31 / 28, rel=0.05)


def test_7b_needs_a_split_and_the_answer_says_why():
    found = answer(question(fixed=["recompute"]))
    chosen = found.chosen
    assert chosen is not None and chosen.bytes <= 80 * G * 0.92
    assert chosen.layout.tensor * chosen.layout.pipeline == 2
    assert "TP 1 x PP 1 x DP 8, micro batch 1 needs 8" in found.reason
    assert all(each.time.seconds >= chosen.time.seconds for each in found.candidates if each.bytes <= 80 * G * 0.92)


def test_a_card_that_holds_the_model_needs_no_split():
    found = answer(question(gpu_memory=141))
    assert found.chosen and found.chosen.layout.tensor * found.chosen.layout.pipeline == 1
    assert "fits one GPU" in found.reason


def test_what_the_user_fixed_is_not_searched():
    found = answer(question(fixed=["tensor_parallel", "micro_batch_size"], tensor_parallel=4, micro_batch_size=2))
    assert {(each.layout.tensor, each.config.batch.micro_batch_size) for each in found.candidates} == {(4, 2)}


def test_nothing_fits_says_what_would():
    found = answer(question(plan_for(SEVENTY_TWO_B)))
    assert found.chosen is None
    assert "nothing fits" in found.reason and "QLoRA" in found.reason
    assert "OPTIMIZER_OFFLOAD=0.8" in found.reason and "GB of CPU memory a node" in found.reason


def test_a_layout_against_the_rules_is_refused():
    with pytest.raises(UsageError, match="TP=3 does not divide"):
        answer(question(gpus=3, fixed=["tensor_parallel"], tensor_parallel=3))


def test_memory_falls_as_each_way_promises():
    def total(tuning=None, **values):
        settings = config(tensor_parallel=2, **values)
        layout = layout_of(settings, PLAN.settings, 8)
        return max(rank.total for rank in run_memory(PLAN, settings, layout, tuning or Tuning()))

    full = total()
    assert total(recompute="full") < total(recompute="selective") < full
    assert total(Tuning("qlora")) < total(Tuning("lora")) < full
    assert full < total(distributed_optimizer=False) and full < total(sequence_parallel=False)
    assert full < total(micro_batch_size=2) < 2 * full


def run(*words):
    result = CliRunner().invoke(temper, ["plan", *words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "a model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SEVEN_B))
    return folder


def test_the_line_passes_the_launchers_own_check(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checks, "visible_gpus", lambda: 8)
    for entry in VARIABLES:
        monkeypatch.delenv(entry.name, raising=False)
    for ending in (".bin", ".idx"):
        (tmp_path / f"DATA_text_document{ending}").touch()
    said = json.loads(run("--config", str(model), "--seq-len", "4096", "--global-batch-size", "64", "--json"))
    assert (
        run("--config", str(model), "--seq-len", "4096", "--global-batch-size", "64").splitlines()[-1] == said["line"]
    )
    environment, *words = shlex.split(said["line"])
    assert words[:2] == ["sh", "run_scripts/run_mcore_qwen.sh"] and (ROOT / words[1]).is_file()
    job = check_call(LAUNCHERS["qwen"], words[2:], dict([environment.split("=")]))
    best = said["recommended"]
    assert (job.ranks, job.config.layout.tensor_parallel) == (8, best["tensor"])
    assert job.config.layout.pipeline_parallel == best["pipeline"]
    assert job.config.batch.micro_batch_size == best["micro_batch_size"]
    assert job.config.data.seq_len == 4096 and job.config.batch.global_batch_size == 64


def test_the_line_carries_every_setting_that_was_given(model):
    said = json.loads(run("--config", str(model), "--pipeline-parallel", "2", "--virtual-stage-layers", "7", "--json",
                          "--keep-last", "3", "--global-batch-size", "64", "--optimizer-offload", "0.5"))  # fmt: skip
    assert said["recommended"]["virtual_stages"] == 2 and said["recommended"]["host_bytes_of_node"] > 0
    before, words = said["line"].split(" sh ")
    assert set(before.split()) == {"NPROC_PER_NODE=8", "KEEP_LAST=3", "MP_VP=7"} and words.split()[18] == "0.5"
    uneven = ("--pipeline-parallel", "2", "--first-stage-layers", "12", "--context-parallel", "2", "--json")
    before, words = json.loads(run("--config", str(model), *uneven))["line"].split(" sh ")
    assert "MP_PP0_LAYERS=12" in before and words.split()[12] == "2"


def test_everything_that_is_asked_has_a_place_in_the_line():
    placed = {entry.setting for entry in (*LAUNCHERS["qwen3"].positions, *VARIABLES)}
    assert placed >= TAKEN | SEARCHED


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_line_of_adapters_asks_for_them(model, method):
    said = json.loads(run("--config", str(model), "--method", method, "--lora-rank", "8", "--json"))
    assert said["fits"] and said["refused"] == []
    assert f" PEFT={method} LORA_RANK=8 sh run_scripts/run_mcore_qwen.sh " in said["line"]
    assert {way["method"] for way in said["ways"]} == {"full", "lora", "qlora"}


def test_more_than_a_node_is_the_launchers_business(model):
    said = json.loads(run("--config", str(model), "--gpus", "16", "--global-batch-size", "64", "--json"))
    assert said["fits"]
    assert "dlc" in (said["line"] or said["refused"][0])


def test_an_estimate_is_called_one(model):
    shown = " ".join(run("--config", str(model), "--gpu-tflops", "400").split())
    assert (
        "ESTIMATE, not measured" in shown and "assumes 400 TFLOP/s" in shown and "for the checkpoints: 2 kept" in shown
    )


def test_tied_embeddings_of_a_pipeline_are_said(model):  # [39]
    shared = "tied: yes, shared across first/last stage"
    assert shared not in run("--config", str(model), "--pipeline-parallel", "2")
    (model / "config.json").write_text(json.dumps(SEVEN_B | {"tie_word_embeddings": True}))
    assert shared in run("--config", str(model), "--pipeline-parallel", "2")
    assert shared not in run("--config", str(model), "--pipeline-parallel", "1")


@pytest.mark.parametrize("amount", ["80", "G", "0G", "-1G", "80K"])
def test_an_amount_of_memory_needs_a_unit(model, amount):
    result = CliRunner().invoke(temper, ["plan", "--config", str(model), "--gpu-memory", amount])
    assert result.exit_code == 2 and "is not an amount such as 80G" in result.output


def test_a_model_that_does_not_train_exactly_gets_no_line(model):
    (model / "config.json").write_text(json.dumps(SEVEN_B | {"use_sliding_window": True}))
    said = json.loads(run("--config", str(model), "--json"))
    assert said["line"] is None and "sliding-window" in said["refused"][0]


def test_every_way_of_recomputing_has_its_launcher_word():
    setting = next(each for each in all_settings() if each.name == "recompute")
    entry = next(each for each in LAUNCHERS["qwen"].positions if each.name == "AC")
    assert set(AC_WORDS) == set(setting.choices)
    assert set(AC_WORDS.values()) <= set(entry.kind.examples)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_line_of_every_launcher_has_a_word_for_every_position(name):
    layout, launcher = layout_of(config(), PLAN.settings, 8), LAUNCHERS[name]
    line = launcher_line(launcher, config(), layout, Tuning(), plan=PLAN, checkpoint="CKPT")
    assert len(shlex.split(line)) == 3 + len(launcher.positions)


def test_planning_imports_no_torch(model):
    script = f"""
import sys
from toolkits.cli import temper
try:
    temper(["plan", "--config", {str(model)!r}])
except SystemExit as leaving:
    assert not leaving.code
    print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "megatron", "transformers"} & set(done.stdout.splitlines()[-1].split())
