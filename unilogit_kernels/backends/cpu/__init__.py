"""Row kernels for CPUs in C++ (`csrc/cpu`): a shared library, called through ctypes."""
