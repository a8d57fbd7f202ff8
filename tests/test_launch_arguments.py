"""A launcher's call: what it becomes, NAME, the checks, the variables, DRY_RUN."""

import json
import re
import shlex
from pathlib import Path

import pytest
from launch_world import NODE, QWEN, SEVEN_B, check, line, refusal

from toolkits.foundation.errors import CheckpointError, DataError
from toolkits.launch import checks
from toolkits.launch.__main__ import launch
from toolkits.launch.checks import check_call
from toolkits.launch.kinds import human_size
from toolkits.launch.nodes import Nodes

pytestmark = pytest.mark.usefixtures("home")


def test_the_seeds_line_becomes_these_settings() -> None:
    job = check()
    values = job.config.values()
    expected = {
        "checkpoint": "CKPT", "data": "DATA", "valid_data": "VALID", "output": Path("OUT"),
        "micro_batch_size": 1, "global_batch_size": 8, "lr": 1e-5, "min_lr": 1e-6, "seq_len": 128,
        "precision": "bf16", "tensor_parallel": 1, "pipeline_parallel": 1, "sequence_parallel": True,
        "distributed_optimizer": True, "flash_attention": True, "save_interval": 100, "train_iters": 1000,
        "warmup_iters": 100, "adam_beta1": 0.9, "adam_beta2": 0.95, "weight_decay": 0.1, "clip_grad": 1.0,
        "packing": True, "export_hf": False, "keep_last": 2,
    }  # fmt: skip
    assert {name: values[name] for name in expected} == expected
    assert (job.ranks, job.device, job.num_parameters) == (1, "CPU", 7_615_616_512)
    assert job.config.output.name == (
        "finetune-mcore-qwen2.5-7B-lr-1e-5-minlr-1e-6-bs-1-gbs-8-seqlen-128-pr-bf16-tp-1-pp-1-cp-1"
        "-ac-false-do-true-sp-true-ti-1000-wi-100"
    )


OFFLOADS = {"false": "0", "static": "1", "auto": "auto", "0.3": "0.3"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"LR": "fast"}, r"LR \(position 5\) 'fast' must be a number"),
        ({"LR": "nan"}, "must be a number of at least 0"),
        ({"TP": "0"}, r"TP \(position 10\) '0' must be at least 1"),
        ({"BATCH_SIZE": "1.5"}, "must be a whole number"),
        ({"SP": "True"}, "must be one of true, false"),
        ({"MODEL_SIZE": "7"}, "must be a number with M or B"),
        ({"OPTIMIZER_OFFLOAD": "1.5"}, "must be one of false, static, auto, or a fraction"),
        ({"OUTPUT_BASEPATH": ""}, r"OUTPUT_BASEPATH \(position 25\) '' must not be empty"),
        ({"PAD_LEN": "129"}, "PAD_LEN 129 is larger than SEQ_LEN 128"),
        ({"MIN_LR": "1e-4"}, "MIN_LR 0.0001 is larger than LR 1e-05"),
        ({"WARMUP_TOKENS_OR_ITERS": "1000"}, "leaves nothing of TRAIN_TOKENS_OR_ITERS 1000"),
        ({"BATCH_SIZE": "3"}, "GLOBAL_BATCH_SIZE 8 is not a multiple of BATCH_SIZE 3 x DP 1 = 3: use 6 or 9"),
        ({"TP": "8"}, "TP=8 > 4 KV groups: use TP 1, 2 or 4"),
        ({"PP": "3"}, r"PP=3 does not divide 28 layers .* use PP 2 or 4"),
        ({"MODEL_SIZE": "14B"}, r"MODEL_SIZE is 14B, but .*CKPT describes 7.6B \(7,615,616,512 parameters\)"),
        ({"PRETRAIN_CHECKPOINT_PATH": "none"}, "HF_CONFIG"),
    ],
)
def test_a_wrong_word_is_refused_with_exit_2(changes: dict[str, str], words: str) -> None:
    error = refusal(**changes)
    assert error.exit_code == 2 and re.search(words, str(error)), error


def test_all_complaints_come_at_once() -> None:
    error = refusal(
        {"EXTRA_ARGS": "--warp 9", "MP_VP": "2"}, ENV="cloud", LR="x", PAD_LEN="999", TP="8", DATASET_PATH="gone"
    )
    for words in ("ENV", "LR", "PAD_LEN", "KV groups", "gone_text_document.bin", "--warp", "MP_VP", "8 problems"):
        assert words in str(error)
    assert error.exit_code == 2


