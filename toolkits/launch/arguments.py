"""The launchers' positions and variables, once: name, values, check, what each becomes.

The check of a call, the run's NAME, `--help` and the README's table are all derived from this table. A
launcher of another family is a Launcher here and a script of two lines in run_scripts/.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from data_preprocessing.blend import parse_blend

from .kinds import SWITCH, Integer, Kind, ModelSize, Number, Offload, OneOf, Text, words
from .nodes import DEFAULT_GPUS, GPUS_OF_NODE, Nodes

DATASETS = Text("prefix, or '0.7 A 0.3 B'", check=parse_blend)
DEFAULT_LORA_RANK = 16
RECOMPUTE = {"false": "none", "none": "none", "full": "full", "sel": "selective", "offload": "offload"}


@dataclass(frozen=True)
class Entry:
    """A position or an environment variable; `setting` is the field of TrainConfig that takes its value."""

    name: str
    kind: Kind
    help: str
    setting: str | None = None
    required: bool = False


@dataclass(frozen=True)
class Launcher:
    """A launcher: the families it starts, the model's name in NAME, and its positions in the order that users know."""

    script: str
    families: tuple[str, ...]  # of conversion/families
    model: str
    positions: tuple[Entry, ...]
    task: str = "sft"  # the word of `temper train` that it is for

    @property
    def name_shape(self) -> str:
        """How NAME is put together: as people's scripts parse it."""
        said = {entry.name for entry in self.positions}
        experts = "".join(f"-{name.lower()}-{{{name}}}" for name in ("ETP", "EP") if name in said)
        return (
            "{task}-mcore-{model}-{MODEL_SIZE}-lr-{LR}-minlr-{MIN_LR}-bs-{BATCH_SIZE}-gbs-{GLOBAL_BATCH_SIZE}"
            f"-seqlen-{{SEQ_LEN}}-pr-{{PR}}-tp-{{TP}}-pp-{{PP}}-cp-{{CP}}{experts}-ac-{{AC}}-do-{{DO}}-sp-{{SP}}"
            "-ti-{TRAIN_TOKENS_OR_ITERS}-wi-{WARMUP_TOKENS_OR_ITERS}"
        )

    def run_name(self, typed: Mapping[str, str], *, task: str) -> str:
        """Return NAME for the words `typed`, by the name of their position; adapters stand at its end."""
        name = self.name_shape.format(task=task, model=self.model, **typed)
        if typed.get("PEFT", "none") == "none":
            return name
        return f"{name}-{typed['PEFT']}-r-{typed.get('LORA_RANK', DEFAULT_LORA_RANK)}"


EP = Entry("EP", Integer(), "expert parallel ranks, out of TP x CP x DP; 1 without experts", "expert_parallel")
ETP = Entry("ETP", Integer(), "ranks that share an expert; 1 without experts", "expert_tensor_parallel")


TUNED = Entry("SFT", OneOf({"true": "sft", "false": "pretrain"}), "fine-tuning; false: continued pre-training on text")
PAIRS = Entry("SFT", OneOf({"true": "dpo"}), "always true: it is fine-tuning, on pairs of answers")
BETA = Entry("BETA", Number(), "how strongly answers are held to the reference, above 0", "beta")


