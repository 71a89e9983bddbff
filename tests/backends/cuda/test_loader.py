"""Where a CUDA kernel comes from, with a driver that is not there."""

from __future__ import annotations

import ctypes
import hashlib
import multiprocessing
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from unilogit_kernels.backends import cuda, registry
from unilogit_kernels.backends.cuda import cache, driver, sources
from unilogit_kernels.backends.cuda.loader import Loader, Target, target_for
from unilogit_kernels.backends.cuda.sources import Kernel
from unilogit_kernels.cli import doctor

UPDATE = Kernel("LOG_ODDS_UPDATE", ("Bfloat16", "plain"))
MERGE = Kernel("MERGE_PARTS")


@dataclass
class FakeDriver:
    """A driver that compiles to a text and loads what it has compiled."""

    version: str = "13.0"
    architectures: Sequence[int] = (75, 80, 90)
    takes_fatbin: bool = True
    compiled: list[tuple[str, str]] = field(default_factory=list)
    loaded: list[tuple[str, str]] = field(default_factory=list)

    def compiler_version(self) -> str:
        return self.version

    def compiler_architectures(self) -> Sequence[int]:
        return self.architectures

    def compile(self, source: str, headers: Path, target: Target) -> bytes:
        assert (headers / "kernels.h").is_file()
        self.compiled.append((source, target.architecture))
        return f"{target.architecture} of {source}".encode()

    def load(self, binary: bytes, kind: str, name: str) -> Any:
        if kind == "fatbin" and not self.takes_fatbin:
            raise RuntimeError("no binary for this GPU")
        if kind != "fatbin" and b"#include" not in binary:
            raise RuntimeError("not a binary")
        self.loaded.append((kind, name))
        return kind, name, binary


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and no fatbin."""
    monkeypatch.setenv(cache.DIRECTORY_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "fatbin", lambda: None)
    cache._warn_once.cache_clear()
    return tmp_path / "cache"


@pytest.fixture
def fatbin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "kernels.fatbin"
    path.write_bytes(b"fat")
    monkeypatch.setattr(sources, "fatbin", lambda: path)
    return path


def entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


class TestLoader:
    def test_a_kernel_is_compiled_once_in_a_process(self) -> None:
        fake = FakeDriver()
        loader = Loader(fake)
        assert loader.function(UPDATE, 90) is loader.function(UPDATE, 90)
        assert fake.compiled == [(UPDATE.source, "sm_90")]
        assert fake.loaded == [("cubin", "log_odds_update_Bfloat16_plain")]

    def test_the_next_process_finds_it_in_the_cache(self, folder: Path) -> None:
        first, second = FakeDriver(), FakeDriver()
        binary = Loader(first).function(UPDATE, 90)[2]
        assert Loader(second).function(UPDATE, 90)[2] == binary
        assert second.compiled == []
        assert len(entries(folder)) == 1

    @pytest.mark.parametrize(
        "other",
        ["kernel", "architecture", "compiler", "sources"],
        ids=lambda name: f"another {name}",
    )
    def test_what_differs_is_not_mixed_up(
        self, other: str, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Loader(FakeDriver()).function(UPDATE, 90)
        fake = FakeDriver(version="13.1" if other == "compiler" else "13.0")
        if other == "sources":
            monkeypatch.setattr(sources, "digest", lambda: "changed")
        kernel = MERGE if other == "kernel" else UPDATE
        Loader(fake).function(kernel, 80 if other == "architecture" else 90)
        assert len(fake.compiled) == 1
        assert len(entries(folder)) == 2

    @pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "of another driver"])
    def test_a_corrupt_entry_is_made_anew(self, damage: str, folder: Path) -> None:
        Loader(FakeDriver()).function(UPDATE, 90)
        (path,) = entries(folder)
        content = path.read_bytes()
        bad = {
            "cut": content[:-1],
            "flipped": content[:40] + bytes([content[40] ^ 1]) + content[41:],
            "emptied": b"",
            "of another driver": hashlib.sha256(b"?").digest() + b"?",
        }
        path.write_bytes(bad[damage])
        fake = FakeDriver()
        assert Loader(fake).function(UPDATE, 90)[2].endswith(UPDATE.source.encode())
        assert len(fake.compiled) == 1
        assert path.read_bytes() == content

    def test_a_read_only_cache_is_said_once(self, folder: Path) -> None:
        folder.parent.mkdir(exist_ok=True)
        folder.write_text("a file where the folder should be")
        fake = FakeDriver()
        with pytest.warns(UserWarning, match=cache.DIRECTORY_VARIABLE):
            Loader(fake).function(UPDATE, 90)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Loader(fake).function(MERGE, 90)
        assert len(fake.compiled) == 2

    def test_processes_may_compile_the_same_at_once(self, folder: Path) -> None:
        context = multiprocessing.get_context("fork")
        count = 4
        start, results = context.Barrier(count), context.Queue()

        def first_use() -> None:
            fake = FakeDriver()
            start.wait()
            Loader(fake).function(UPDATE, 90)
            results.put(Loader(fake).function(UPDATE, 90)[2])

        processes = [context.Process(target=first_use) for _ in range(count)]
        for process in processes:
            process.start()
        binaries = {results.get(timeout=60) for _ in processes}
        for process in processes:
            process.join()
        assert len(binaries) == 1
        (path,) = entries(folder)
        assert not path.name.startswith(".")
        fake = FakeDriver()
        Loader(fake).function(UPDATE, 90)
        assert fake.compiled == []

    def test_the_fatbin_comes_first(self, fatbin: Path) -> None:
        fake = FakeDriver()
        assert Loader(fake).function(UPDATE, 90) == ("fatbin", UPDATE.name, b"fat")
        assert fake.compiled == []

    def test_a_refused_fatbin_is_said_once(self, fatbin: Path) -> None:
        fake = FakeDriver(takes_fatbin=False)
        loader = Loader(fake)
        with pytest.warns(UserWarning, match=r"no binary for this GPU.*NVRTC compiles"):
            loader.function(UPDATE, 90)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loader.function(MERGE, 90)
        assert [kind for kind, _ in fake.loaded] == ["cubin", "cubin"]

    def test_unknown_architectures_get_ptx(self) -> None:
        fake = FakeDriver()
        Loader(fake).function(UPDATE, 121)
        assert fake.compiled == [(UPDATE.source, "compute_90")]
        assert fake.loaded == [("ptx", UPDATE.name)]
        assert target_for(89, fake.architectures) == Target("ptx", "compute_80")
        with pytest.raises(RuntimeError, match="sm_75 and newer, and the GPU is sm_61"):
            target_for(61, fake.architectures)

    def test_without_nvrtc_the_reason_is_told(self) -> None:
        class WithoutCompiler(FakeDriver):
            def compiler_architectures(self) -> Sequence[int]:
                raise RuntimeError("NVRTC cannot be loaded")

        with pytest.raises(RuntimeError, match="NVRTC cannot be loaded"):
            Loader(WithoutCompiler()).function(UPDATE, 90)


class TestAvailability:
    @pytest.fixture
    def gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A GPU as far as torch is asked."""
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the backend is there")
    def test_without_a_driver_nothing_of_cuda_is_imported(self) -> None:
        code = (
            "import sys; from unilogit_kernels.backends import cuda; "
            "print(cuda.unavailable_reason()); print('cuda.core' in sys.modules)"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "no NVIDIA GPU" in result.stdout
        assert result.stdout.endswith("False\n"), result.stderr

    @pytest.mark.usefixtures("gpu")
    def test_old_gpus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 0))
        assert "a GPU has compute capability 7.0, below 7.5" in str(cuda.unavailable_reason())

    @pytest.mark.usefixtures("gpu")
    def test_bindings_and_compiler_are_needed(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(driver, "missing_bindings", lambda: None)
        monkeypatch.setattr(driver, "missing_compiler", lambda: "no NVRTC")
        assert cuda.unavailable_reason() == "no NVRTC"
        monkeypatch.setattr(sources, "fatbin", lambda: tmp_path / "kernels.fatbin")
        assert cuda.unavailable_reason() is None
        monkeypatch.setattr(driver, "missing_bindings", lambda: "no cuda-core")
        assert cuda.unavailable_reason() == "no cuda-core"

    def test_missing_bindings_name_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "cuda.core", None)
        assert "pip install 'unilogit-kernels[cuda]'" in str(driver.missing_bindings())

    def test_missing_nvrtc_names_the_extra(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "cuda.bindings", None)
        driver.CudaDriver.compiler_version.cache_clear()
        assert "NVRTC" in str(driver.missing_compiler())
        assert "unilogit-kernels[cuda]" in str(driver.missing_compiler())

    def test_doctor_shows_the_reason(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cuda, "unavailable_reason", lambda: "as the test wants")
        assert doctor.diagnose()["backends"]["cuda"] == "as the test wants"


