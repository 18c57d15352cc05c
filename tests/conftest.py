"""Shared fixtures. Progress bars are off: they are noise in a log."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).parent))  # for `import tiny` and `import serving`

import serving
import tiny

transformers_logging.disable_progress_bar()
# A shell starts what runs in its background with SIGINT ignored, which the processes that we interrupt would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)
# The models are tiny: threads that wait for each other would take most of the time, here and in the servers.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available() and "LORAPLEX_GPU_TESTS" not in os.environ:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tests in tests/gpu compute. `LORAPLEX_GPU_TESTS=cpu` rehearses them: the CPU is compared with itself,
    and CUDA's graphs have a stand-in, which shows that the tests themselves run."""
    return torch.device(os.environ.get("LORAPLEX_GPU_TESTS", "cuda"))


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """The device, for a test that asks about the device's memory or graphs."""
    if device.type != "cuda":
        pytest.skip("there is nothing to rehearse on a CPU")
    return device


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Async tests, marked `anyio`, run on asyncio."""
    return "asyncio"


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mistral with three adapters that have contracts, and `verbatim`, which has none."""
    return tiny.save_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture(scope="session")
def tiny_server(tiny_bundle: Path) -> Iterator[serving.Server]:
    """The tiny bundle served in fp32 for all tests that ask over HTTP and stop nothing."""
    with serving.serve(tiny_bundle, "--dtype", "float32") as server:
        yield server


@pytest.fixture
def http(tiny_server: serving.Server) -> Iterator[httpx.Client]:
    with serving.client(tiny_server) as client:
        yield client


@pytest.fixture(scope="session")
def demo_bundle() -> Path:
    return serving.ROOT / "examples" / "support_desk" / "bundle"
