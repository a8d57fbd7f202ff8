"""What the planner is held against: models, layouts and settings, and what a rank allocates and saves of each.

Run as a script this file is one rank: `RANK=.. python planning_world.py CASES.json`.
"""

import dataclasses
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from conversion_models import EXPERTS
from training_world import TINY

from conversion.plan import REWARD_HEAD, plan_for
from toolkits.planning.weights import Tuning
from toolkits.training.config import TrainConfig
from toolkits.training.layout import layout_of

RANKS = 4
SEQ_LEN, ROWS = 31, 2  # odd: TP=2 and CP=2 round a row up
FIRST_SEQUENCE = 12  # tokens: CP=2 cuts it into four pieces
# Odd: TP=2 pads it. Large: with the tied embedding in a bucket of its own, DP ranks share the padding differently.
VOCABULARY = 1021
# TP=2 cuts a block of the 192 columns.
WIDE = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 10, "head_dim": 32}
WHOLE = {"embed_tokens": "embedding.word_embeddings.weight", "lm_head": "output_layer.weight"}
HF = TINY | {"architectures": ["Qwen2ForCausalLM"], "rms_norm_eps": 1e-6, "vocab_size": VOCABULARY}
REWARD = {"architectures": ["Qwen2ForSequenceClassification"], "id2label": {"0": "LABEL_0"}}


@dataclass(frozen=True)
class Case:
    """A model with experts or the dense one, a layout and settings; `bucket` replaces what ends a bucket, elements."""

    model: str = ""
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    data: int = 1
    expert: int = 1
    expert_tensor: int = 0
    precision: str = "bf16"
    distributed: bool = True
    tied: bool = False
    first: int = 0
    virtual: int = 0
    bucket: int = 0
    sequence: bool = True
    qk_norm: bool = False  # of the dense model
    recompute: str = "none"
    lora: int = 0  # rank of the adapters
    quantize: str = "none"
    wide: bool = False  # the dense model with rows that blocks of NF4 divide
    targets: str = "all"
    whole: str = ""  # modules trained beside adapters
    reward: bool = False  # a score in the place of the words; of the dense model

    def __str__(self):
        said = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        differs = [f"{name} {value}" for name, value in said.items() if value != getattr(Case, name)]
        return ", ".join(differs) or "plain"

    @property
    def world(self):
        return self.tensor * self.pipeline * self.context * self.data

    @property
    def config(self):
        return TrainConfig.from_values(
            {
                "checkpoint": "none",
                "data": Path("data"),
                "output": Path("out"),
                "seq_len": SEQ_LEN,
                "micro_batch_size": ROWS,
                "global_batch_size": 8,
                "precision": self.precision,
                "tensor_parallel": self.tensor,
                "pipeline_parallel": self.pipeline,
                "context_parallel": self.context,
                "expert_parallel": self.expert,
                "expert_tensor_parallel": self.expert_tensor,
                "first_stage_layers": self.first,
                "virtual_stage_layers": self.virtual,
                "sequence_parallel": self.sequence,
                "distributed_optimizer": self.distributed,
                "recompute": self.recompute,
                "lora_rank": self.lora,
                "lora_targets": self.targets,
                "lora_save_modules": self.whole,
                "quantize": self.quantize,
            }
        )

    @property
    def plan(self):
        model = EXPERTS[self.model] if self.model else HF | (REWARD if self.reward else {})
        return plan_for(model | (WIDE if self.wide else {}) | {"tie_word_embeddings": self.tied})

    @property
    def settings(self):
        return {**self.plan.settings, **({} if self.model else {"qk_layernorm": self.qk_norm})}

    @property
    def tuning(self):
        if not self.lora:
            return Tuning()
        targets = None if self.targets == "all" else frozenset(self.targets.split(","))
        whole = frozenset(WHOLE[name] for name in self.whole.split(",") if name)
        whole |= {REWARD_HEAD} if self.reward else set()
        if self.quantize == "none":
            return Tuning("lora", self.lora, targets, whole=whole)
        return Tuning("qlora", self.lora, targets, self.quantize, whole)

    @property
    def layout(self):
        return layout_of(self.config, self.plan.settings, self.world)


