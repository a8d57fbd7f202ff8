"""Layouts on disk that other tools write: each written here from its description, and read bit for bit."""

import io
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion import hf_to_mcore, mcore_to_hf
from conversion.archive_layout import archive_of
from conversion.hf_as_mcore import HfAsMcore
from conversion.hf_checkpoint import HfCheckpoint, is_hf_directory
from conversion.mcore_checkpoint import McoreCheckpoint, find_step, is_mcore_directory
from conversion.mcore_writer import Chunk, write_step
from conversion.safe_pickle import scan_directory
from conversion.verify import verify
from tests.conversion_models import EXPERTS, TIED, UNTIED, tensors_of, write_hf, write_model
from toolkits.foundation.errors import CheckpointError, UsageError

PER_LAYER = "decoder.layers.{}."


def merged_tensors(folder):
    """Return all Megatron-core tensors of a HuggingFace directory, layers and experts merged."""
    source = HfAsMcore(folder)
    return {key: source.read(key, (0,) * len(info.shape), info.shape).clone() for key, info in source.tensors.items()}


def whole(key, data):
    return Chunk(key, tuple(data.shape), (0,) * data.ndim, tuple(data.shape), data.dtype, lambda: [data])


def cut(key, data, offsets, shape):
    """A chunk of a tensor, as a rank saves it."""
    part = data[tuple(slice(at, at + size) for at, size in zip(offsets, shape, strict=True))].contiguous()
    return Chunk(key, tuple(data.shape), tuple(offsets), tuple(shape), data.dtype, lambda: [part])


def per_layer(tensors):
    """Give each layer keys of its own."""
    found = {}
    for key, data in tensors.items():
        if key.startswith("decoder.layers.") and not key.split(".")[2].isdigit():
            found |= {key.replace("layers.", f"layers.{layer}.", 1): data[layer] for layer in range(len(data))}
        else:
            found[key] = data
    return found


def export_equals(directory, hf, tmp_path):
    mcore_to_hf.convert(directory, tmp_path / "exported")
    assert verify(hf, tmp_path / "exported")


# Megatron-core directories ------------------------------------------------------------------------------


def test_pai_keeps_config_and_tokenizer_at_the_root_and_pads_the_vocabulary(tmp_path, capsys):
    hf = write_hf(tmp_path / "hf")
    tensors = per_layer(merged_tensors(hf))
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        tensors[key] = torch.cat([tensors[key], torch.full((5, 48), 9.0)])
    mcore = tmp_path / "pai"
    write_step(mcore / "release", [whole(key, data) for key, data in tensors.items()], [])
    (mcore / "latest_checkpointed_iteration.txt").write_text("release")
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(hf / name, mcore)
    export_equals(mcore, hf, tmp_path)
    assert "256 rows trimmed to the 251" in capsys.readouterr().err
    assert (tmp_path / "exported" / "tokenizer.json").read_bytes() == (hf / "tokenizer.json").read_bytes()


def test_megatron_bridge_keeps_its_run_in_the_step_and_the_tokenizer_too(tmp_path):
    hf = write_hf(tmp_path / "hf", TIED)
    mcore = tmp_path / "bridge"
    step = mcore / "iter_0000000"
    write_step(step, [whole(key, data) for key, data in merged_tensors(hf).items()], [])
    (step / "run_config.yaml").write_text("model:\n  hf_model_id: somewhere/model\n")
    torch.save({"step": torch.tensor(0)}, step / "train_state.pt")
    shutil.copy(step / "train_state.pt", mcore / "latest_train_state.pt")
    (mcore / "latest_checkpointed_iteration.txt").write_text("0")
    (step / "tokenizer").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(hf / name, step / "tokenizer")
    with pytest.raises(CheckpointError, match=r"bridge has no config.json: copy config.json"):
        mcore_to_hf.convert(mcore, tmp_path / "exported")
    shutil.copy(hf / "config.json", mcore)
    scan_directory(find_step(mcore))
    export_equals(mcore, hf, tmp_path)
    assert (tmp_path / "exported" / "tokenizer.json").read_bytes() == (hf / "tokenizer.json").read_bytes()


