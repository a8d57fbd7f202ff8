"""The groups of settings of a training run, each setting declared once: name, type, default, explanation, check.

Flags, `--help`, the launchers and the checks all read these classes. A field's flag is its name with
dashes; a boolean has a `--no-` twin. Everything here is plain data: no torch, no file is opened.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_preprocessing.blend import parse_blend

from ..foundation.errors import UsageError

Precision = Literal["bf16", "fp16", "fp32", "fp8"]
Recompute = Literal["none", "full", "selective", "offload"]
RowKind = Literal["conversations", "documents", "pairs", "answers"]
TooLong = Literal["truncate", "drop", "stop"]
Tracker = Literal["none", "wandb", "mlflow"]
Quantize = Literal["none", "nf4", "int8"]
PreferenceLoss = Literal["sigmoid", "hinge", "ipo", "robust", "simpo", "orpo"]
Reference = Literal["cached", "adapters-off"]
REFERENCE_FREE = ("simpo", "orpo")


def setting(
    help: str, default: Any = dataclasses.MISSING, *, at_least: float | None = None, below: float = math.inf
) -> Any:
    """Declare a field with its explanation; a number is allowed from `at_least` to below `below`."""
    return dataclasses.field(default=default, metadata={"help": help, "at_least": at_least, "below": below})


@dataclass(frozen=True)
class ModelSettings:
    """Where the weights come from."""

    checkpoint: str = setting("Megatron-core or HuggingFace directory to start from, or `none`: random weights.")
    hf_config: Path | None = setting(
        "With --checkpoint none: a HuggingFace directory whose config and tokenizer to use.", None
    )


@dataclass(frozen=True)
class DataSettings:
    """What is trained on, and how rows are made of it."""

    data: str = setting(
        "Dataset prefix, as `temper data build` wrote it; or a blend of several, `0.7 A 0.3 B` in one word."
    )
    valid_data: str | None = setting(
        "Validation prefix or blend, each row read once; of what stands in --data too, or of all when this is left"
        " out, 1% is held out.",
        None,
    )
    seq_len: int = setting("Tokens in a row.", 2048, at_least=2)
    rows: RowKind = setting(
        "conversations: whole ones, and what the assistant wrote is trained. documents: texts end to end, cut every"
        " --seq-len tokens, and every token is trained, the prompts of conversations too. pairs: a better and a worse"
        " answer to one prompt, each with the prompt at most --seq-len tokens; a row has room for two of them. answers:"
        " single ones that are good, or are not.",
        "conversations",
    )
    packing: bool = setting("Fill rows with whole conversations; off: one conversation a row.", True)
    too_long: TooLong = setting(
        "Conversations over --seq-len: truncate at the last trained turn that fits, drop, or stop.", "truncate"
    )
    seed: int = setting("Seed of the data order and of random weights.", 1234, at_least=0)

    @property
    def row_tokens(self) -> int:
        """Tokens in a row."""
        return self.seq_len * (2 if self.rows == "pairs" else 1)

    def problems(self) -> list[str]:
        """Return what is wrong with the blends, and what was said of conversations where there are none."""
        found = []
        for flag, said in (("--data", self.data), ("--valid-data", self.valid_data)):
            try:
                parse_blend(said or "")
            except UsageError as error:
                found.append(f"{flag} {error}")
        if self.rows == "documents" and not self.packing:
            found.append("--no-packing (MP_SFT_PACKING=false) is for conversations: documents always fill their rows")
        if self.rows == "documents" and self.too_long != "truncate":
            found.append(f"--too-long {self.too_long} is for conversations: documents go on in the next row")
        return found


@dataclass(frozen=True)
class LayoutSettings:
    """How the model is spread over ranks; data parallel is what remains of the world."""

    tensor_parallel: int = setting("Ranks that share each layer.", 1, at_least=1)
    pipeline_parallel: int = setting("Pipeline stages.", 1, at_least=1)
    context_parallel: int = setting("Ranks that share each row's tokens.", 1, at_least=1)
    first_stage_layers: int = setting(
        "Layers of the first pipeline stage, the others share the rest; 0: all the same.", 0, at_least=0
    )
    virtual_stage_layers: int = setting(
        "Layers of a virtual pipeline stage: each rank holds several, and the schedule is interleaved; 0: one a rank.",
        0,
        at_least=0,
    )
    expert_parallel: int = setting("Ranks that share the experts of a layer, each with whole ones.", 1, at_least=1)
    expert_tensor_parallel: int = setting("Ranks that share each expert; 0: as many as share a layer.", 0, at_least=0)
    sequence_parallel: bool = setting("Split activations between tensor-parallel ranks outside the matrices too.", True)
    distributed_optimizer: bool = setting("Shard the optimizer's state over data-parallel ranks (ZeRO-1).", True)
    overlap_communication: bool = setting(
        "Reduce gradients and gather weights of data-parallel ranks while the model computes.", True
    )
    reshardable_optimizer: bool = setting(
        "Save the sharded optimizer so that TP and PP can change later; takes 12 bytes a weight of a rank's share"
        " in CPU memory.",
        False,
    )

    @property
    def experts_over(self) -> int:
        """Ranks that share each expert."""
        return self.expert_tensor_parallel or self.tensor_parallel

    @property
    def model_parallel(self) -> int:
        """Ranks that hold one data-parallel replica."""
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel

    @property
    def optimizer_sharding(self) -> str | None:
        """megatron-core's name for how the distributed optimizer is saved; None for the plain optimizer."""
        if not self.distributed_optimizer:
            return None
        return "fully_reshardable" if self.reshardable_optimizer else "dp_reshardable"


