"""Triton's interpreter, made to round as a GPU does and to leave out work that changes nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from types import FunctionType, ModuleType

import numpy as np
import torch


@functools.cache
def round_to_nearest() -> None:
    """Round to the nearest bfloat16: the interpreter truncates float32, which doubles the error and biases sums.

    Of float64 it takes the wrong bits altogether.
    """
    import triton.language as tl  # here, for Triton has to be imported after TRITON_INTERPRET is set
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    truncate = InterpreterBuilder.cast_impl

    def cast_impl(builder, source, target):
        if source.dtype.scalar in (tl.float32, tl.float64) and target.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
            return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)
        return truncate(builder, source, target)

    InterpreterBuilder.cast_impl = cast_impl


@functools.cache
def skip_repeated_work() -> None:
    """Leave out what the interpreter does over and over for the same result: most of its time.

    Results and errors stay as they are. A version of Triton without the internals in question keeps its own ways.
    """
    from triton.runtime import interpreter

    skips = _skip_overflow_checks, _patch_the_language_once_per_launch, _build_types_once, _leave_tensors_as_they_are
    for skip in skips:
        with contextlib.suppress(AttributeError, TypeError):
            skip(interpreter)


def _skip_overflow_checks(interpreter: ModuleType) -> None:
    """Integer arithmetic is repeated in 64 bits for an assertion that is only made in debug mode."""
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)


def _patch_the_language_once_per_launch(interpreter: ModuleType) -> None:
    """Each launch and each call of a device function look through Triton's language for functions to replace.

    The replacements are found once. A launch puts them in place, and takes all of them away at its end.
    """
    import triton.language as tl

    patch, no_scope = interpreter._patch_lang, interpreter._LangPatchScope()
    patched: list[tuple[ModuleType, ...]] = []  # the modules whose functions are replaced at present
    found: dict[tuple, list[tuple[object, str, object]]] = {}

    class Scope(interpreter._LangPatchScope):
        def restore(self) -> None:
            super().restore()
            patched.clear()

    launch = Scope()

    @functools.cache
    def visible_from(function: FunctionType) -> tuple[ModuleType, ...]:
        names = function.__globals__.values()
        return tuple(module for module in (tl, tl.core) if any(value is module for value in names))

    def patch_once(function: FunctionType) -> interpreter._LangPatchScope:
        modules = visible_from(function)
        if modules in patched:
            return no_scope
        key = (modules, *patched)
        if key not in found:
            scope = patch(function)
            found[key] = [(owner, name, getattr(owner, name)) for owner, name, _ in scope._changes]
            scope.restore()
        for replacement in found[key]:
            launch.set_attr(*replacement)
        patched.append(modules)
        return launch if len(patched) == 1 else no_scope

    interpreter._patch_lang = patch_once


def _build_types_once(interpreter: ModuleType) -> None:
    """The types of blocks are built, and looked up in a table that is built anew, at every operation."""
    import triton.language as tl

    numpy_type, block_type, builder = interpreter._get_np_dtype, tl.core.block_type, interpreter.InterpreterBuilder
    initialize = block_type.__init__
    numpy_types: dict[str, np.dtype] = {}
    block_types: dict[tuple, tl.block_type] = {}

    def numpy_type_by_name(kind: tl.dtype) -> np.dtype:
        name = kind.scalar.name
        if name not in numpy_types:
            numpy_types[name] = numpy_type(kind)
        return numpy_types[name]

    def block_type_by_name(element: tl.dtype, shape: tuple[int, ...]) -> tl.block_type:
        key = (element.name, *shape)
        if key not in block_types:
            built = block_type.__new__(block_type)
            initialize(built, element, shape)
            block_types[key] = built
        return block_types[key]

    def initialize_from_known(self, element: tl.dtype, shape: tuple[int, ...]) -> None:
        vars(self).update(vars(block_type_by_name(element, shape)))

    interpreter._get_np_dtype = numpy_type_by_name
    builder.get_block_ty = lambda _, element, shape: block_type_by_name(element, shape)
    block_type.with_element_ty = lambda self, element: block_type_by_name(element, self.shape)
    block_type.__init__ = initialize_from_known


def _leave_tensors_as_they_are(interpreter: ModuleType) -> None:
    """Operands go through casts and broadcasts that change nothing, and each result works out its shape anew."""
    import triton.language as tl

    semantic, tensor = interpreter.interpreter_semantic, tl.tensor
    initialize, cast, broadcast = tensor.__init__, semantic.cast, semantic.broadcast_impl_value
    shapes: dict[tuple[int, ...], tuple[object, object]] = {}
    # Of two shapes: whether the first changes, whether the second does, and the shape of the result.
    common: dict[tuple, tuple[bool, bool, tuple[int, ...]]] = {}

    def initialize_with_known_shape(self, handle, kind: tl.dtype) -> None:
        self.handle, self.type, self.dtype = handle, kind, kind.scalar
        shape = (*kind.shape,) if kind.is_block() else ()
        if shape not in shapes:
            initialize(self, handle, kind)
            shapes[shape] = self.shape, self.numel
        self.shape, self.numel = shapes[shape]

    def cast_to_another_type(value, kind: tl.dtype, *rounding, **options):
        return value if value.dtype is kind.scalar else cast(value, kind, *rounding, **options)

    def broadcast_to_another_shape(a, b):
        if a.shape is b.shape:
            return a, b
        if not (a.type.is_block() and b.type.is_block()):
            return broadcast(a, b)
        key = (*a.type.shape, None, *b.type.shape)
        if key not in common:
            both = broadcast(a, b)
            common[key] = both[0] is not a, both[1] is not b, both[0].type.shape
            return both
        a_changes, b_changes, shape = common[key]
        return stretch(a, shape) if a_changes else a, stretch(b, shape) if b_changes else b

    def stretch(value, shape):
        handle = semantic.builder.create_broadcast(value.handle, shape)
        return tensor(handle, tl.core.block_type(value.dtype, shape))

    tensor.__init__ = initialize_with_known_shape
    semantic.cast, semantic.broadcast_impl_value = cast_to_another_type, broadcast_to_another_shape
    interpreter.TritonSemantic = lambda builder: semantic  # Triton 3.6 makes another for every function
