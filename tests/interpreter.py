"""Triton's interpreter, made cheaper for the tests: the same numbers in a third of the time.

Most of its time goes into bookkeeping, not arithmetic: it builds types and shapes anew for every value of every
program, prepares `triton.language` anew at every call from a kernel, and repeats every integer operation in 64 bits to
see whether it overflowed, of which it then says nothing. The functions below remember the first two; the third runs,
and speaks, within `overflow_checked` only.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def speed_up() -> None:
    """Patch the interpreter of this process; call it once, before a kernel is defined or launched."""
    _patch_once_a_launch()
    _share_types()
    _share_shapes()
    interpreter._get_np_dtype = _by_name(interpreter._get_np_dtype)
    check_overflow(False)


def check_overflow(wanted: bool) -> None:
    """Whether kernels that run from now on are checked for integer overflow."""
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, debug=wanted, sanitize_overflow=wanted)


@contextlib.contextmanager
def overflow_checked() -> Iterator[None]:
    """Within it an integer operation of a kernel that leaves its type's range raises an `InterpreterError`."""
    check_overflow(True)
    try:
        yield
    finally:
        check_overflow(False)


def _patch_once_a_launch() -> None:
    """Let the interpreter prepare `triton.language` once a launch, by setting again what it set the first time.

    By itself it looks through all members of `triton.language` at every launch, and at every call of a function from a
    kernel. The latter finds something to do once for each module, and what it does then is never undone.
    """
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    # This module, like those of kernels, sees `triton.language` as `tl`.
    scope = patch(_patch_once_a_launch)
    changes = [(of, name, was, getattr(of, name)) for of, name, was in scope._changes]
    scope.restore()
    new_scope = type(scope)
    launching = called = False
    left: set[int] = set()

    def patch_once(fn: Any) -> Any:
        nonlocal called
        if launching and called:
            module = id(fn.__globals__)
            if module not in left:
                left.add(module)
                patch(fn)
            return None
        called = True
        if fn.__globals__.get("tl") is not tl:
            return patch(fn)
        scope = new_scope()
        for of, name, was, becomes in changes:
            if getattr(of, name, was) is was:  # else a test has planted something
                scope.set_attr(of, name, becomes)
        return scope

    def launch_afresh(self: Any, *arguments: Any, **keywords: Any) -> Any:
        nonlocal launching, called
        launching, called = True, False
        try:
            return launch(self, *arguments, **keywords)
        finally:
            launching = called = False

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_afresh


def _by_name(function: Any) -> Any:
    """Call a function of a type once for each name: to hash a type costs more than to find what it is in NumPy."""
    known: dict[str, np.dtype] = {}

    @functools.wraps(function)
    def remembered(of: Any) -> np.dtype:
        found = known.get(of.name)
        if found is None:
            found = known[of.name] = function(of)
        return found

    return remembered


def _share_types() -> None:
    """Check and name the type of a block once for each element type and shape, and compare a type to itself by `is`."""
    create, equal = tl.core.block_type.__init__, tl.core.dtype.__eq__
    known: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}

    def create_once(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, tuple([s.value if type(s) is tl.constexpr else s for s in shape])
        attributes = known.get(key)
        if attributes is None:
            create(self, element_ty, shape)
            known[key] = self.__dict__.copy()
        else:
            self.__dict__.update(attributes)

    tl.core.block_type.__init__ = create_once
    tl.core.dtype.__eq__ = lambda self, other: self is other or equal(self, other)


def _share_shapes() -> None:
    """Build the shape that a tensor shows to kernels, a tuple of constants, once for each shape."""
    create = tl.tensor.__init__
    known: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def create_with_known_shape(self: Any, handle: Any, type: Any) -> None:
        sizes = type.shape if type.is_block() else ()
        constants = known.get(sizes)
        if constants is None:
            create(self, handle, type)
            known[sizes] = self.shape, self.numel
        else:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = constants

    tl.tensor.__init__ = create_with_known_shape
