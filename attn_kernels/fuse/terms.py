"""Symbols for what a forward pass computes: sizes of the input, terms, and tensors that stand for terms.

A term says what a value is, whatever its layout: ``sigmoid(fc(('fc2',), relu(...)))``. Two equal terms are one object,
so that ``is`` compares whole formulas. Every value is read as (N, C, H, W), with 1 for what is reduced or missing.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar
from weakref import WeakValueDictionary


class Refused(Exception):
    """Raised for what is not understood whole or has no kernel; the message continues a sentence about the module."""


class Term:
    """An operation on terms and constants; equal ones are the same object.

    ``op`` is the name of a function of PyTorch as a rule. ``("fc", path, t)``, ``("conv", path, t)`` and so on are
    calls of the layer at ``path``; ``("mean", t, {"H", "W"})`` and the like reduce the dimensions that they name.
    """

    __slots__ = ("__weakref__", "args", "digest", "op")
    _all: ClassVar[WeakValueDictionary[tuple, Term]] = WeakValueDictionary()

    def __new__(cls, op: str, *args: object) -> Term:
        key = op, args, tuple(map(type, args))  # 1, 1.0 and True are equal
        term = cls._all.get(key)
        if term is None:
            term = object.__new__(cls)
            term.op, term.args, term.digest = op, args, _digest(op, *args)
            cls._all[key] = term
        return term

    def __repr__(self) -> str:
        return f"{self.op}({', '.join(map(str, self.args))})" if self.args else self.op

    def __reduce__(self):
        return Term, (self.op, *self.args)

    def parts(self) -> list[Term]:
        """The term and all that it is made of, operands before their users."""
        seen: dict[Term, None] = {}
        todo = [(self, False)]
        while todo:
            term, ready = todo.pop()
            if ready:
                seen[term] = None
            elif term not in seen:
                todo.append((term, True))
                todo += [(a, False) for a in term.args if isinstance(a, Term)]
        return list(seen)

    def replace(self, old: Term, new: Term) -> Term:
        """The term with ``new`` wherever ``old`` was."""
        found = {old: new}
        for term in self.parts():
            if term not in found:
                args = tuple(found[a] if isinstance(a, Term) else a for a in term.args)
                found[term] = unordered(term.op, *args) if term.op in ("add", "mul") else Term(term.op, *args)
        return found[self]


def unordered(op: str, *args: Term) -> Term:
    """A term whose operands may change places.

    Their order follows from what they are, not from when they were made: a module and its copy give the same plan.
    """
    return Term(op, *sorted(args, key=lambda t: t.digest))


def _digest(*values: object) -> str:
    """A number for an operation or a set of dimensions, the same in every process."""
    words = (
        v.digest if isinstance(v, Term) else _digest(*sorted(v)) if isinstance(v, frozenset) else repr(v)
        for v in values
    )
    return hashlib.sha1(" ".join(words).encode(), usedforsecurity=False).hexdigest()


def number(value: float) -> Term:
    return Term("number", float(value))


X = Term("x")


@dataclass(frozen=True, slots=True)
class Size:
    """``factor`` times the product of ``symbols``, each the size of a dimension: N, C, H or W and whose it is."""

    factor: int
    symbols: tuple[str, ...] = ()

    def __mul__(self, other: Size) -> Size:
        return Size(self.factor * other.factor, tuple(sorted(self.symbols + other.symbols)))


ONE = Size(1)


def size(value: int | Size) -> Size:
    return value if isinstance(value, Size) else Size(value)


def product(sizes) -> Size:
    result = ONE
    for s in sizes:
        result = result * s
    return result


@dataclass(frozen=True, slots=True)
class Number:
    """A number that depends on sizes: nothing can be asked about it, but tensors may be computed with it."""

    term: Term


class Storage:
    """The memory that a tensor shares with its views."""

    __slots__ = ("fresh", "is_input", "overwritten", "used")

    def __init__(self, is_input: bool = False, fresh: bool = True):
        self.is_input = is_input
        self.fresh = fresh and not is_input
        """Whether an operation that is understood has made it, so that nothing else lies in it."""
        self.used = False
        """Whether an operation has read it: autograd may keep it then, and refuses a later write."""
        self.overwritten = False


class Value:
    """A tensor: its term, its shape, the memory that it lies in, and its shape before it was expanded."""

    __slots__ = ("item", "natural", "shape", "step", "storage", "term")

    def __init__(self, term: Term, shape, storage: Storage | None = None, natural=None):
        self.term = term
        self.shape: tuple[Size, ...] = tuple(shape)
        self.storage = storage or Storage()
        self.natural: tuple[Size, ...] = self.shape if natural is None else tuple(natural)
        self.step: int | None = None
        """In a block, which of its steps made it, and which item of the step's result it is."""
        self.item: int | None = None

    @property
    def expanded(self) -> bool:
        return self.natural != self.shape


class Unknown:
    """What can be passed by but not used: the indices of a maximum, whether the module is training."""

    def __init__(self, what: str):
        self.what = what
