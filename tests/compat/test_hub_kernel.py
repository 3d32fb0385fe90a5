"""The package of attention that Hugging Face's `kernels` loads."""

import ast
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tilestack.compat import flash_attn
from tilestack.compat.hub_kernel import FUNCTIONS, build, main, relocated

USE = """
import importlib.util, inspect, json, sys
import torch
variant, alongside = sys.argv[1], sys.argv[2] == "alongside"
name = json.load(open(variant + "/metadata.json"))["id"]
if alongside:
    import tilestack.kernels
spec = importlib.util.spec_from_file_location(name, variant + "/__init__.py")
module = sys.modules[name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert ("tilestack" in sys.modules) == alongside, "the package imports tilestack"
q, k, v = (torch.randn(2, 9, h, 16).bfloat16() for h in (4, 2, 2))
out = module.flash_attn_func(q, k, v, causal=True)
want = torch.nn.functional.scaled_dot_product_attention(
    *(each.transpose(1, 2).float() for each in (q, k, v)), is_causal=True, enable_gqa=True).transpose(1, 2)
assert (out.float() - want).abs().max() < 0.03
offsets = torch.tensor([0, 9, 18], dtype=torch.int32)
packed = module.flash_attn_varlen_func(*(each.flatten(0, 1) for each in (q, k, v)), offsets, offsets, 9, 9, causal=True)
assert torch.equal(packed.view_as(out), out)
assert hasattr(torch.ops, name) and hasattr(getattr(torch.ops, name), "attention_forward_reference")
print(json.dumps({each: str(inspect.signature(getattr(module, each))) for each in module.__all__}))
"""

HIDE = """
import importlib.abc, sys
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "tilestack":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
"""


def run_python(program: str, folder: Path, *arguments) -> subprocess.CompletedProcess:
    path = folder / "program.py"
    path.write_text(program)
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [sys.executable, path, *arguments], env=environment, cwd=folder, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "tilestack-attention"
    assert main([str(folder), "--backend", "cpu", "--backend", "cuda"]) == 0
    return folder


def test_it_has_the_layout_of_a_kernel_repository(repository):
    assert sorted(each.name for each in repository.iterdir()) == ["build", "build.toml", "torch-ext"]
    identifiers = set()
    for backend in ("cpu", "cuda"):
        variant = repository / "build" / f"torch-{backend}"
        metadata = json.loads((variant / "metadata.json").read_text())
        assert metadata["name"] == "tilestack-attention" and metadata["backend"] == {"type": backend}
        assert metadata["python-depends"] == [] and metadata["version"] == 1
        assert metadata["id"].isidentifier()
        identifiers.add(metadata["id"])
        assert not list(variant.rglob("*.md")) and not list(variant.rglob("*.pyc"))
    assert len(identifiers) == 2


def test_every_import_in_it_is_relative_or_of_another_package(repository):
    for path in (repository / "build" / "torch-cuda").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            assert not [each for each in names if each.split(".")[0] == "tilestack"], path


@pytest.mark.parametrize("how", ["alone", "alongside"])
def test_it_runs_without_tilestack_and_next_to_it(repository, how, tmp_path):
    """In a process of its own, where tilestack is hidden, or imported first."""
    program = USE if how == "alongside" else HIDE + USE
    done = run_python(program, tmp_path, repository / "build" / "torch-cpu", how)
    assert done.returncode == 0, done.stderr[-2000:]
    signatures = json.loads(done.stdout)
    assert set(signatures) == set(FUNCTIONS) == set(flash_attn.__all__)
    for each in ("causal", "softmax_scale", "dropout_p", "window_size", "deterministic", "softcap", "block_table"):
        assert each in signatures["flash_attn_varlen_func"], "transformers looks for it"
    for each in ("cache_seqlens", "block_table"):
        assert each in signatures["flash_attn_with_kvcache"], "transformers looks for it"


LOAD = """
import os, sys
from pathlib import Path
import kernels
folder = Path(sys.argv[1])
if kernels.__version__ >= "0.17":
    from kernels._rust import Build
    assert Build.open(folder)
module = kernels.get_local_kernel(folder, backend="cpu")
assert set(module.__all__) == set(sys.argv[2].split(","))
from transformers.utils import is_kernels_available
if is_kernels_available():
    from transformers.modeling_flash_attention_utils import _lazy_imports
    os.environ["LOCAL_KERNELS"] = f"someone/tilestack-attention={folder}"
    functions = _lazy_imports("someone/tilestack-attention")
    assert functions[:3] == (module.flash_attn_func, module.flash_attn_varlen_func, module.flash_attn_with_kvcache)
"""


def test_the_kernels_package_loads_it_and_transformers_takes_it(repository, tmp_path):
    """In a process of its own: the folder of these tests has a `kernels`, too."""
    try:
        importlib.metadata.version("kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package `kernels` is not installed, and tilestack does not need it")
    done = run_python(LOAD, tmp_path, repository, ",".join(FUNCTIONS))
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("kernels/a/op.py", "from tilestack.kernels import checks", "from ...kernels import checks"),
        ("kernels/a/op.py", "from tilestack.kernels.a.b import c", "from ...kernels.a.b import c"),
        ("kernels/__init__.py", "from tilestack.kernels.a import b", "from ..kernels.a import b"),
        ("kernels/a.py", "from torch import nn", "from torch import nn"),
        ("kernels/a.py", "x = 'tilestack.kernels.b'", 'x = __name__.rsplit(".", 2)[0] + ".kernels.b"'),
        ("kernels/a.py", 'f(f"tilestack.kernels.{op}.c")', 'f(__name__.rsplit(".", 2)[0] + f".kernels.{op}.c")'),
        ("kernels/__init__.py", '"é"; x = "tilestack.b"', '"é"; x = __name__.rsplit(".", 1)[0] + ".b"'),
        ("kernels/a.py", 'x = "tilestack"', 'x = "tilestack"'),
        ("kernels/a.py", '"""Says tilestack.kernels."""', '"""Says tilestack.kernels."""'),
        (
            "kernels/a.py",
            'NAMESPACE = "tilestack"',
            'NAMESPACE = __name__.rsplit(".", 2)[0].replace(".", "_")',
        ),
    ],
)
def test_what_names_the_package_is_made_relative(path, source, expected):
    assert relocated(source, path) == expected


def test_an_import_that_cannot_be_made_relative_is_refused():
    with pytest.raises(ValueError, match="kernels/a.py says `import tilestack.kernels`"):
        relocated("import tilestack.kernels", "kernels/a.py")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backends": ("cuda", "tpu")}, "backends must be of cuda, cpu, rocm"),
        ({"backends": ()}, "backends must be of"),
        ({"version": 0}, "version must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_write_nothing(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "new", **arguments)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine").write_text("keep")
    assert main([str(tmp_path)]) == 2
    assert "must not exist or be an empty folder" in capsys.readouterr().err
    assert (tmp_path / "mine").read_text() == "keep"
