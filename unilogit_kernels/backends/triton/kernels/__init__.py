"""What is compiled: the maths of a tile, the walk over a row, and the kernels made of them.

No `from __future__ import annotations` in these files, since Triton reads annotations as objects;
and values from outside a kernel must be constexpr.
"""
