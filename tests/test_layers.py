"""The layers of the design: imports point down only."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "tilestack"
LAYERS = ["kernels", "models", "distributed", "app"]  # bottom first
OPTIONAL = {"transformers": {"models", "distributed", "app", "bench"}, "deepspeed": {"distributed", "bench"}}


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; the house style is absolute"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def layer_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down_only(path):
    layer = layer_of(path)
    imported = imports_of(path)
    used = {name.split(".")[1] for name in imported if name.startswith("tilestack.")}
    if layer in LAYERS:
        above = set(LAYERS[LAYERS.index(layer) + 1 :]) | {"bench", "testing", "compat"}
        assert not used & above, f"{path} reaches up to {used & above}"
    if layer == "compat":
        assert not used - {"compat", "kernels"}, f"{path} stands on kernels alone, not on {used}"
    if layer == "testing":
        assert not used & (set(LAYERS) - {"kernels"} | {"bench"})
    for package, allowed in OPTIONAL.items():
        names = {name for name in imported if name.split(".")[0] == package}
        assert not names or layer in allowed, f"{path} imports {package}; only {sorted(allowed)} may"


def test_no_python_file_is_longer_than_700_lines():
    for path in ROOT.parent.rglob("*.py"):
        if ".venv" not in path.parts:
            assert len(path.read_text().splitlines()) <= 700, path
