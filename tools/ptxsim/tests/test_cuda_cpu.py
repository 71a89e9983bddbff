"""CUDA C++ compiled for the CPU: plain, and under sanitizers that must catch every seeded bug."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptxsim import PtxError
from ptxsim.cuda_cpu import Sanitizer, build, run

pytestmark = pytest.mark.prove
SELFTEST = Path(__file__).with_name("selftest.cpp")
IN_SEQUENCE, RANDOM = "0", "7"


@pytest.mark.parametrize("sanitizer", ["none", "address", "thread"])
def test_correct_kernels_pass(sanitizer: Sanitizer, tmp_path: Path) -> None:
    build(SELFTEST, tmp_path / "selftest", sanitizer=sanitizer)
    for seed in (IN_SEQUENCE, RANDOM):
        done = run(tmp_path / "selftest", seed)
        assert (done.returncode, done.stdout) == (0, "correct\n"), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("bug", "sanitizer", "match"),
    [
        (1, "thread", "data race"),
        (2, "thread", "data race"),
        (3, "thread", "data race"),
        (4, "address", "heap-buffer-overflow"),
        (5, "none", "divergent barrier"),
    ],
)
def test_bugs_are_caught(bug: int, sanitizer: Sanitizer, match: str, tmp_path: Path) -> None:
    build(SELFTEST, tmp_path / "selftest", sanitizer=sanitizer, options=[f"-DBUG={bug}"])
    for seed in (IN_SEQUENCE, RANDOM):
        done = run(tmp_path / "selftest", seed)
        assert done.returncode != 0
        assert match in done.stdout + done.stderr


def test_errors_of_the_compiler_are_shown(tmp_path: Path) -> None:
    source = tmp_path / "wrong.cpp"
    source.write_text("int main() { return undeclared; }")
    with pytest.raises(PtxError, match="undeclared"):
        build(source, tmp_path / "wrong")