STATES = [
    Case(),
    Case(precision="fp32", distributed=False, tied=True),
    Case(tensor=2, tied=True),
    Case(tensor=2, precision="fp32", distributed=False),
    Case(pipeline=2, tied=True),
    Case(pipeline=2, distributed=False, first=1),
    Case(data=2),
    Case(data=2, distributed=False, tied=True),
    Case(data=2, precision="fp32", tied=True),
    Case(tensor=2, pipeline=2),
    Case(pipeline=2, data=2, tied=True),
    Case(tensor=2, data=2, precision="fp32", tied=True),
    Case(context=2, tied=True),
    Case(context=2, data=2),
    Case(pipeline=2, virtual=1, tied=True),
    Case(pipeline=2, virtual=1, data=2, bucket=5000, tied=True),
    Case(data=2, bucket=5000),
    Case(context=2, bucket=5000, distributed=False),
    *(Case(name, tensor=2) for name in EXPERTS),
    *(Case(name, pipeline=2, data=2, expert=2) for name in EXPERTS),
    Case("qwen2-moe-every-other", pipeline=2, first=1, tied=True),
    Case("qwen2-moe", expert=2, data=4),
    Case("qwen2-moe", expert=2, data=4, distributed=False),
    Case("qwen2-moe", tensor=2, expert=2, data=2, precision="fp32"),
    Case("qwen2-moe", tensor=2, expert=2, expert_tensor=1, data=2, bucket=5000),
    Case("deepseek-v3", precision="fp32"),
    Case(lora=3),
    Case(lora=5, tensor=2, data=2, tied=True),
    Case(lora=5, targets="q_proj,up_proj,down_proj", pipeline=2, precision="fp32", distributed=False),
    Case(lora=3, pipeline=2, virtual=1, data=2, bucket=500),
    Case(lora=3, tensor=2, whole="embed_tokens,lm_head"),
    Case(lora=3, pipeline=2, whole="lm_head", quantize="int8", distributed=False),
    Case(reward=True, pipeline=2, tied=True),
    Case(reward=True, tensor=2, lora=3),
    Case("qwen2-moe", lora=3, tensor=2, expert=2, expert_tensor=1),
    Case("deepseek-v3", lora=3, tensor=2),
    Case(lora=3, quantize="nf4", wide=True),
    Case(lora=3, quantize="nf4", wide=True, tensor=2, targets="q_proj,up_proj", distributed=False),
    Case(lora=3, quantize="nf4", wide=True, pipeline=2, data=2, precision="fp32"),
    Case(lora=5, quantize="int8", tensor=2, tied=True),
    Case("qwen2-moe", lora=3, quantize="int8", tensor=2, expert=2, expert_tensor=1),
    Case("deepseek-v3", lora=3, quantize="int8", tensor=2),
]
ACTIVATIONS = [
    Case(qk_norm=True),
    Case(precision="fp32"),
    Case(recompute="full"),
    Case(recompute="selective"),
    Case(tensor=2),
    Case(tensor=2, sequence=False),
    Case(context=2),
    Case(context=2, tensor=2),
    Case(context=2, recompute="selective"),
    Case(context=2, recompute="full"),
    *(Case(name) for name in EXPERTS),
    *(Case(name, tensor=2) for name in ("qwen2-moe", "qwen3-moe-mixed", "deepseek-v3")),
    *(Case(name, expert=2, data=2) for name in ("qwen2-moe", "deepseek-v3")),
    Case("qwen2-moe", tensor=2, expert=2, expert_tensor=1),
    Case("qwen2-moe", context=2),
    Case("qwen2-moe", recompute="full"),
    Case("deepseek-v3", recompute="selective"),
    Case("deepseek-v2-lite", tensor=2, precision="fp32"),
    Case(lora=3),
    Case(lora=3, precision="fp32"),
    Case(lora=3, tensor=2),
    Case(lora=3, tensor=2, sequence=False),
    Case(lora=3, recompute="full"),
    Case(lora=3, whole="embed_tokens"),
    Case(lora=3, tensor=2, whole="embed_tokens,lm_head"),
    Case(reward=True, tensor=2),
    Case(reward=True, tensor=2, sequence=False, lora=3),
    Case("qwen2-moe", lora=3),
    Case("deepseek-v3", lora=3),
    Case("deepseek-v3", lora=3, tensor=2),
]
# As on a GPU, pointwise operations compiled; on one rank.
FUSED = [
    Case(qk_norm=True),
    Case(precision="fp32"),
    Case(recompute="full"),
    Case(recompute="selective"),
    *(Case(name) for name in ("qwen2-moe", "qwen3-moe-mixed", "deepseek-v3")),
    Case("deepseek-v2-lite", precision="fp32"),
    Case("deepseek-v3", recompute="selective"),
]


# Four ranks on two cores take their time: a few of each mechanism, and three models with experts, are quick.
QUICK_MODELS = ("", "qwen2-moe", "qwen2-moe-every-other", "deepseek-v3")
QUICK_ON_FOUR = (
    Case(pipeline=2, data=2, tied=True),
    Case(pipeline=2, virtual=1, data=2, bucket=5000, tied=True),
    Case("deepseek-v3", pipeline=2, data=2, expert=2),
    Case("qwen2-moe", tensor=2, expert=2, expert_tensor=1, data=2, bucket=5000),
    Case(lora=3, pipeline=2, virtual=1, data=2, bucket=500),
)


def quick(cases):
    """Those of `cases` that the short tests run."""
    return [case for case in cases if case.model in QUICK_MODELS and (case.world < 4 or case in QUICK_ON_FOUR)]


