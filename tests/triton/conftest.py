"""Makes the interpreter multiply bfloat16 right: it would take the bits of the numbers for integers."""

import os

import numpy

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    _create_dot = InterpreterBuilder.create_dot

    def _widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(numpy.uint32) << 16).view(numpy.float32), tl.float32)

    InterpreterBuilder.create_dot = lambda self, a, b, *rest: _create_dot(self, _widened(a), _widened(b), *rest)
