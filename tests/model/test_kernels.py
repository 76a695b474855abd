"""The Triton kernels: compiled for GPUs that need not be present, and run by ``kernel_checks``."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import anysplade
from anysplade.model import pooling

HERE = Path(__file__).parent
SOURCE = Path(anysplade.__file__).parents[1]

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


def check_kernels(interpret: str, seconds: int) -> None:
    """Run ``kernel_checks`` in a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    path = os.pathsep.join([str(SOURCE), str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": interpret, "PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    plugins = ["-p", "pytest_timeout", "-p", "no:cacheprovider"]  # what others load takes seconds
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", *plugins, str(HERE / "kernel_checks.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@needs_triton
def test_in_the_interpreter():
    check_kernels("1", 280)


@needs_triton
@pytest.mark.gpu
@pytest.mark.timeout(900)  # most of it compiles
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu():
    check_kernels("0", 880)


class Recorder:
    """In place of a kernel: keeps the arguments with which it is launched."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *arguments, **settings: self.launches.append((self.kernel, arguments, settings))


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET is set: nothing is compiled")
@pytest.mark.parametrize("capability, terms", [(80, 128), (90, 256)])
def test_compiles_for_a_gpu_and_keeps_its_sums_in_registers(capability, terms, monkeypatch, tmp_path):
    """Every launch of a training step, with Triton's own assembler; sums that do not fit into registers would be slow."""
    from triton import compile, knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from anysplade.model import kernel_pooling

    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    launches: list[tuple] = []
    for name in ("largest_logits", "count_entries", "list_by_token", "list_by_term", "sum_entries"):
        monkeypatch.setattr(kernel_pooling, name, Recorder(getattr(kernel_pooling, name), launches))
    tile = kernel_pooling.tile
    monkeypatch.setattr(kernel_pooling, "tile", lambda hidden: tile(hidden)._replace(terms=terms))
    hidden, weight, bias = (torch.ones(*shape, dtype=torch.bfloat16) for shape in ((4, 128, 768), (3072, 768), (3072,)))
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    options = pooling.PoolOptions(1, torch.bfloat16, True, None)
    kernel_pooling.KernelMaxPool.apply(*leaves, torch.ones(4, 128), options).sum().backward()
    assert len(launches) == 6

    types = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}
    for kernel, arguments, settings in launches:
        options = {name: settings.pop(name) for name in ("num_warps", "num_stages") if name in settings}
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | settings
        signature = {name: types[v.dtype] if isinstance(v, torch.Tensor) else "i32" for name, v in given.items()}
        constants = {name: v for name, v in given.items() if v is None or name in settings}
        signature |= dict.fromkeys(constants, "constexpr")
        aligned = [name for name, v in given.items() if isinstance(v, torch.Tensor) or (isinstance(v, int) and v % 16 == 0)]
        attributes = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in aligned if n not in constants}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
        compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert compiled.metadata.shared <= {80: 99, 90: 227}[capability] * 1024, kernel.__name__
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", cubin]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "STACK:0 " in usage, (kernel.__name__, usage)
        if kernel.__name__ in ("largest_logits", "sum_entries"):
            assert {80: "mma.sync", 90: "wgmma.mma_async"}[capability] in compiled.asm["ptx"], kernel.__name__


def test_a_cpu_takes_the_path_of_torch():
    assert pooling._max_pool(torch.ones(1, 2, 4), torch.ones(5, 4), None) is pooling._MaxPool


@needs_triton
def test_a_gpu_on_which_triton_fails_is_named_once(monkeypatch, caplog):
    from anysplade.model import kernel_pooling

    def fail(device):
        raise RuntimeError("Failed to find C compiler")

    pooling._kernels_run.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernel_pooling, "check_device", fail)
    try:
        assert not any(pooling._kernels_run(torch.device("cuda", 0)) for _ in range(3))
    finally:
        pooling._kernels_run.cache_clear()
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "pooling runs without Triton kernels, which is slower but gives the same result: Failed to find C compiler"
    ]
