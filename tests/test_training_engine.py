"""What is chosen where Transformer Engine is installed, with a stand-in that has its names and nothing behind them.

It shows which modules a model would be made of; that they compute the right thing, only a GPU can show.
"""

import json
import os
import subprocess
import sys

import pytest
from training_world import ROOT, TINY

WITH_A_STAND_IN = """
import importlib.abc, importlib.machinery, json, sys, types, warnings
warnings.simplefilter("ignore")
import torch

class StandIn(types.ModuleType):
    __path__ = []
    __version__ = "2.9.0"
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        full = f"{self.__name__}.{name}"
        made = type(name, (torch.nn.Module,), {}) if name[0].isupper() else sys.modules.get(full) or StandIn(full)
        setattr(self, name, made)
        return made

class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "transformer_engine":
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
    def create_module(self, spec):
        return StandIn(spec.name)
    def exec_module(self, module):
        pass

sys.meta_path.insert(0, Finder())
from conversion.plan import plan_for
from toolkits.training.settings import ComputeSettings
from toolkits.training.layout import Layout
from toolkits.training.parallel import fused, mcore_patches, model, spec
from megatron.core.tensor_parallel import layers

from megatron.core import parallel_state
parallel_state.get_pipeline_model_parallel_rank = lambda: 0
torch.distributed.get_rank = lambda *args: 0

def chosen(hf, gpu=True, flash=True, more={}):
    torch.cuda.is_available, layers._grad_accum_fusion_available = lambda: gpu, False
    settings = {**plan_for(hf).settings, **more}
    compute = ComputeSettings(flash_attention=flash)
    engine = model.takes_engine(compute)
    assert not model.takes_engine(compute, adapters=True)
    config = model.transformer_config(settings, Layout(1, 1, 1, False, 1), compute, engine=engine)
    block = spec.decoder_spec(config, flash_attention=flash, engine=engine)
    mcore_patches._let_transformer_engine_add_weight_gradients()
    layer = block.layer_specs[0].submodules
    attention = layer.self_attention.submodules
    return {
        "qkv": attention.linear_qkv.__name__,
        "q_norm": attention.q_layernorm.__name__,
        "core": attention.core_attention.__name__,
        "fc1": layer.mlp.submodules.linear_fc1.__name__,
        "final": block.layer_norm.__name__,
        "layers": len(block.layer_specs),
        "rope": config.apply_rope_fusion,
        "accumulate": config.gradient_accumulation_fusion,
        "swiglu": config.bias_activation_fusion,
        "head accepts it": layers._grad_accum_fusion_available,
    }

print(json.dumps([chosen(**given) for given in json.loads(sys.argv[1])]))
"""
HF = TINY | {"architectures": ["Qwen2ForCausalLM"], "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
ENGINE = {
    "qkv": "TELayerNormColumnParallelLinear",
    "core": "TEDotProductAttention",
    "fc1": "TELayerNormColumnParallelLinear",
    "final": "TENorm",
    "rope": True,
    "accumulate": True,
    "head accepts it": True,
}
OURS = {
    "qkv": "ColumnParallelLinear",
    "core": "PackedAttention",
    "fc1": "ColumnParallelLinear",
    "final": "RMSNorm",
    "rope": False,
    "accumulate": False,
    "head accepts it": False,
}


CASES = {
    "a GPU": ({}, ENGINE | {"q_norm": "IdentityOp", "layers": 4, "swiglu": True}),
    "norms on queries, interleaved rotation": (
        {"more": {"qk_layernorm": True, "rotary_interleaved": True}},
        ENGINE | {"q_norm": "TENorm", "rope": False},
    ),
    "the exact path": (
        {"flash": False},
        OURS | {"core": "ReferenceAttention", "swiglu": True, "head accepts it": True},
    ),
    "no GPU": ({"gpu": False}, OURS | {"swiglu": False}),
}


@pytest.fixture(scope="module")
def chosen():
    words = json.dumps([{"hf": HF, **given} for given, _ in CASES.values()])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITH_A_STAND_IN, words],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_transformer_engine_is_taken_where_there_is_a_gpu(chosen, name):
    expected = CASES[name][1]
    assert {key: chosen[name][key] for key in expected} == expected
