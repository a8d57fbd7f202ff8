"""One rank of the conversion tests: real megatron-core opens what conversion/ wrote, and saves what it reads.

Run as `conversion_ranks.py RANK WORLD WORK`. WORK/NAME holds hf/, mcore/ and truth.pt (ids and transformers'
logits) of each model. Writes WORK/result-RANK.json.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

LAYOUTS = ((1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 2))  # TP, PP, EP
# The models that megatron-core saves again; of the first three also as its plain local spec would.
STOCK = ("untied", "tied", "qwen2-moe")
SAVED = (*STOCK, "phi3", "qwen3-moe-mixed", "deepseek-v3")


def main(rank: int, world: int, work: Path) -> None:
    from toolkits.training.parallel.world import prepare_process

    prepare_process()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from tests.conversion_models import register
    from toolkits.training.layout import Layout

    torch.distributed.init_process_group("gloo", init_method=f"file://{work}/store", rank=rank, world_size=world)
    for file in work.glob("*.py"):  # a family of the tests
        register(file)
    results = {}
    for tensor, pipeline, expert in LAYOUTS:
        parallel_state.initialize_model_parallel(tensor, pipeline, expert_model_parallel_size=expert)
        model_parallel_cuda_manual_seed(1)
        for folder in sorted(path.parent for path in work.glob("*/mcore")):
            name = f"{folder.name} TP{tensor} PP{pipeline}" + (f" EP{expert}" if expert > 1 else "")
            if result := check(folder, Layout(world, tensor, pipeline, tensor > 1, 1, expert=expert), expert):
                results[name] = result
        if (tensor, pipeline, expert) == (1, 1, 1):
            results["prediction"] = prediction_shapes(work / "deepseek-v3" / "hf")
        parallel_state.destroy_model_parallel()
    (work / f"result-{rank}.json").write_text(json.dumps(results))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def check(folder: Path, layout, expert: int) -> dict | None:
    """Load the directory, compare logits, names and slices, and save it the way megatron-core does.

    Return None when expert parallelism is asked of a model without experts.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    from conversion.hf_as_mcore import HfAsMcore
    from conversion.hf_checkpoint import read_config
    from conversion.settings import mcore_settings
    from toolkits.training.logits import forward
    from toolkits.training.parallel.model import build_model
    from toolkits.training.settings import ComputeSettings

    settings = mcore_settings(read_config(folder / "hf"))
    if expert > 1 and "num_moe_experts" not in settings:
        return None
    (model,) = build_model(settings, layout, ComputeSettings(precision="fp32"))
    state = dist_checkpointing.load(
        model.sharded_state_dict(), str(folder / "mcore" / "release"), strict=StrictHandling.RAISE_UNEXPECTED
    )
    model.load_state_dict(state, strict=False)
    truth = torch.load(folder / "truth.pt")
    with torch.no_grad():
        found = forward((model,), truth["ids"])  # on the last stage
    errors = [(logits[..., : settings["vocab_size"]] - truth["logits"]).abs().max().item() for logits in found]
    error = errors[0] if errors else None
    compared = compare_slices(model, HfAsMcore(folder / "hf"))
    if folder.name in SAVED and expert == 1:
        shape = (layout.tensor, layout.pipeline)
        save(model, folder / "saved-tp{}-pp{}".format(*shape), with_optimizer=shape == (2, 1))
        if shape == (1, 1) and folder.name in STOCK:
            save_stock_model(model, folder / "stock")
    return {"error": error, "slices": compared}


def prediction_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return what megatron-core saves of a model with one layer that predicts a further token."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec

    from conversion.hf_checkpoint import read_config
    from conversion.settings import mcore_settings
    from toolkits.training.layout import Layout
    from toolkits.training.parallel.model import transformer_config
    from toolkits.training.parallel.spec import decoder_spec
    from toolkits.training.settings import ComputeSettings

    settings = mcore_settings(read_config(folder)) | {"mtp_num_layers": 1}
    config = transformer_config(settings, Layout(1, 1, 1, False, 1), ComputeSettings(precision="fp32"))
    layers = decoder_spec(config)
    prediction = get_gpt_mtp_block_spec(config, layers.layer_specs[-1], use_transformer_engine=False)
    model = GPTModel(
        config, layers, settings["vocab_size"], 64, position_embedding_type="rope", mtp_block_spec=prediction
    )
    return {tensor.key: tuple(tensor.global_shape) for tensor in flat_tensors(model)}


def flat_tensors(model):
    """Return the ShardedTensors of this rank, factories applied."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    state = model.sharded_state_dict()
    apply_factories(state)
    return [value for value in nested_values(state) if isinstance(value, ShardedTensor)]


def compare_slices(model, source) -> int:
    """Hold every shard of this rank, as loaded, against the slice of the HuggingFace directory; return how many."""
    shards = flat_tensors(model)
    for shard in shards:
        whole = source.tensors[shard.key].shape
        # The model pads the vocabulary for TP, the checkpoint knows no such rows.
        padded = shard.allow_shape_mismatch
        assert padded or tuple(shard.global_shape) == whole, (shard.key, shard.global_shape, whole)
        lead = (1,) * shard.prepend_axis_num
        shape = [*lead, *shard.local_shape]
        if padded:
            shape[0] = min(shape[0], whole[0] - shard.global_offset[0])
        data = shard.data.view(*lead, *shard.local_shape)[: shape[0]]
        assert torch.equal(source.read(shard.key, tuple(shard.global_offset), tuple(shape)), data), shard.key
    return len(shards)


def save(model, folder: Path, *, with_optimizer: bool) -> None:
    from megatron.core import dist_checkpointing

    from toolkits.training.parallel.model import wrap

    step = folder / "iter_0000007"
    if torch.distributed.get_rank() == 0:
        step.mkdir(parents=True)
    torch.distributed.barrier()
    state = {"model": model.sharded_state_dict(), "iteration": 7, "args": {"lr": 0.1}}
    if with_optimizer:
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

        config = OptimizerConfig(optimizer="adam", lr=1e-3, bf16=False, use_distributed_optimizer=False)
        optimizer = get_megatron_optimizer(config, wrap((model,), distributed_optimizer=False))
        state["optimizer"] = optimizer.sharded_state_dict(state["model"], is_loading=True)
    dist_checkpointing.save(state, str(step))


def save_stock_model(model, folder: Path) -> None:
    """Save the weights under the names that the local layer spec gives when nobody maps them, a key each layer."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    (step := folder / "release").mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    mlp = ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
    stock_names = {"self_attention.linear_qkv.layer_norm_": "input_layernorm."}
    stock_names |= dict([mlp[::-1] if model.config.num_moe_experts else mlp])  # of experts it is the other way round
    state = model.sharded_state_dict(metadata={"non_homogeneous_layers": True})
    for value in state.values():
        for ours, stock in stock_names.items():
            value.key = value.key.replace(ours, stock)
    dist_checkpointing.save(
        {key: value for key, value in state.items() if not isinstance(value, ShardedObject)}, str(step)
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
