"""What threads share in MLX: the default device, and arrays once they are evaluated."""

from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from pathlib import Path
from time import sleep

import mlx.core as mx
import pytest

from bdh_mlx import BDH, BDHConfig
from bdh_mlx.device import SharedDevice

CPU, GPU = mx.Device(mx.cpu), mx.Device(mx.gpu)


@pytest.fixture
def default(monkeypatch: pytest.MonkeyPatch) -> list[mx.Device]:
    """The devices that were MLX's default one after the other, on a machine that has two."""
    devices = [GPU]
    monkeypatch.setattr(mx, "default_device", lambda: devices[-1])
    monkeypatch.setattr(mx, "set_default_device", devices.append)
    return devices


def test_threads_share_a_device_and_the_last_puts_the_former_back(default: list[mx.Device]) -> None:
    computing_on = SharedDevice()
    first, second = ExitStack(), ExitStack()
    for thread in (first, second):
        thread.enter_context(computing_on(CPU))
    first.close()
    assert default == [GPU, CPU]
    second.close()
    assert default == [GPU, CPU, GPU]


def test_a_thread_waits_for_another_device_and_is_not_overtaken(default: list[mx.Device]) -> None:
    computing_on, seen = SharedDevice(), []

    def compute(device: mx.Device) -> None:
        with computing_on(device):
            seen.append((device, default[-1]))

    with ThreadPoolExecutor(2) as pool, computing_on(GPU):
        pool.submit(compute, CPU)
        for _ in range(3000):
            if not computing_on._queue.locked():
                sleep(0.001)
        overtaker = pool.submit(compute, GPU)
        wait([overtaker], timeout=0.1)
        assert seen == []
    assert seen == [(CPU, CPU), (GPU, GPU)]


def test_a_device_is_put_back_after_an_error(default: list[mx.Device]) -> None:
    computing_on = SharedDevice()
    with pytest.raises(RuntimeError), computing_on(CPU):
        raise RuntimeError
    with computing_on(GPU):
        assert default == [GPU, CPU, GPU, GPU]


def test_a_module_that_one_thread_loaded_writes_on_another(tmp_path: Path) -> None:
    config, path = BDHConfig(n_layer=1, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4), tmp_path / "saved.safetensors"
    BDH(config).save_weights(path)
    prompt = mx.array([[66, 68]])
    with ThreadPoolExecutor(1) as pool:
        module = pool.submit(lambda: BDH(config).load_weights(path)).result()
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(module.generate, prompt, 4, 0.0).result()
    assert written.tolist() == module.generate(prompt, 4, 0.0).tolist()
