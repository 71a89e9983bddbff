"""Kernels by themselves, of every backend."""
