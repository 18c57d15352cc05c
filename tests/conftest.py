"""Shared fixtures. Progress bars are off: they are noise in a log."""

import sys
from pathlib import Path

import pytest
import torch
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).parent))  # for `import tiny`

transformers_logging.disable_progress_bar()
torch.set_num_threads(2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mistral with three adapters that have contracts, and `verbatim`, which has none."""
    import tiny

    return tiny.save_bundle(tmp_path_factory.mktemp("tiny") / "bundle")
