"""Public benchmarks of unlearning, read from local files by name."""

from unilogit_kernels.unlearning.benchmarks.loading import load_benchmark
from unilogit_kernels.unlearning.benchmarks.sets import Benchmark, EvaluationSet, Generation

__all__ = ["Benchmark", "EvaluationSet", "Generation", "load_benchmark"]
