"""The CUDA row kernels on a CPU."""