def rank_main(cases):
    import torch

    from toolkits.training.parallel.world import process_groups

    rank, figures = int(os.environ["RANK"]), {}
    for fields, port in json.loads(cases.read_text()):
        measure, _ = MEASURE[kind := fields.pop("kind")]
        if kind == "fused" and not figures:
            compile_operations()
        case = Case(**fields)
        if rank < case.world:
            os.environ |= {"WORLD_SIZE": str(case.world), "MASTER_PORT": str(port)}
            with process_groups(case.layout, seed=1):
                if kind == "fused":
                    torch.compiler.set_stance("default")  # CPU ranks compile nothing by themselves
                figures[f"{kind} {case}"] = measure(case)
    (cases.parent / f"{rank}.json").write_text(json.dumps(figures))


def compile_operations():
    """Compile what is compiled on a GPU, with a backend that needs no compiler and saves what its default saves."""
    import torch
    from megatron.core import jit

    from toolkits.training.parallel import fused

    torch._dynamo.config.recompile_limit = 100  # of one function, for all cases together
    fused.fused = lambda function: torch.compile(function, backend="aot_eager_decomp_partition", dynamic=False)
    jit.disable_jit_fuser()  # SwiGLU says itself what it saves
    from toolkits.training.parallel import model  # takes the functions above as it is imported

    choose = model._fusion_fields
    model._fusion_fields = lambda *of: choose(*of) | {"bias_activation_fusion": True, "bias_dropout_fusion": True}


def wrapped_model(case):
    from toolkits.training.parallel import model

    quantized = case.quantize != "none"
    chunks = model.build_model(case.settings, case.layout, case.config.compute, quantized=quantized)
    if quantized:
        from toolkits.training.quantize import allocate

        allocate(chunks, case.plan, case.quantize)
    if case.lora:
        from toolkits.training.adapters import attach

        attach(chunks, lora_of(case), case.plan, seed=1)
    usual = model.GRADIENT_BUCKET
    model.GRADIENT_BUCKET = case.bucket or usual
    try:
        return model.wrap(chunks, distributed_optimizer=case.distributed)
    finally:
        model.GRADIENT_BUCKET = usual


def lora_of(case):
    from toolkits.training.lora import Lora
    from toolkits.training.sources import ModelSource

    return Lora.of(case.config, ModelSource(Path("model"), case.plan))


def allocated(case):
    """Bytes of everything that stays allocated after an optimizer step."""
    from toolkits.training.optimizer import build_optimizer

    wrapped = wrapped_model(case)
    optimizer = build_optimizer(case.config, wrapped)
    optimizer.step()
    inner = [one.optimizer for one in getattr(optimizer, "chained_optimizers", [optimizer])]
    stepped = [weight for one in inner for group in one.param_groups for weight in group["params"]]
    weights = [weight for chunk in wrapped for weight in chunk.parameters()]
    trained = [weight for weight in weights if weight.requires_grad]
    of_model = storages([*weights, *(buffer for chunk in wrapped for buffer in chunk.module.buffers())])
    moments = [state for one in inner for state in one.state.values()]
    return {
        "parameters": sum(of_model.values()),
        "gradients": sum(storages(weight.main_grad for weight in trained).values()),
        "masters": sum(size for key, size in storages(stepped).items() if key not in of_model),
        "exp_avg": sum(storages(state["exp_avg"] for state in moments).values()),
        "exp_avg_sq": sum(storages(state["exp_avg_sq"] for state in moments).values()),
    }


def saved(case):
    """Bytes that autograd keeps after the forward pass of one micro batch of packed rows."""
    import torch
    from megatron.core.packed_seq_params import PackedSeqParams

    from toolkits.training.batches import MicroBatch
    from toolkits.training.parallel.context import share_of
    from toolkits.training.parallel.world import context_rank

    (wrapped,) = wrapped_model(case)
    tokens = ROWS * case.layout.padded(SEQ_LEN)
    ends = torch.tensor([0, FIRST_SEQUENCE, tokens // 2, tokens], dtype=torch.int32)
    packed = PackedSeqParams("thd", ends, ends, max_seqlen_q=tokens // 2, max_seqlen_kv=tokens // 2)
    ids = torch.arange(tokens)[None]
    positions = ids - ends[torch.searchsorted(ends, ids, right=True) - 1]
    batch = MicroBatch(ids, ids.clone(), torch.ones(ids.shape), positions, packed)
    batch = share_of(batch, rank=context_rank(), size=case.context)
    weights, kept = storages(wrapped.parameters()), []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = wrapped(batch.tokens, batch.positions, None, labels=batch.labels, packed_seq_params=batch.packed)
    assert output.shape == (1, tokens // case.context)
    return sum(size for key, size in storages(kept).items() if key not in weights)


def storages(tensors):
    """{address: bytes} of the memory behind `tensors`, each piece once; empty ones have none."""
    return {
        storage.data_ptr(): storage.nbytes()
        for storage in (tensor.untyped_storage() for tensor in tensors)
        if storage.nbytes()
    }


MEASURE = {"states": (allocated, STATES), "activations": (saved, ACTIVATIONS), "fused": (saved, FUSED)}

if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    rank_main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # as a real rank leaves