class TestSelection:
    @pytest.fixture(autouse=True)
    def _fresh(self) -> Iterator[None]:
        registry._warn_once.cache_clear()
        yield
        registry._warn_once.cache_clear()

    def test_takes_over_from_triton_with_one_warning(self, monkeypatch: pytest.MonkeyPatch) -> None:
        missing = {"triton": "triton cannot be imported"}
        monkeypatch.setattr(registry, "unavailable_reason", missing.get)
        with pytest.warns(UserWarning, match="runs its cuda backend, since the 'triton'"):
            assert registry.choose(None, "cuda", torch.bfloat16) == "cuda"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert registry.choose(None, "cuda", torch.bfloat16) == "cuda"
            assert registry.choose("cuda", "cuda", torch.bfloat16) == "cuda"
        assert registry.choose(None, "cuda", torch.float64) == "eager"

    def test_both_missing_leaves_eager(self, monkeypatch: pytest.MonkeyPatch) -> None:
        missing = {"triton": "no triton", "cuda": "no NVRTC"}
        monkeypatch.setattr(registry, "unavailable_reason", missing.get)
        with pytest.warns(UserWarning, match=r"eager backend, since .*no triton; .*no NVRTC"):
            assert registry.choose(None, "cuda", torch.bfloat16) == "eager"

    def test_runs_on_cuda_tensors_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(registry, "unavailable_reason", lambda name: None)
        with pytest.raises(ValueError, match="'cuda' runs on cuda tensors, got cpu"):
            registry.choose("cuda", "cpu", torch.float32)
        with pytest.raises(TypeError, match=r"'cuda' takes .* got torch\.float64"):
            registry.choose("cuda", "cuda", torch.float64)


def test_arguments_reach_the_kernel_as_it_declares_them() -> None:
    """The launch itself needs a GPU; that `cuda.core` packs our arguments rightly does not."""
    handler = pytest.importorskip("cuda.core._kernel_arg_handler", reason="needs cuda-core")
    tensor = torch.zeros(3)
    arguments = [tensor, None, ctypes.c_int64(-5), ctypes.c_int32(-7), ctypes.c_float(1.5)]
    holder = handler.ParamHolder(tuple(driver._value(argument) for argument in arguments))
    pointers = ctypes.cast(holder.ptr, ctypes.POINTER(ctypes.c_void_p))
    types: list[Any] = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int32,
        ctypes.c_float,
    ]
    values = [kind.from_address(pointers[i] or 0).value for i, kind in enumerate(types)]
    assert values == [tensor.data_ptr(), None, -5, -7, 1.5]
