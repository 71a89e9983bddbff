"""The C++ row kernels."""