@dataclass(frozen=True)
class BatchSettings:
    """How much is trained on."""

    micro_batch_size: int = setting("Rows in a micro batch of one data-parallel rank.", 1, at_least=1)
    global_batch_size: int = setting("Rows in one optimizer step over all ranks.", 8, at_least=1)
    train_iters: int = setting("Optimizer steps; 0: taken from --epochs.", 0, at_least=0)
    epochs: float = setting("Passes over the data, when --train-iters is 0.", 0.0, at_least=0)


@dataclass(frozen=True)
class ComputeSettings:
    """How the arithmetic is done, and what memory is traded for it."""

    precision: Precision = setting(
        "Number format of weights and activations; gradients are reduced in fp32. fp16 scales the loss; fp8 multiplies"
        " matrices in it and keeps bf16 elsewhere, and needs a GPU and Transformer Engine that can.",
        "bf16",
    )
    recompute: Recompute = setting(
        "Activations kept for the backward pass: all (none), one a unit of layers (full), all but the attention's"
        " (selective), or all in CPU memory (offload).",
        "none",
    )
    recompute_layers: int = setting("Layers in a unit of --recompute full.", 1, at_least=1)
    flash_attention: bool = setting("Fused attention kernels; off: the exact reference path.", True)

    @property
    def is_half(self) -> bool:
        """Whether weights have 16 bits, and the optimizer keeps them in fp32 beside."""
        return self.precision != "fp32"


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters, which are trained instead of the weights."""

    lora_rank: int = setting("Rank of LoRA adapters, which are trained instead of all weights; 0: none.", 0, at_least=0)
    lora_alpha: float = setting("Adapters count alpha / rank times.", 32.0, at_least=0)
    lora_targets: str = setting(
        "HuggingFace layers with an adapter: `all`, ends of names between commas (q_proj,v_proj), or a regular"
        " expression that whole names match.",
        "all",
    )
    lora_dropout: float = setting("Part of an adapter's inputs that is dropped.", 0.0, at_least=0, below=1)
    rslora: bool = setting("Let adapters count alpha / sqrt(rank) times.", False)
    lora_save_modules: str = setting(
        "Trained whole beside the adapters: embed_tokens, lm_head, or both between a comma.", ""
    )
    lora_plus: float = setting("The learning rate of B is so many times that of A (LoRA+).", 1.0, at_least=1)
    adapter: Path | None = setting("Adapter in PEFT's format to go on from; it says rank, alpha and targets.", None)
    quantize: Quantize = setting(
        "Format of the frozen matrices of the layers: nf4 with double quantisation (QLoRA; needs bitsandbytes), int8"
        " with a scale a row, or that of --precision (none).",
        "none",
    )

    @property
    def is_used(self) -> bool:
        """Whether adapters are trained instead of all weights."""
        return self.lora_rank > 0 or self.adapter is not None

    def problems(self) -> list[str]:
        """Return what was said of adapters that there are none of, or twice."""
        given = [
            field.name
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default and field.name not in ("lora_rank", "adapter")
        ]
        flags = [f"--{name.replace('_', '-')}" for name in given]
        if flags and not self.is_used:
            return [f"{', '.join(flags)}: give --lora-rank or --adapter too, or all weights are trained"]
        of_adapter = [flag for flag in flags if flag not in ("--lora-dropout", "--lora-plus", "--quantize")]
        if self.adapter is not None and (of_adapter or self.lora_rank):
            said = ", ".join([*of_adapter, *(["--lora-rank"] if self.lora_rank else [])])
            return [f"--adapter says {said} itself: leave that out"]
        return []


@dataclass(frozen=True)
class ReferenceSettings:
    """The model that answers are held to while preferences are learned: the one that training starts from."""

    beta: float = setting(
        "How strongly answers are held to the reference; for orpo the weight of the odds ratio, above 0.", 0.1
    )
    reference: Reference = setting(
        "cached: the reference's log-probabilities, computed once and kept beside the dataset. adapters-off: those of"
        " the base at every step, by switching the adapters off.",
        "cached",
    )

    def problems(self, lora: LoraSettings) -> list[str]:
        """Return what does not fit together."""
        found = [] if 0 < self.beta < math.inf else [f"--beta {self.beta:g} must be above 0"]
        if self.reference == "adapters-off" and not lora.is_used:
            found.append("--reference adapters-off needs adapters (--lora-rank): without them use cached")
        elif self.reference == "adapters-off" and (lora.adapter is not None or lora.lora_save_modules):
            found.append(
                "--reference adapters-off gives the base, which --adapter and --lora-save-modules do not start from or "
                "do not keep: use cached"
            )
        return found


@dataclass(frozen=True)
class PreferenceSettings:
    """What is learned from pairs of a better and a worse answer."""

    preference_loss: PreferenceLoss = setting(
        "sigmoid (DPO; cDPO with --label-smoothing), hinge (SLiC), ipo, robust (needs --label-smoothing); simpo and"
        " orpo use no reference.",
        "sigmoid",
    )
    label_smoothing: float = setting(
        "Part of the pairs whose order is taken to be wrong, for sigmoid and robust.", 0.0, at_least=0, below=0.5
    )
    length_normalized: bool = setting(
        "Let sigmoid and hinge compare the log-probability of a token, not of a whole answer.", False
    )
    simpo_margin: float = setting("How far the answers of a pair should part, for simpo (gamma).", 0.5, at_least=0)
    sft_weight: float = setting(
        "Weight of the mean negative log-probability of the better answer's tokens (RPO).", 0.0, at_least=0
    )
    stop_separated: int = setting(
        "End training after so many steps in a row whose pairs are all told apart by a growing margin; 0: never.",
        0,
        at_least=0,
    )

    @property
    def uses_reference(self) -> bool:
        """Whether the loss compares with a reference."""
        return self.preference_loss not in REFERENCE_FREE

    def problems(self) -> list[str]:
        """Return what does not fit together."""
        found, loss = [], self.preference_loss
        if self.label_smoothing and loss not in ("sigmoid", "robust"):
            found.append(f"--label-smoothing is for sigmoid and robust, not for --preference-loss {loss}")
        if loss == "robust" and not self.label_smoothing:
            found.append("--preference-loss robust corrects for --label-smoothing: give one above 0")
        if self.length_normalized and loss not in ("sigmoid", "hinge"):
            found.append(f"--length-normalized is for sigmoid and hinge: {loss} always is")
        if self.sft_weight and loss == "orpo":
            found.append("--sft-weight: orpo has that term already")
        return found


@dataclass(frozen=True)
class RewardSettings:
    """How a reward model's scores are learned from pairs."""

    center_rewards: float = setting(
        "Weight of the squared sum of a pair's two scores, which keeps their mean at 0; 0: none.", 0.0, at_least=0
    )


