"""From a YAML file and the command line to a Config, with errors in our own words.

jsonargparse reads and converts; plain types only, so that a configuration never imports or runs anything.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from tilestack.app.config import Config
from tilestack.app.errors import UserError

EXAMPLES = """
Every key can be set in the YAML file (--config) and on the command line, which wins. The defaults above hold for keys
that neither sets; without --config, the preset for this machine (a file in configs/) sets many:
  python train.py                                              the preset for this machine
  python train.py --config configs/tiny-cpu.yaml --optimizer.lr 1e-4
  python train.py --data.source my.jsonl --model.path Qwen/Qwen3-30B-A3B
  python train.py --resume latest                              go on where the newest run stopped
  torchrun --nproc-per-node 2 train.py --distributed.zero 2    several processes on this machine, one a GPU
  torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 train.py ...
                                                               the same line on each of 4 nodes, HOST one of them
  srun --nodes 4 --ntasks-per-node 8 --gpus-per-node 8 --kill-on-bad-exit=1 python train.py ...
                                                               Slurm starts the processes, without torchrun
"""


def parser(prog: str) -> jsonargparse.ArgumentParser:
    """The parser of the whole tree: one option a leaf, its help from the docstring of its dataclass."""
    made = jsonargparse.ArgumentParser(
        prog=prog,
        exit_on_error=False,
        allow_abbrev=False,
        usage=f"{prog} [--config FILE] [--resume RUN] [--GROUP.KEY VALUE ...]",
        description="Train a Qwen3-MoE: from scratch, or from a Hugging Face checkpoint.",
        print_config=None,
    )
    made.add_argument("--config", action="config", help="YAML file; default: the preset for this machine")
    made.add_argument(
        "--resume",
        type=str | None,
        default=None,
        help="go on from the newest checkpoint of a run: its folder, or 'latest'; takes that run's configuration",
    )
    for group in dataclasses.fields(Config):
        kind = typing.get_type_hints(Config)[group.name]
        section = made.add_argument_group(_headline(kind))
        helps = _docs_of_keys(kind)
        for leaf in dataclasses.fields(kind):
            section.add_argument(
                f"--{group.name}.{leaf.name}",
                type=typing.get_type_hints(kind)[leaf.name],
                default=_default(leaf),
                help=helps.get(leaf.name, leaf.name.replace("_", " ")),
            )
    return made


def parse(argv: list[str], config_file: Path, prog: str = "train.py") -> Config:
    """The configuration that `config_file` and the options in `argv` (without --config and --resume) give.

    Raises UserError: unknown key (with the nearest valid one), wrong type (key, expected type, value), bad YAML.
    """
    tree = read_yaml(config_file)
    check_tree(tree, str(config_file))
    _check_options(argv)
    file = ["--config", str(config_file)] if tree else []  # jsonargparse does not take an empty one
    try:
        values = parser(prog).parse_args([*file, *argv])
    except jsonargparse.ArgumentError as error:
        raise UserError(_in_our_words(str(error))) from None
    return from_tree(values.as_dict())


def take_option(argv: list[str], name: str) -> tuple[str | None, list[str]]:
    """The value of `--name` in argv (the last one; None if absent) and argv without it."""
    value, rest, position = None, [], 0
    while position < len(argv):
        word = argv[position]
        if word == f"--{name}":
            if position + 1 == len(argv) or argv[position + 1].startswith("--"):
                raise UserError(f"--{name} needs a value")
            value = argv[position + 1]
            position += 1
        elif word.startswith(f"--{name}="):
            value = word.split("=", 1)[1]
        else:
            rest.append(word)
        position += 1
    return value, rest


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError if there is none, or if it has a key twice."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _EachKeyOnce)
    except FileNotFoundError:
        raise UserError(f"configuration file {path} does not exist") from None
    except yaml.MarkedYAMLError as error:
        place = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"configuration file {path}{place} cannot be read: {error.problem or error.context}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"configuration file {path} cannot be read: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"configuration file {path} must hold 'group:' and 'key: value' lines, got {tree!r}")
    return tree


class _EachKeyOnce(yaml.SafeLoader):
    """Plain values only, as SafeLoader; but of a key that is there twice, that would take the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                problem = f"the key {key.value} is there a second time; put all of it in one place"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def check_tree(tree: Mapping[str, Any], where: str) -> None:
    """Raise UserError for the first key of a nested mapping that the configuration does not have."""
    known = keys()
    groups = {key.split(".")[0] for key in known}
    for group, leaves in tree.items():
        if group not in groups:
            raise UserError(f"{where}: {_unknown(str(group), [*groups, *known])}")
        if not isinstance(leaves, dict):
            raise UserError(f"{where}: {group} is a group of keys, got {leaves!r}; write them below it, indented")
        for leaf, value in leaves.items():
            if f"{group}.{leaf}" not in known:
                raise UserError(f"{where}: {_unknown(f'{group}.{leaf}', known)}")
            kind = _type_of(f"{group}.{leaf}")
            if value is None and type(None) not in typing.get_args(kind):  # jsonargparse would let it pass
                raise UserError(f"{where}: {group}.{leaf} must be {_type_in_words(kind)}, got null")