def test_missing_things_have_their_own_exit_codes() -> None:
    error = refusal(PRETRAIN_CHECKPOINT_PATH="nowhere")
    assert isinstance(error, CheckpointError)
    assert "no checkpoint at nowhere. Pretrained weights were requested; refusing to train from random" in str(error)
    Path("VALID_text_document.idx").unlink()
    error = refusal()
    assert isinstance(error, DataError)
    assert "VALID_DATASET_PATH VALID: VALID_text_document.idx missing" in str(error)


@pytest.mark.parametrize("spelling", ["DATA", "DATA_text_document", "DATA_text_document.bin"])
def test_datasets_in_every_spelling_and_validation_on_the_same(spelling: str) -> None:
    assert check(VALID_DATASET_PATH=spelling).config.data.valid_data == spelling
    Path("DATA_text_document.bin").unlink()
    error = refusal(VALID_DATASET_PATH=spelling)
    assert str(error).count("DATA_text_document.bin missing") == 1, "one set, one complaint"


@pytest.mark.parametrize("place", ["CKPT/hf", "CKPT/release", "CKPT"])
def test_the_config_is_found_in_every_kind_of_checkpoint(place: str) -> None:
    Path("CKPT/release").mkdir()
    assert check(PRETRAIN_CHECKPOINT_PATH=place).num_parameters == 7_615_616_512


def test_none_trains_from_scratch_with_a_config() -> None:
    for said in ("CKPT/hf", "CKPT/hf/config.json"):
        job = check({"HF_CONFIG": said}, PRETRAIN_CHECKPOINT_PATH="none")
        assert job.config.model.checkpoint == "none" and job.config.model.hf_config == Path(said)
    error = refusal({"HF_CONFIG": "nowhere"}, PRETRAIN_CHECKPOINT_PATH="none")
    assert "nowhere/config.json does not exist" in str(error)


def test_a_model_that_cannot_be_trained_exactly_is_refused() -> None:
    Path("CKPT/hf/config.json").write_text(json.dumps(SEVEN_B | {"use_sliding_window": True}))
    assert "sliding-window" in str(refusal())
    Path("CKPT/hf/config.json").write_text("{")
    assert "is not JSON" in str(refusal())


def test_the_variables_reach_the_settings() -> None:
    config = check({"EPOCHS": "3", "MP_SFT_PACKING": "false", "EXPORT_HF": "true", "KEEP_LAST": "5"}).config
    assert (config.batch.epochs, config.batch.train_iters) == (3.0, 0)
    assert (config.data.packing, config.output.export_hf, config.output.keep_last) == (False, True, 5)
    assert "-ti-3epochs-" in config.output.name
    extra = check({"EXTRA_ARGS": "--weight-decay 0.5 --no-packing --too-long 'drop'", "EPOCHS": ""}).config
    assert (extra.optimizer.weight_decay, extra.data.packing, extra.data.too_long) == (0.5, False, "drop")
    assert "EXTRA_ARGS: " in str(refusal({"EXTRA_ARGS": "'open"}))
    assert "EXTRA_ARGS: " in str(refusal({"EXTRA_ARGS": "--precision fp4"}))


def test_the_number_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(TP="2", PP="2").ranks == 4
    assert check({"NPROC_PER_NODE": "8"}, TP="2").ranks == 8
    assert "does not divide the 3 ranks" in str(refusal({"NPROC_PER_NODE": "3"}, TP="2"))
    monkeypatch.setattr(checks, "visible_gpus", lambda: 8)
    assert (check().ranks, check().device) == (8, "GPU")
    assert "8 visible GPUs" in str(refusal({"NPROC_PER_NODE": "16"}, GLOBAL_BATCH_SIZE="16"))


def test_a_container_job_counts_ranks_over_its_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    job = check(NODE, ENV="dlc", TP="2")
    assert (job.ranks, job.world, job.device, job.nodes) == (2, 8, "CPU", Nodes(4, 3, "node-0", 29500))
    timeouts = NODE | {"JOIN_TIMEOUT": "60", "SILENCE_TIMEOUT": "10"}
    assert check(timeouts, ENV="dlc").nodes == Nodes(4, 3, "node-0", 29500, join_timeout=60, silence_timeout=10)
    # The rules hold the world against the layout and the batch, not one node.
    assert "BATCH_SIZE 2 x DP 8 = 16: use 16" in str(refusal(NODE, ENV="dlc", BATCH_SIZE="2"))
    assert "does not divide the 6 ranks" in str(refusal(NODE | {"WORLD_SIZE": "3", "RANK": "0"}, ENV="dlc", TP="4"))
    assert check(NODE, ENV="dsw").nodes == Nodes()
    monkeypatch.setattr(checks, "visible_gpus", lambda: 8)
    gpus = {name: word for name, word in NODE.items() if name != "NPROC_PER_NODE"}
    job = check(gpus, ENV="dlc", GLOBAL_BATCH_SIZE="32")
    assert (job.ranks, job.world, job.device) == (8, 32, "GPU")
    assert check(gpus | {"KUBERNETES_CONTAINER_RESOURCE_GPU": "2"}, ENV="dlc").ranks == 2
    error = refusal(gpus | {"KUBERNETES_CONTAINER_RESOURCE_GPU": "16"}, ENV="dlc", GLOBAL_BATCH_SIZE="64")
    assert "KUBERNETES_CONTAINER_RESOURCE_GPU is 16, this machine has 8 visible GPUs" in str(error)