@dataclass(frozen=True)
class KtoSettings:
    """What is learned from single answers that are good, or are not."""

    desirable_weight: float = setting("Weight of the good answers.", 1.0, at_least=0)
    undesirable_weight: float = setting("Weight of the others.", 1.0, at_least=0)


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and its schedule: a linear warm-up, then a cosine from lr to min_lr at the last step."""

    lr: float = setting("Peak learning rate.", 1e-5, at_least=0)
    min_lr: float = setting("Learning rate of the last step.", 1e-6, at_least=0)
    warmup_iters: int = setting("Steps of linear warm-up, part of the training steps.", 0, at_least=0)
    weight_decay: float = setting("Weight decay; biases and norms have none.", 0.1, at_least=0)
    adam_beta1: float = setting("Decay of Adam's first moment.", 0.9, at_least=0, below=1)
    adam_beta2: float = setting("Decay of Adam's second moment.", 0.95, at_least=0, below=1)
    adam_eps: float = setting("Adam's epsilon.", 1e-8, at_least=0)
    clip_grad: float = setting("Largest gradient norm; 0: no clipping.", 1.0, at_least=0)
    max_nonfinite: int = setting(
        "Losses that are not finite until the run ends; the steps before are skipped.", 1, at_least=1
    )
    optimizer_offload: str = setting(
        "Share of the optimizer's state in CPU memory, 0 to 1; auto: as much as the planned memory asks for. Without a"
        " GPU it changes nothing.",
        "0",
    )

    @property
    def offloads(self) -> bool:
        """Whether a part of the optimizer's state is to lie in CPU memory."""
        return self.optimizer_offload == "auto" or float(self.optimizer_offload) > 0


