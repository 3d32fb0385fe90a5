"""Writes tilestack's attention as a kernel of Hugging Face's `kernels` package: pure Python, no installation.

    python -m tilestack.compat.hub_kernel FOLDER [--backend cuda] [--backend cpu] [--version 1]

FOLDER then has the layout of a kernel repository: build/torch-<backend>/ holds the functions of
tilestack.compat.flash_attn and all kernels under them, with relative imports, so that it loads under any name and next
to an installed tilestack; metadata.json says what it is (as kernels 0.17 reads it); build.toml and torch-ext/ are what
kernel-builder would build the same from. Use it in place, or upload it:

    LOCAL_KERNELS="me/tilestack-attention=FOLDER" python ...
    AutoModelForCausalLM.from_pretrained(..., attn_implementation="me/tilestack-attention")

    kernels.get_local_kernel(Path("FOLDER")).flash_attn_func(q, k, v, causal=True)
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

NAME = "tilestack-attention"
BACKENDS = ("cuda", "cpu", "rocm")
FUNCTIONS = (
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
)
_ROOT = Path(__file__).parents[1]
_FOLDERS = ("kernels", "compat/flash_attn")
_LEFT_OUT = {"compat/flash_attn/as_flash_attn.py"}  # puts the package in the place of flash_attn: for an installed one
_MODULE = re.compile(r"""f?["']tilestack((\.[\w{}]+)+)["']""")


def build(folder: Path, backends: tuple[str, ...] = ("cuda", "cpu"), version: int = 1) -> None:
    """Write the kernel repository.

    folder: does not exist, or is empty; it appears when all is written.
    backends: of "cuda", "cpu" and "rocm".
    version: the kernel's major version on the hub, from 1.

    Raises ValueError for a wrong argument; then nothing was written.
    """
    unknown = [each for each in backends if each not in BACKENDS]
    if unknown or not backends:
        raise ValueError(f"hub_kernel: backends must be of {', '.join(BACKENDS)}, got {list(backends)}")
    if version < 1:
        raise ValueError(f"hub_kernel: version must be at least 1, got {version}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"hub_kernel: {folder} must not exist or be an empty folder; remove it, or name another")
    files = dict(_files())
    unfinished = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    for backend in backends:
        variant = unfinished / "build" / f"torch-{backend}"
        _write(variant, files)
        (variant / "metadata.json").write_text(json.dumps(_metadata(backend, version, files), indent=2) + "\n")
    _write(unfinished / "torch-ext" / NAME.replace("-", "_"), files)
    (unfinished / "build.toml").write_text(_build_toml(backends, version))
    os.replace(unfinished, folder)


def _files() -> Iterator[tuple[str, str]]:
    """Relative path and text of each file of the package."""
    imported = ",\n    ".join(FUNCTIONS)
    listed = "".join(f'    "{each}",\n' for each in FUNCTIONS)
    yield (
        "__init__.py",
        (
            f'"""flash-attn 2.8.3\'s functions over the kernels of tilestack."""\n\n'
            f"from .compat.flash_attn import (\n    {imported},\n)\n\n__all__ = [\n{listed}]\n"
        ),
    )
    yield "compat/__init__.py", ""
    for name in _FOLDERS:
        for path in sorted((_ROOT / name).rglob("*.py")):
            relative = path.relative_to(_ROOT).as_posix()
            if relative not in _LEFT_OUT:
                yield relative, relocated(path.read_text(encoding="utf-8"), relative)


def relocated(source: str, path: str) -> str:
    """The source of tilestack/<path> with nothing in it that names the package it lies in.

    Imports become relative; the dotted paths of modules that are imported by name, and the namespace of the custom ops,
    are made from the name under which the module itself was imported.
    """
    depth = path.count("/")
    levels = depth if path.endswith("__init__.py") else depth + 1  # from the module's own name up to the package
    package = f'__name__.rsplit(".", {levels})[0]'
    lines = source.splitlines(keepends=True)
    starts = [0, *itertools.accumulate(map(len, lines))]

    def place(line: int, column: int) -> int:  # columns count bytes
        return starts[line - 1] + len(lines[line - 1].encode()[:column].decode())

    edits = {}  # by place: Python 3.11 says of the parts of an f-string that they lie where all of it does
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.Import, ast.ImportFrom, ast.Constant, ast.JoinedStr, ast.Assign)):
            continue
        span = place(node.lineno, node.col_offset), place(node.end_lineno, node.end_col_offset)
        text = source[slice(*span)]
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module.split(".")[0] == "tilestack":
            edits[span] = text.replace(node.module, "." * (depth + 1) + node.module.partition(".")[2], 1)
        elif isinstance(node, ast.Import) and any(each.name.split(".")[0] == "tilestack" for each in node.names):
            raise ValueError(f"hub_kernel: {path} says `{text}`; only `from tilestack... import` can be made relative")
        elif isinstance(node, (ast.Constant, ast.JoinedStr)) and (match := _MODULE.fullmatch(text)):
            edits[span] = f'{package} + {"f" if text.startswith("f") else ""}"{match[1]}"'
        elif isinstance(node, ast.Assign) and text == 'NAMESPACE = "tilestack"':
            edits[span] = f'NAMESPACE = {package}.replace(".", "_")'
    for (begin, end), text in sorted(edits.items(), reverse=True):
        source = source[:begin] + text + source[end:]
    return source


def _write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def _metadata(backend: str, version: int, files: dict[str, str]) -> dict:
    """id: the name of the module, and of its namespace in torch.ops: another one for other contents."""
    contents = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:7]
    return {
        "name": NAME,
        "id": f"_{NAME.replace('-', '_')}_{backend}_{contents}",
        "version": version,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
    }


def _build_toml(backends: tuple[str, ...], version: int) -> str:
    listed = ", ".join(f'"{each}"' for each in backends)
    return (
        f'[general]\nedition = 5\nname = "{NAME}"\nversion = {version}\nlicense = "Apache-2.0"\n'
        f"backends = [{listed}]\n\n[torch-noarch]\n"
    )


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tilestack.compat.hub_kernel", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="does not exist, or is empty")
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="may be repeated; default: cuda, cpu")
    parser.add_argument("--version", type=int, default=1, help="the kernel's version on the hub; default: 1")
    args = parser.parse_args(argv)
    try:
        build(args.folder, tuple(args.backend or ("cuda", "cpu")), args.version)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{args.folder}: {', '.join(sorted(each.name for each in (args.folder / 'build').iterdir()))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