def test_since_megatron_core_0_19_common_pt_is_an_object(tmp_path):
    hf = write_hf(tmp_path / "hf")
    write_step(
        tmp_path / "mcore" / "release",
        [whole(key, data) for key, data in merged_tensors(hf).items()],
        ["common_state/shard_0_1", "rng_state/shard_0.0_1.1"],
    )
    step = tmp_path / "mcore" / "release"
    (step / "common.pt").unlink()
    (step / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    shutil.copy(hf / "config.json", tmp_path / "mcore")
    scan_directory(step)
    export_equals(tmp_path / "mcore", hf, tmp_path)


@pytest.mark.parametrize("key", ["self_attention.linear_qkv.weight", "mlp.linear_fc2.weight"])
def test_what_tensor_parallel_ranks_cut_by_rows_or_columns_is_joined(tmp_path, key):
    hf = write_hf(tmp_path / "hf")
    tensors = merged_tensors(hf)
    name = f"decoder.layers.{key}"
    data, axis = tensors.pop(name), 1 if "qkv" in key else 2
    half = data.shape[axis] // 2
    shape = [1, *data.shape[1:]]
    shape[axis] = half
    chunks = [
        cut(name, data, [layer, *(half * rank if each == axis else 0 for each in (1, 2))], shape)
        for layer in range(len(data))
        for rank in range(2)
    ]
    write_step(tmp_path / "mcore" / "release", [*chunks, *(whole(key, data) for key, data in tensors.items())], [])
    shutil.copy(hf / "config.json", tmp_path / "mcore")
    export_equals(tmp_path / "mcore", hf, tmp_path)


def expert_chunks(key, data, kind):
    """Chunks of a merged expert tensor [L, E, rows, columns] as two ranks with experts save it."""
    layers, experts, rows, columns = data.shape
    # A gated first layer is saved in halves, gate and up.
    parts = 2 if "linear_fc1" in key else 1
    if kind == "sequential":
        places = [(layer, expert, 1) for layer in range(layers) for expert in range(experts)]
    else:
        places = [(layer, expert, experts // 2) for layer in range(layers) for expert in (0, experts // 2)]
    return [
        cut(key, data, (layer, expert, part * rows // parts, 0), (1, count, rows // parts, columns))
        for layer, expert, count in places
        for part in range(parts)
    ]


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("experts") / "hf", EXPERTS["qwen3-moe"])


@pytest.mark.parametrize("kind", ["sequential", "grouped"])
def test_experts_saved_one_by_one_or_in_groups(experts, tmp_path, kind):
    tensors = merged_tensors(experts)
    chunks = []
    for key, data in tensors.items():
        chunks += expert_chunks(key, data, kind) if ".experts." in key else [whole(key, data)]
    assert len(chunks) > len(tensors)
    write_step(tmp_path / "mcore" / "release", chunks, [])
    shutil.copy(experts / "config.json", tmp_path / "mcore")
    export_equals(tmp_path / "mcore", experts, tmp_path)


def singletons(tensors):
    """Give each layer, each expert and each half of a gated layer keys of their own."""
    found = {}
    for key, data in per_layer(tensors).items():
        named = {key: data}
        if ".experts.experts." in key:
            named = {key.replace("experts.experts", f"experts.{each}"): data[each] for each in range(len(data))}
        for name, each in named.items():
            if name.endswith("linear_fc1.weight"):
                half = len(each) // 2
                found |= {f"{name}_w": each[:half], f"{name}_v": each[half:]}
            else:
                found[name] = each
    return {name: data.contiguous().clone() for name, data in found.items()}


def test_experts_and_halves_with_keys_of_their_own(experts, tmp_path):
    tensors = singletons(merged_tensors(experts))
    assert "decoder.layers.1.mlp.experts.3.linear_fc1.weight_v" in tensors
    write_step(tmp_path / "mcore" / "release", [whole(key, data) for key, data in tensors.items()], [])
    shutil.copy(experts / "config.json", tmp_path / "mcore")
    export_equals(tmp_path / "mcore", experts, tmp_path)
    del tensors["decoder.layers.1.mlp.experts.2.linear_fc2.weight"]
    write_step(tmp_path / "less" / "release", [whole(key, data) for key, data in tensors.items()], [])
    shutil.copy(experts / "config.json", tmp_path / "less")
    with pytest.raises(CheckpointError, match=r"unexpected: decoder.layers.1: mlp.experts.0.linear_fc2.weight"):
        mcore_to_hf.convert(tmp_path / "less", tmp_path / "other")


def test_the_older_format_of_megatron_lm_is_refused_with_its_upgrade(tmp_path):
    rank = tmp_path / "old" / "iter_0000500" / "mp_rank_00_000"
    rank.mkdir(parents=True)
    torch.save({"model": {}}, rank / "model_optim_rng.pt")
    (tmp_path / "old" / "latest_checkpointed_iteration.txt").write_text("500")
    for directory in (tmp_path / "old", rank.parent):
        assert is_mcore_directory(directory)
        with pytest.raises(
            CheckpointError, match=r"mp_rank_00_000 .*pretrain_gpt.py.*--ckpt-convert-format torch_dist"
        ):
            mcore_to_hf.convert(directory, tmp_path / "exported")


def test_other_formats_are_refused_by_name(tmp_path):
    hf = write_hf(tmp_path / "hf")
    hf_to_mcore.convert(hf, tmp_path / "mcore")
    (tmp_path / "mcore" / "release" / "metadata.json").write_text('{"sharded_backend": "fsdp_dtensor"}')
    with pytest.raises(CheckpointError, match=r"release is a checkpoint of format 'fsdp_dtensor'.*only torch_dist"):
        McoreCheckpoint(tmp_path / "mcore")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (3,), (1, 7, 300)])
def test_an_archive_is_what_torch_load_reads(tmp_path, dtype, shape):
    data = torch.randn(shape).to(dtype)
    layout = archive_of(dtype, shape)
    raw = layout.head + data.reshape(-1).view(torch.uint8).numpy().tobytes() + layout.tail
    assert len(raw) == layout.num_bytes and len(layout.head) % 64 == 0
    assert torch.equal(torch.load(io.BytesIO(raw), weights_only=True), data)
    (tmp_path / "x.pt").write_bytes(raw)
    assert torch.equal(torch.load(tmp_path / "x.pt", weights_only=True, mmap=True), data)


def test_an_archive_of_more_than_4_gib_is_read_without_its_data(tmp_path):  # sparse: nothing is written
    layout = archive_of(torch.bfloat16, (3_000_000_000,))
    with open(tmp_path / "x.pt", "wb") as file:
        file.write(layout.head)
        file.seek(layout.data_bytes, io.SEEK_CUR)
        file.write(layout.tail)
    data = torch.load(tmp_path / "x.pt", weights_only=True, mmap=True)
    assert data.shape == (3_000_000_000,) and data[-1] == 0


# HuggingFace directories --------------------------------------------------------------------------------


def write_bin(folder, tensors, *, shards=1):
    """Write `tensors` as torch.save does, in place of the safetensors of `folder`."""
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return folder
    weight_map = {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05}-of-{shards:05}.bin"
        names = list(tensors)[number::shards]
        torch.save({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pytorch_bin_files_convert_as_safetensors_do(tmp_path, dtype, shards):
    hf = write_hf(tmp_path / "hf", tensors=tensors_of(UNTIED, dtype=dtype))
    folder = write_bin(write_hf(tmp_path / "bin"), tensors_of(UNTIED, dtype=dtype), shards=shards)
    assert is_hf_directory(folder)
    hf_to_mcore.convert(folder, tmp_path / "mcore")
    assert verify(hf, tmp_path / "mcore") == 51


def test_views_parameters_and_module_state_dicts_in_bin_files(tmp_path):
    tensors = tensors_of(UNTIED)
    names = list(tensors)
    state = torch.nn.ParameterDict().state_dict()  # an OrderedDict with versions as an attribute
    state.update(tensors)
    state[names[0]] = torch.nn.Parameter(tensors[names[0]])
    state[names[2]] = tensors[names[2]].t().contiguous().t()  # of another stride
    state[names[3]] = torch.cat([tensors[names[3]]] * 2)[len(tensors[names[3]]) :]  # with an offset
    checkpoint = HfCheckpoint(write_bin(write_hf(tmp_path / "bin"), state))
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())


def test_a_bin_file_that_would_run_something_is_refused(tmp_path):
    class Mischief:
        def __reduce__(self):
            return open, (str(tmp_path / "mark"), "w")

    folder = write_bin(write_hf(tmp_path / "bin"), {"model.norm.weight": Mischief()})
    with pytest.raises(
        CheckpointError, match=r"refusing executable content in .*pytorch_model.bin: it asks for io.open"
    ):
        hf_to_mcore.convert(folder, tmp_path / "out")
    assert not (tmp_path / "mark").exists()


def fp8_blocks(weight, block):
    """Return a weight in FP8 and the inverse scales of its blocks, as DeepSeek-V3 publishes them."""
    rows, columns = weight.shape
    scales = torch.zeros(-(-rows // block), -(-columns // block))
    stored = torch.zeros(rows, columns)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
            scales[i, j] = weight[part].abs().max() / 448
            stored[part] = weight[part] / scales[i, j]
    return stored.to(torch.float8_e4m3fn), scales


@pytest.fixture
def fp8(tmp_path):
    """A directory with FP8 matrices in layers, and the same weights in bfloat16."""
    block = 32  # neither 48 nor 112 is a multiple
    tensors, plain = {}, {}
    for name, weight in tensors_of(UNTIED).items():
        if "proj.weight" not in name:
            tensors[name] = plain[name] = weight.bfloat16()
            continue
        stored, scales = fp8_blocks(weight, block)
        tensors |= {name: stored, f"{name}_scale_inv": scales}
        spread = scales.repeat_interleave(block, 0).repeat_interleave(block, 1)[: len(weight), : weight.shape[1]]
        plain[name] = (stored.float() * spread).bfloat16()
    quantized = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [block, block]}
    write_hf(tmp_path / "fp8", {**UNTIED, "quantization_config": quantized}, tensors=tensors, shards=2)
    return tmp_path / "fp8", write_hf(tmp_path / "plain", tensors=plain)


def test_block_scaled_fp8_is_dequantized_on_request(fp8, tmp_path):
    quantized, plain = fp8
    hf_to_mcore.convert(quantized, tmp_path / "mcore", dequantize=True)
    assert verify(plain, tmp_path / "mcore") == 51
    mcore_to_hf.convert(tmp_path / "mcore", tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == tensors_of(UNTIED).keys()


def test_quantized_weights_are_refused_by_name(fp8, tmp_path):
    quantized, plain = fp8
    with pytest.raises(
        CheckpointError, match=r"is quantized \(.*'fp8', 28 tensors of F8_E4M3\): `temper convert hf2mcore --dequantize"
    ):
        hf_to_mcore.convert(quantized, tmp_path / "out")
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(CheckpointError, match=r"'gptq', 0 tensors of F8_E4M3\): take the model's unquantized weights"):
        hf_to_mcore.convert(plain, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"nothing to dequantize.*gptq"):
        hf_to_mcore.convert(plain, tmp_path / "out", dequantize=True)
    with pytest.raises(UsageError, match=r"--dequantize is for HuggingFace weights"):
        mcore_to_hf.convert(plain, tmp_path / "out", dequantize=True)


def test_fp8_weights_without_fitting_scales_are_all_named(fp8, tmp_path):
    quantized, _ = fp8
    path = next(quantized.glob("model-00001*"))
    tensors = load_file(path)
    gone, short = [name for name in tensors if name.endswith("_scale_inv")][:2]
    del tensors[gone]
    tensors[short] = tensors[short][:-1].contiguous()
    save_file(tensors, path)
    index = json.loads((quantized / "model.safetensors.index.json").read_text())
    del index["weight_map"][gone]
    (quantized / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        hf_to_mcore.convert(quantized, tmp_path / "out", dequantize=True)
    assert f"{gone} is missing" in str(caught.value) and f"{short}: F32" in str(caught.value)


def test_a_step_with_two_kinds_of_the_same_tensor_is_not_guessed_at(tmp_path):
    hf = write_hf(tmp_path / "hf")
    tensors = merged_tensors(hf)
    more = {key: data for key, data in per_layer(tensors).items() if ".1.mlp.linear_fc2" in key}
    chunks = [whole(key, data) for key, data in {**tensors, **more}.items()]
    write_step(tmp_path / "mcore" / "release", chunks, [])
    shutil.copy(hf / "config.json", tmp_path / "mcore")
    with pytest.raises(CheckpointError, match=r"unexpected: decoder.layers.1: mlp.linear_fc2.weight"):
        mcore_to_hf.convert(tmp_path / "mcore", tmp_path / "exported")