@dataclass(frozen=True)
class OutputSettings:
    """What the run leaves behind, under one folder."""

    output: Path = setting("Folder for checkpoint/NAME, tensorboard/NAME_time, log/NAME_time.log and huggingface/NAME.")
    name: str = setting("Name of the run.", "sft")
    save_interval: int = setting(
        "Steps between two checkpoints; the last step is always saved. 0: only the last.", 0, at_least=0
    )
    background_save: bool = setting(
        "Write checkpoints while training goes on, from a copy in CPU memory; the last one never.", False
    )
    stop_after: float = setting(
        "Minutes after which the run saves and ends with 75, before a job's time limit does; 0: never.", 0.0, at_least=0
    )
    keep_last: int = setting("Checkpoints kept; older ones go when a newer one is complete.", 2, at_least=1)
    eval_interval: int = setting("Steps between two validations; 0: with every checkpoint.", 0, at_least=0)
    export_hf: bool = setting("Write a HuggingFace checkpoint at the end.", False)
    resume: bool = setting("Go on from the newest complete step of --output; off: refuse a used one.", True)
    tracker: Tracker = setting(
        "Report the figures to wandb or mlflow too, in files under --output; TensorBoard always has them.", "none"
    )
    data_restart: bool = setting(
        "When going on, let data, --seq-len and packing change and read the data from its beginning.", False
    )

    @property
    def folder(self) -> Path:
        """Where the run's steps go, and what is known of it."""
        return self.output / "checkpoint" / self.name
