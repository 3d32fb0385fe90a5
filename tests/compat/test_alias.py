"""`flash_attn` as a name of this package, in processes of their own: what is imported stays imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def python(code: str, *paths: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, *paths)))}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def installed(folder: Path) -> Path:
    """A package that looks like flash-attn with flash-attn-4 in its folder."""
    package = folder / "flash_attn"
    (package / "cute").mkdir(parents=True)
    (package / "__init__.py").write_text("real = True\n")
    (package / "utils.py").write_text("")
    (package / "cute" / "__init__.py").write_text("from flash_attn.cute import interface\n")
    (package / "cute" / "interface.py").write_text("real = True\n")
    return folder


ALIASED = """
import tilestack.compat.flash_attn.as_flash_attn
import tilestack.compat.flash_attn.as_flash_attn  # again: nothing happens
"""
USE = """
import importlib, sys
import flash_attn, flash_attn_2_cuda
import flash_attn.flash_attn_interface as interface
from flash_attn import flash_attn_func, flash_attn_varlen_func, __version__
from flash_attn.bert_padding import pad_input, unpad_input, index_first_axis
from flash_attn.flash_attn_interface import flash_attn_gpu
from flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb
from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.ops.activations import swiglu
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
from flash_attn.ops.triton.layer_norm import RMSNorm, layer_norm_fn
from flash_attn.ops.triton.rotary import apply_rotary
import tilestack.compat.flash_attn.layers.rotary as ours
assert flash_attn_gpu is flash_attn_2_cuda and callable(flash_attn_2_cuda.varlen_bwd)
assert RotaryEmbedding is ours.RotaryEmbedding and __version__ == "2.8.3"
assert importlib.util.find_spec("flash_attn") is not None
for name, reason in (("modules.mha", "tilestack.models"), ("ops.rms_norm", "compiled extension"), ("utils", "models")):
    try:
        importlib.import_module(f"flash_attn.{name}")
    except ModuleNotFoundError as error:
        assert "tilestack's flash_attn leaves out" in str(error) and reason in str(error), error
    else:
        raise AssertionError(name)
"""


def test_code_that_imports_flash_attn_finds_this_package():
    done = python(ALIASED + USE)
    assert done.returncode == 0, done.stderr


def test_an_installed_package_is_hidden_but_for_flash_attn_4(tmp_path):
    check = (
        "import flash_attn.cute.interface\nassert flash_attn.cute.interface.real and not hasattr(flash_attn, 'real')\n"
    )
    done = python(ALIASED + USE + check, installed(tmp_path))
    assert done.returncode == 0, done.stderr


def test_the_alias_is_refused_once_the_real_package_was_imported(tmp_path):
    done = python("import flash_attn\n" + ALIASED, installed(tmp_path))
    assert done.returncode != 0
    assert "ImportError: tilestack.compat.flash_attn.as_flash_attn must be imported before flash_attn" in done.stderr
    assert str(tmp_path) in done.stderr


def test_importing_the_package_alone_makes_no_alias():
    done = python("import sys, tilestack.compat.flash_attn\nassert 'flash_attn' not in sys.modules")
    assert done.returncode == 0, done.stderr


def test_the_adapter_to_the_real_package_does_not_call_the_alias_by_its_name():
    code = ALIASED + (
        "from tilestack.kernels.attention import vendor_flash_attn\n"
        "assert 'alias of tilestack.compat.flash_attn' in vendor_flash_attn.refuses(None)\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_transformers_does_not_take_the_alias_for_an_installed_flash_attn():
    code = ALIASED + (
        "from transformers.utils import is_flash_attn_2_available\nassert not is_flash_attn_2_available()\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr


FLASH_ATTENTION_2 = """
import copy
import torch, transformers
from transformers import AutoModelForCausalLM, Qwen3Config, modeling_flash_attention_utils
from transformers.utils import import_utils
from tilestack.testing.compare import assert_close
import_utils.is_torch_cuda_available = lambda: True  # without it, transformers never takes flash attention
import_utils.is_flash_attn_2_available.cache_clear()
modeling_flash_attention_utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX[2]["supported_devices"] = ((lambda: True, "cpu"),)
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
models = {}
for name in ("flash_attention_2", "eager"):
    torch.manual_seed(0)
    config = Qwen3Config(**sizes, **heads)
    models[name] = AutoModelForCausalLM.from_config(config, attn_implementation=name, dtype=torch.bfloat16)
models["exact"] = copy.deepcopy(models["eager"]).float()
ids = torch.randint(64, (2, 12))
mask = torch.ones_like(ids)
mask[0, :4] = 0
for options in ({}, {"attention_mask": mask}):
    found = {}
    for name, model in models.items():
        model.zero_grad()
        logits = model(input_ids=ids, **options).logits[mask.bool()]
        logits.square().mean().backward()
        found[name] = logits.detach(), model.model.layers[0].self_attn.k_proj.weight.grad.clone()
    for name, *each in zip(("logits", "gradient"), *found.values(), strict=True):
        assert_close(name, *each)
written = [
    models[name].generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    for name in ("flash_attention_2", "eager")
]
assert torch.equal(*written)
loaded = modeling_flash_attention_utils._lazy_imports("flash_attention_2")
assert {each.__module__.split(".")[0] for each in loaded} == {"tilestack"}, loaded
"""


@pytest.mark.slow
def test_transformers_flash_attention_2_runs_on_the_alias_where_a_flash_attn_is_installed(tmp_path):
    """On the CPU, told that it is a GPU: dense, padded, and with one query a sequence."""
    information = tmp_path / "flash_attn-2.8.3.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\n")
    (information / "top_level.txt").write_text("flash_attn\n")
    done = python(ALIASED + FLASH_ATTENTION_2, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