def keys() -> list[str]:
    """Every key of the configuration, as "group.key"."""
    hints = typing.get_type_hints(Config)
    return [f"{group}.{leaf.name}" for group, kind in hints.items() for leaf in dataclasses.fields(kind)]


def from_tree(tree: Mapping[str, Any]) -> Config:
    """A Config from a nested mapping whose values have the right types."""
    hints = typing.get_type_hints(Config)
    try:
        return Config(**{group: kind(**tree[group]) for group, kind in hints.items() if group in tree})
    except ValueError as error:  # the checks of a dataclass in a lower layer
        raise UserError(str(error)) from None


def to_yaml(config: Config) -> str:
    """The configuration as the YAML text that gives it back."""
    return yaml.safe_dump(to_plain(config), sort_keys=False, default_flow_style=None)


def to_plain(config: Config) -> dict[str, Any]:
    """The configuration as nested dictionaries of what JSON and YAML can hold."""
    return {group: _plain(leaves) for group, leaves in dataclasses.asdict(config).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _check_options(argv: list[str]) -> None:
    known = keys()
    waiting = None  # the key whose value comes next
    for word in argv:
        if word in ("-h", "--help"):
            continue
        if word.startswith("--"):
            _check_nothing_waits(waiting)
            name = word[2:].split("=", 1)[0]
            if name not in known:
                raise UserError(_unknown(name, [*known, "config", "resume", "help"], dashes="--"))
            waiting = None if "=" in word else name
        elif waiting is not None:
            waiting = None
        else:
            raise UserError(f"{word!r} belongs to no option; options are written --group.key value")
    _check_nothing_waits(waiting)


def _check_nothing_waits(key: str | None) -> None:
    if key is not None:
        raise UserError(f"--{key} needs a value: {_type_in_words(_type_of(key))}")


def _unknown(name: str, known: list[str], dashes: str = "") -> str:
    """The text for a key that does not exist, with the valid one that is nearest."""
    group, _, leaf = name.rpartition(".")
    siblings = {key.split(".")[1]: key for key in known if group and key.startswith(f"{group}.")}
    close = [siblings[each] for each in difflib.get_close_matches(leaf, siblings, n=1)]
    close = close or [key for key in known if key.split(".")[-1] == leaf]
    if siblings and not close:
        return f"unknown key {dashes}{name}; {group} has the keys {', '.join(siblings)}"
    close = close or difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    close = close or [key for key in known if difflib.get_close_matches(leaf, [key.split(".")[-1]], cutoff=0.6)]
    close = close or difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {dashes}{close[0]}?" if close else "; see --help for all keys"
    return f"unknown key {dashes}{name}{hint}"


def _in_our_words(message: str) -> str:
    found = re.search(r'key "(?P<key>[\w.]+)":.*(?:Got|Given) value: (?P<value>.*)', message, re.DOTALL)
    if not found:
        return message.strip()
    key, value = found["key"], found["value"].strip()
    return f"{key} must be {_type_in_words(_type_of(key))}, got {value!r}"


def _type_of(key: str) -> Any:
    group, leaf = key.split(".", 1)
    return typing.get_type_hints(typing.get_type_hints(Config)[group])[leaf]


def _type_in_words(kind: Any) -> str:
    simple = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if kind in simple:
        return simple[kind]
    arguments = typing.get_args(kind)
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        return "one of " + ", ".join(str(each) for each in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_in_words(each) for each in arguments)
    if origin is list:
        return f"a list in brackets, such as [a,b], each {_type_in_words(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}: " + ", ".join(_type_in_words(each) for each in arguments)
    return str(kind)


def _headline(kind: type) -> str:
    return (kind.__doc__ or kind.__name__).strip().splitlines()[0].rstrip(".")


def _docs_of_keys(kind: type) -> dict[str, str]:
    """The `key: what it is` lines of a dataclass's docstring; deeper indented lines continue the one before."""
    docs: dict[str, str] = {}
    last: list[str] = []
    names = {leaf.name for leaf in dataclasses.fields(kind)}
    for line in (kind.__doc__ or "").splitlines()[1:]:
        found = re.match(r"    ([\w, ]+): (.+)", line)
        if found and set(found[1].split(", ")) <= names:
            last = found[1].split(", ")
            docs |= dict.fromkeys(last, found[2].strip())
        elif line.strip():
            docs |= {name: f"{docs[name]} {line.strip()}" for name in last}
        else:
            last = []
    return docs


def _default(leaf: dataclasses.Field) -> Any:
    return leaf.default if leaf.default is not dataclasses.MISSING else leaf.default_factory()