def _positions(sizes: str, *experts: Entry) -> tuple[Entry, ...]:
    """The 25 positions of a dense decoder; `experts` come after CP."""
    return (
        Entry(
            "ENV",
            words("dsw", "dlc"),
            "dsw: this machine, every visible GPU, else CPU ranks (NPROC_PER_NODE, or TP x PP x CP); "
            "dlc: one node of a container job",
        ),
        Entry(
            "MODEL_SIZE", ModelSize(tuple(sizes.split())), "checked against the checkpoint's config.json, within 25%"
        ),
        Entry("BATCH_SIZE", Integer(), "micro batch of a data-parallel rank", "micro_batch_size"),
        Entry("GLOBAL_BATCH_SIZE", Integer(), "a multiple of BATCH_SIZE x DP", "global_batch_size"),
        Entry("LR", Number(), "peak of the cosine, after the warm-up", "lr"),
        Entry("MIN_LR", Number(), "reached at the last iteration", "min_lr"),
        Entry("SEQ_LEN", Integer(2), "tokens in a row, whatever the dataset was built with", "seq_len"),
        Entry("PAD_LEN", Integer(), "at most SEQ_LEN; nothing is padded to it"),
        Entry(
            "PR",
            words("bf16", "fp16", "fp32", "fp8"),
            "number format; fp8 needs a GPU that can",
            "precision",
        ),
        Entry("TP", Integer(), "tensor parallel ranks", "tensor_parallel"),
        Entry("PP", Integer(), "pipeline stages", "pipeline_parallel"),
        Entry("CP", Integer(), "context parallel ranks", "context_parallel"),
        *experts,
        Entry("SP", SWITCH, "sequence parallel; off at TP=1", "sequence_parallel"),
        Entry("DO", SWITCH, "distributed optimizer (ZeRO-1)", "distributed_optimizer"),
        Entry("FL", SWITCH, "flash attention, or the exact reference path", "flash_attention"),
        TUNED,
        Entry(
            "AC", OneOf(RECOMPUTE), "activations: kept, recomputed (all, the attention) or in CPU memory", "recompute"
        ),
        Entry(
            "OPTIMIZER_OFFLOAD", Offload(), "optimizer state in CPU memory: none, all, what has to", "optimizer_offload"
        ),
        Entry("SAVE_INTERVAL", Integer(0), "iterations between checkpoints; 0: only the last", "save_interval"),
        Entry("DATASET_PATH", DATASETS, "P, P_text_document or P_text_document.bin; a blend in one word", "data"),
        Entry("VALID_DATASET_PATH", DATASETS, "1% is held out of what stands in DATASET_PATH too", "valid_data"),
        Entry(
            "PRETRAIN_CHECKPOINT_PATH",
            Text("mcore dir, HuggingFace dir, or none"),
            "none: random weights, needs HF_CONFIG",
            "checkpoint",
        ),
        Entry("TRAIN_TOKENS_OR_ITERS", Integer(), "iterations; with SFT=false tokens", "train_iters"),
        Entry("WARMUP_TOKENS_OR_ITERS", Integer(0), "warm-up, part of those, counted likewise", "warmup_iters"),
        Entry("OUTPUT_BASEPATH", Text("dir"), "checkpoint/NAME/, tensorboard/NAME_time/, log/NAME_time.log", "output"),
    )


LAUNCHERS = {
    "qwen": Launcher("run_mcore_qwen.sh", ("qwen2",), "qwen2.5", _positions("0.5B 1.5B 3B 7B 14B 32B 72B")),
    "llama": Launcher("run_mcore_llama.sh", ("llama",), "llama3", _positions("1B 3B 8B 70B")),
    "phi": Launcher("run_mcore_phi.sh", ("phi3",), "phi", _positions("3.8B 14B")),
    "glm": Launcher("run_mcore_glm.sh", ("glm",), "glm4", _positions("9B")),
    "qwen2": Launcher(
        "run_mcore_qwen2.sh", ("qwen2", "qwen2_moe"), "qwen2", _positions("0.5B 1.5B 7B 72B 14.3B 57B", EP)
    ),
    "mistral": Launcher("run_mcore_mistral.sh", ("mistral", "mixtral"), "mistral", _positions("7B 12B 46.7B 141B", EP)),
    "deepseek_v2": Launcher("run_mcore_deepseek_v2.sh", ("deepseek_v2",), "deepseek-v2", _positions("15.7B 236B", EP)),
    "qwen3": Launcher(
        "run_mcore_qwen3.sh",
        ("qwen3", "qwen3_moe"),
        "qwen3",
        _positions("0.6B 1.7B 4B 8B 14B 32B 30.5B 235B", ETP, EP),
    ),
    "deepseek_v3": Launcher("run_mcore_deepseek_v3.sh", ("deepseek_v3",), "deepseek-v3", _positions("671B", ETP, EP)),
}


