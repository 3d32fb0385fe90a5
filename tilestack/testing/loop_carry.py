"""Finds loop variables that Triton's frontend drops without a word (seen in 3.6, 3.7 and 3.8).

To find what a loop carries, the frontend visits the body once and takes the names whose IR value differs from the one
before the loop. In

    previous = slot
    for i in range(n):
        use(previous)
        previous = slot
        slot = (slot + 1) % n_slots

both `previous` before the loop and `previous` after that visit are the value that `slot` had before the loop. They
compare equal, so `previous` is not carried and keeps its first value for ever. Compute such values from what is carried
instead: `(slot + n_slots - 1) % n_slots`.
"""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from triton.compiler import code_generator


@dataclass(frozen=True)
class LostVariable:
    """A name that a loop's body assigns and that its later iterations, or the code after it, read in vain."""

    function: str
    line: int
    name: str

    def __str__(self) -> str:
        return (
            f"{self.function}: the loop {self.line} lines below its `def` assigns {self.name!r}, which Triton does not "
            "carry: before the loop it is the same value as another carried variable"
        )


@contextlib.contextmanager
def finding_lost_variables() -> Iterator[set[LostVariable]]:
    """Within the context, every kernel that Triton compiles is searched; the set fills up."""
    found: set[LostVariable] = set()
    generator = code_generator.CodeGenerator
    find_carries, set_value = generator._find_carries, generator.set_value
    visits: list[tuple[code_generator.CodeGenerator, set[str]]] = []  # dry visits under way, and what they assigned

    def noting_set_value(self, name, value):
        for visitor, names in visits:
            if visitor is self:
                names.add(name)
        return set_value(self, name, value)

    def checking_find_carries(self, node, liveins, ignore=frozenset()):
        assigned: set[str] = set()
        visits.append((self, assigned))
        try:
            carried, *rest = find_carries(self, node, liveins, ignore)
        finally:
            visits.pop()
        carried_values = {_value(liveins[name]) for name in carried}
        for name in assigned - set(carried) - set(ignore):
            aliases = name in liveins and _value(liveins[name]) in carried_values - {()}
            if aliases and _is_read_in_vain(self, node, name):
                line = node.lineno - self.jit_fn.parse().body[0].lineno
                found.add(LostVariable(self.jit_fn.__name__, line, name))
        return carried, *rest

    generator._find_carries, generator.set_value = checking_find_carries, noting_set_value
    try:
        yield found
    finally:
        generator._find_carries, generator.set_value = find_carries, set_value


def _value(live: object) -> tuple[int, ...]:
    """What the frontend compares: the handles of a live value's IR, () if it has none."""
    if not code_generator._is_triton_value(live):
        return ()
    return tuple(id(handle) for handle in code_generator.flatten_values_to_ir([live]))


def _is_read_in_vain(generator: code_generator.CodeGenerator, loop: ast.For | ast.While, name: str) -> bool:
    if not _is_overwritten_first(loop, name):
        return True
    enclosing = [each for each in generator.scf_stack if isinstance(each, ast.For | ast.While) and each is not loop]
    inside = {id(node) for node in ast.walk(loop)}
    for node in ast.walk(generator.jit_fn.parse()):
        if not (isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load)):
            continue
        after = node.lineno > loop.end_lineno
        around = any(each.lineno <= node.lineno < loop.lineno for each in enclosing)
        if id(node) not in inside and (after or around):
            return True
    return False


def _is_overwritten_first(loop: ast.For | ast.While, name: str) -> bool:
    """The body's first mention of the name is an unconditional assignment that does not read it."""
    if isinstance(loop, ast.While) and any(isinstance(n, ast.Name) and n.id == name for n in ast.walk(loop.test)):
        return False
    for statement in loop.body:
        mentions = [n for n in ast.walk(statement) if isinstance(n, ast.Name) and n.id == name]
        if mentions:
            return isinstance(statement, ast.Assign) and all(isinstance(n.ctx, ast.Store) for n in mentions)
    return False
