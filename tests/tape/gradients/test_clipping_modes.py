"""Which method a mode takes, and what a device is judged by."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dptorch
from dptorch.errors import ConfigurationError
from dptorch.tape.gradients import Convolution, Geometry, Outer, device_cost
from dptorch.tape.gradients.clipping_modes import MODES, get_mode
from dptorch.tape.gradients.device_cost import TYPICAL, DeviceCost, cost_of, free_bytes, measure
from dptorch.tape.recording import model_hooks

CPU = torch.device("cpu")


def outer(b: int, t: int, p: int, d: int) -> Outer:
    left, right = torch.empty(b, t, p, device="meta"), torch.empty(b, t, d, device="meta")
    return Outer(left, right, torch.Size((p, d)))


def conv(b: int, c: int, p: int, side: int) -> Convolution:
    geometry = Geometry((1, 1), (1, 1), (1, 1), (0, 0), False, 1)
    inputs = torch.empty(b, 1, c, side, side, device="meta")
    grads = torch.empty(b, 1, p, side, side, device="meta")
    return Convolution(inputs, grads, torch.Size((p, c, 3, 3)), geometry)


@pytest.mark.parametrize(
    ("form", "method"),
    [
        (outer(256, 1, 1024, 1024), "gram"),  # an MLP: forming would write 1 GiB
        (outer(8, 64, 768, 768), "gram"),
        (outer(8, 2048, 256, 256), "keep"),  # a long sequence: the gradient is smaller than it
        (conv(64, 32, 32, 32), "keep"),  # an early convolution
        (conv(64, 512, 512, 4), "gram"),  # a late one
    ],
)
def test_auto_takes_the_method_that_is_known_to_be_fast(
    form: Outer | Convolution, method: str
) -> None:
    assert MODES["auto"].choose(form.norm_methods(), TYPICAL["cpu"]).name == method


def test_auto_never_keeps_much_more_than_the_factors() -> None:
    for t in (1, 16, 64, 256, 1024):
        for p in (16, 256, 1024):
            methods = outer(8, t, p, 256).norm_methods()
            factors = next(w.kept_bytes for w in methods if w.name == "form")
            assert MODES["auto"].choose(methods, TYPICAL["cpu"]).kept_bytes <= 1.25 * factors


def test_the_papers_rule_is_of_space_and_not_of_time() -> None:
    """2 T^2 <= p d, where T (p + d) <= p d would say the other way."""
    methods = outer(8, 150, 256, 256).norm_methods()  # 45,000 <= 65,536, but 76,800 > 65,536
    assert MODES["MixGhostClip"].choose(methods, TYPICAL["cpu"]).name == "gram"
    methods = outer(8, 200, 256, 256).norm_methods()
    assert MODES["MixGhostClip"].choose(methods, TYPICAL["cpu"]).name == "form"
    assert MODES["BK-MixOpt"].choose(methods, TYPICAL["cpu"]).name == "keep"


def test_names_of_other_libraries() -> None:
    assert get_mode("default") is get_mode("non-ghost")
    assert get_mode("ghost_mixed") is get_mode("MixGhostClip")
    assert get_mode("MixOpt") is get_mode("BK-MixOpt")
    with pytest.raises(ConfigurationError, match="ghost"):
        get_mode("gost")


def test_a_device_is_measured_once_and_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = DeviceCost(2e11, 2e10)
    calls = []

    def fake(device: torch.device, dtype: torch.dtype) -> DeviceCost:
        calls.append(device)
        return found

    monkeypatch.setattr(device_cost, "measure", fake)
    for _ in range(2):
        device_cost._cost_of.cache_clear()  # as in a new process
        assert cost_of(CPU, torch.float32) == found
    assert len(calls) == 1
    [entries] = json.loads((tmp_path / "dptorch" / "device_cost.json").read_text()).values()
    assert list(entries.values()) == [{"flops_per_second": 2e11, "bytes_per_second": 2e10}]
    device_cost._cost_of.cache_clear()


def test_a_disturbed_measurement_is_neither_believed_nor_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(device_cost, "measure", lambda *_: DeviceCost(1e9, 1e10))
    device_cost._cost_of.cache_clear()
    assert cost_of(CPU, torch.float32) == TYPICAL["cpu"]
    assert not list(tmp_path.iterdir())
    device_cost._cost_of.cache_clear()


def test_a_measurement_is_of_one_thread_and_of_its_own_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What other processes take from a wall clock made most measurements incredible."""
    threads = torch.get_num_threads()
    seen = []
    real = torch.bmm
    monkeypatch.setattr(
        torch, "bmm", lambda *a: (seen.append(torch.get_num_threads()), real(*a))[1]
    )
    monkeypatch.setattr(device_cost.time, "perf_counter", lambda: pytest.fail("a wall clock"))
    measure(CPU, torch.float32)
    assert set(seen) == {1}
    assert torch.get_num_threads() == threads


def test_a_measurement_is_of_this_world() -> None:
    found = measure(CPU, torch.float32)
    assert 1e8 < found.flops_per_second < 1e14
    assert 1e7 < found.bytes_per_second < 1e13
    assert free_bytes(CPU) > 2**20


_STEPS = """
import ctypes, resource, sys
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
c.free.argtypes, c.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def step():
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    blocks = [c.malloc(2**20) for _ in range(40)]
    for block in blocks:
        c.memset(block, 1, 2**20)
    for block in blocks:
        c.free(block)
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before
c.free(c.malloc(int(sys.argv[1])))
step()
print(step())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_memory_that_a_step_frees_stays_for_the_next() -> None:
    """By page faults of a process of its own; the twin frees a block that counts for less."""

    def faults(largest: int) -> int:
        command = [sys.executable, "-S", "-c", _STEPS, str(largest)]
        return int(subprocess.run(command, env={}, capture_output=True, check=True).stdout)

    assert faults(device_cost._LARGEST_THAT_COUNTS) < faults(2**16) / 4


def test_an_engine_lets_memory_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(model_hooks, "keep_freed_memory", lambda: made.append(True))
    dptorch.PrivacyEngine(
        torch.nn.Linear(2, 2), sample_size=8, batch_size=4, steps=1, noise_multiplier=1.0
    )
    assert made