def test_a_container_job_names_every_variable_that_is_missing_or_wrong() -> None:
    error = refusal(ENV="dlc")
    assert error.exit_code == 2 and "5 problems" in str(error)
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        assert f"- {name} is not set (dlc: " in str(error)
    assert "no visible GPU; NPROC_PER_NODE says how many CPU ranks" in str(error)
    assert "MASTER_ADDR is not set" in str(refusal(NODE | {"MASTER_ADDR": ""}, ENV="dlc"))
    assert "RANK 'x' must be a whole number" in str(refusal(NODE | {"RANK": "x"}, ENV="dlc"))
    assert "RANK 4 must be below WORLD_SIZE 4" in str(refusal(NODE | {"RANK": "4"}, ENV="dlc"))
    assert "MASTER_PORT 70000 must be at most 65535" in str(refusal(NODE | {"MASTER_PORT": "70000"}, ENV="dlc"))


def test_a_dry_run_prints_the_line_of_its_node(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    for name, word in (NODE | {"DRY_RUN": "1", "NPROC_PER_NODE": ""}).items():
        monkeypatch.setenv(name, word)
    assert launch(["qwen", *line(ENV="dlc", GLOBAL_BATCH_SIZE="32")]) == 0
    out, err = capsys.readouterr()
    place = "--nnodes=4 --node-rank=3 --master-addr=node-0 --master-port=29500 --nproc-per-node=8 -m toolkits.training"
    assert place in out and "--standalone" not in out
    assert "DP 32 = 32 GPU ranks" in err and "4 x 8 ranks, this is node 3; node 0 answers at node-0:29500" in err


def test_auto_says_the_computed_size() -> None:
    assert "-qwen2.5-7.6B-lr-" in check(MODEL_SIZE="auto").config.output.name
    assert [human_size(count) for count in (494e6, 3.4e6, 72.7e9, 14e9, 2e6)] == ["0.5B", "3.4M", "72.7B", "14B", "2M"]


def test_dry_run_prints_a_line_that_says_the_same(monkeypatch, capsys, home: Path) -> None:
    monkeypatch.setenv("DRY_RUN", "1")
    words = line(DATASET_PATH=str(home / "DATA"), OUTPUT_BASEPATH="o ut")
    assert launch(["qwen", *words]) == 0
    out, err = capsys.readouterr()
    assert "finetune-mcore-qwen2.5-7B-" in err and "TP 1 x PP 1 x DP 1 = 1 CPU rank" in err
    assert not (home / "o ut").exists()
    printed = shlex.split(out)
    start = printed.index("-m")
    assert printed[0].startswith("PYTHONPATH=") and Path(printed[1]).name == "torchrun"
    assert printed[start : start + 3] == ["-m", "toolkits.training", "sft"]
    assert "--nproc-per-node=1" in printed
    from toolkits.training.options import parse_flags

    config = check_call(QWEN, words, {}).config
    assert parse_flags(printed[start + 3 :]) == config
    assert printed[start + 3 :] == config.flags()


def test_flags_that_the_checks_rest_on_are_not_taken_from_extra_args() -> None:
    own = ("--checkpoint /elsewhere", "--name ../../esc", "--output=/elsewhere --lr 1", "--seq-len=2", "--rows x")
    for flags in own:
        assert "the positions and variables say that" in str(refusal({"EXTRA_ARGS": flags}))


def test_resume_recompute_and_uneven_stages_reach_the_settings() -> None:
    said = {"RESUME": "never", "MP_AC_LAYERS": "2", "MP_PP0_LAYERS": "4"}
    config = check(said, AC="sel", PP="2", PR="fp16").config
    assert (config.output.resume, config.compute.recompute, config.compute.precision) == (False, "selective", "fp16")
    assert (config.compute.recompute_layers, config.layout.first_stage_layers) == (2, 4)


def test_context_virtual_stages_and_offload_reach_the_settings() -> None:
    words = {"CP": "2", "PP": "2", "GLOBAL_BATCH_SIZE": "8"}
    config = check({"MP_VP": "7"}, OPTIMIZER_OFFLOAD="static", **words).config
    assert (config.layout.context_parallel, config.layout.virtual_stage_layers) == (2, 7)
    assert check(CP="2").ranks == 2, "without a GPU, TP x PP x CP ranks"
    offloads = {word: check(OPTIMIZER_OFFLOAD=word).config.optimizer.optimizer_offload for word in OFFLOADS}
    assert offloads == OFFLOADS
    assert "OPTIMIZER_OFFLOAD needs DO" in str(refusal(OPTIMIZER_OFFLOAD="auto", DO="false"))


def test_pre_training_counts_tokens_and_keeps_them_in_the_name(monkeypatch, capsys) -> None:
    tokens = {"SFT": "false", "TRAIN_TOKENS_OR_ITERS": "1000000", "WARMUP_TOKENS_OR_ITERS": "10000"}
    job = check(**tokens)
    assert (job.config.data.rows, job.call.objective.word) == ("documents", "pretrain")
    assert (job.config.batch.train_iters, job.config.optimizer.warmup_iters) == (977, 10)  # of 8 x 128 tokens each
    assert job.config.output.name.startswith("pretrain-mcore-qwen2.5-7B-lr-1e-5-")
    assert job.config.output.name.endswith("-ti-1000000-wi-10000")
    monkeypatch.setenv("DRY_RUN", "1")
    assert launch(["qwen", *line(**tokens)]) == 0
    out, err = capsys.readouterr()
    assert " -m toolkits.training pretrain " in out and "--rows documents" in out and "--train-iters 977" in out
    assert "  tokens   1,000,000 = 977 steps of 1,024; 10,000 of warm-up = 10 steps\n" in err
    error = refusal(**tokens | {"WARMUP_TOKENS_OR_ITERS": "999999"})
    assert "WARMUP_TOKENS_OR_ITERS 977 leaves nothing of TRAIN_TOKENS_OR_ITERS 977" in str(error)
    assert "(steps of 1,024 tokens)" in str(error)
    assert "is for conversations" in str(refusal({"MP_SFT_PACKING": "false"}, **tokens))
    config = check({"EPOCHS": "2"}, **tokens).config
    assert (config.batch.train_iters, config.batch.epochs, config.optimizer.warmup_iters) == (0, 2.0, 10)


def test_a_blend_stands_in_one_word_and_each_of_its_sets_must_be_there() -> None:
    config = check(DATASET_PATH="0.7 DATA 0.3 VALID", VALID_DATASET_PATH="VALID").config
    assert config.data.data == "0.7 DATA 0.3 VALID"
    error = refusal(DATASET_PATH="0.7 DATA 0.3 gone", VALID_DATASET_PATH="1 gone 1 lost")
    assert isinstance(error, DataError) and "DATA " not in str(error)
    assert "DATASET_PATH gone: gone_text_document.bin and gone_text_document.idx missing" in str(error)
    assert "VALID_DATASET_PATH lost: " in str(error) and str(error).count("gone_text_document.bin") == 1
    error = refusal(DATASET_PATH="0.7 DATA VALID")
    assert re.search(r"DATASET_PATH \(position 20\) '0.7 DATA VALID' .*is no blend: it must be WEIGHT PATH", str(error))
    assert error.exit_code == 2


def test_adapters_are_asked_for_by_variables_and_stand_in_the_name() -> None:
    job = check({"PEFT": "lora"})
    assert (job.config.lora.lora_rank, job.config.lora.lora_targets) == (16, "all")
    assert job.config.output.name.endswith("-ti-1000-wi-100-lora-r-16")
    job = check({"PEFT": "lora", "LORA_RANK": "4", "LORA_ALPHA": "8", "LORA_TARGETS": "q_proj,v_proj"})
    assert (job.config.lora.lora_rank, job.config.lora.lora_alpha) == (4, 8)
    assert job.config.output.name.endswith("-lora-r-4") and job.config.lora.lora_targets == "q_proj,v_proj"
    assert job.config.lora.quantize == "none"
    job = check({"PEFT": "qlora"})
    assert (job.config.lora.lora_rank, job.config.lora.quantize) == (16, "nf4")
    assert job.config.output.name.endswith("-qlora-r-16")
    assert check({"PEFT": "qlora", "EXTRA_ARGS": "--quantize int8"}).config.lora.quantize == "int8"
    assert "LORA_RANK is set without PEFT=lora" in str(refusal({"LORA_RANK": "4"}))
    assert check({"PEFT": "none"}).config.output.name == check().config.output.name