def _on_pairs(launcher: Launcher) -> Launcher:
    """The same positions, then BETA; a row has room for two answers of SEQ_LEN tokens."""
    positions = tuple(PAIRS if entry is TUNED else entry for entry in launcher.positions)
    script = launcher.script.replace(".sh", "_dpo.sh")
    return replace(launcher, script=script, positions=(*positions, BETA), task="dpo")


LAUNCHERS |= {f"{name}_dpo": _on_pairs(LAUNCHERS[name]) for name in ("qwen", "llama", "qwen3")}


def launcher_of(family: str) -> Launcher | None:
    """Return the first launcher of a family of conversion/families, or None: then `temper train` starts it."""
    return next((launcher for launcher in LAUNCHERS.values() if family in launcher.families), None)


VARIABLES = (
    Entry("MP_SFT_PACKING", SWITCH, "false: one conversation a row", "packing"),
    Entry("EPOCHS", Number(), "passes over the data, instead of iterations", "epochs"),
    Entry("RESUME", OneOf({"auto": True, "never": False}), "auto: go on with the same run; never: refuse it", "resume"),
    Entry("EXPORT_HF", SWITCH, "write OUTPUT_BASEPATH/huggingface/NAME/ at the end", "export_hf"),
    Entry("KEEP_LAST", Integer(), "checkpoints kept (2)", "keep_last"),
    Entry("DRY_RUN", OneOf({"1": True, "0": False}), "1: print the equivalent torchrun line and stop"),
    Entry("EXTRA_ARGS", Text("flags"), "flags of `temper train sft` beside the positions"),
    Entry("HF_CONFIG", Text("dir"), "config and tokenizer when the checkpoint is none", "hf_config"),
    Entry("NPROC_PER_NODE", Integer(), "ranks on this machine"),
    Entry("MP_DATASET_TYPE", words("idxmap", "raw"), "raw: DATASET_PATH is JSON, built under OUT/data first"),
    Entry("MP_AC_LAYERS", Integer(), "layers that AC=full recomputes at a time (1)", "recompute_layers"),
    Entry("MP_VP", Integer(), "layers of a virtual pipeline stage; unset: none", "virtual_stage_layers"),
    Entry("MP_PP0_LAYERS", Integer(), "layers of the first pipeline stage; unset: all the same", "first_stage_layers"),
    Entry("PEFT", words("none", "lora", "qlora"), "lora: train adapters; qlora: on NF4 matrices; NAME ends so"),
    Entry("LORA_RANK", Integer(), f"rank of the adapters ({DEFAULT_LORA_RANK})", "lora_rank"),
    Entry("LORA_ALPHA", Number(), "adapters count LORA_ALPHA / LORA_RANK times (32)", "lora_alpha"),
    Entry("LORA_TARGETS", Text("names", ("all", "q_proj,v_proj")), "layers with an adapter (all)", "lora_targets"),
)

# Read with ENV=dlc only: a stray RANK must not change a run on this machine.
CLUSTER_VARIABLES = (
    Entry("WORLD_SIZE", Integer(), "dlc: nodes of the job; required", required=True),
    Entry("RANK", Integer(0), "dlc: number of this node, from 0; required", required=True),
    Entry("MASTER_ADDR", Text("host"), "dlc: where node 0 answers; required", required=True),
    Entry("MASTER_PORT", Integer(), "dlc: a free port of node 0; required", required=True),
    Entry(GPUS_OF_NODE, Integer(), f"dlc: GPUs of a node ({DEFAULT_GPUS}); NPROC_PER_NODE wins"),
    Entry("JOIN_TIMEOUT", Integer(), f"dlc: seconds in which all nodes must come ({Nodes().join_timeout:g})"),
    Entry(
        "SILENCE_TIMEOUT",
        Integer(3),
        f"dlc: seconds without a sign of life that end the job ({Nodes().silence_timeout:g})",
    ),
)
