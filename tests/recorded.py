"""What a CUDA graph is, without a GPU: operators recorded with the very tensors they had, run again on the same."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loraplex.backends import native
from loraplex.model import multi_lora
from loraplex.model.cuda_graphs import Capture


class Recorder(TorchDispatchMode):
    """Records what runs under it. What existed before is not changed, only later by `replay`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls: list[tuple[Any, Any, Any, Any]] = []
        self._own: set[int] = set()  # storages that came into being here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        changed = [
            arg
            for arg, of in zip(args, func._schema.arguments, strict=False)
            if of.alias_info and of.alias_info.is_write
        ]
        if all(_storage(tensor) in self._own for tensor in changed):
            result = func(*args, **kwargs)
            given = {_storage(tensor) for tensor in _tensors((args, kwargs))}
            self._own |= {_storage(tensor) for tensor in _tensors(result)} - given
        else:
            [result] = changed
        self._calls.append((func, args, kwargs, None if changed else result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self._calls:
            again = func(*args, **kwargs)
            for then, now in zip(_tensors(result), _tensors(again), strict=False):
                if _storage(then) != _storage(now):  # else a view, which sees what changed
                    then.copy_(now)


def recorded(function: Callable[[], None]) -> Callable[[], None]:
    """As loraplex.model.cuda_graphs.Capture."""
    recorder = Recorder()
    with recorder:
        function()
    return recorder.replay


@contextmanager
def captures(capture: Capture = recorded, *, at: int) -> Iterator[None]:
    """With `cuda_graphs`, steps are captured here, too, the `at`-th time that they come."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "CUDACapture", lambda device: capture)
        patch.setattr(multi_lora, "CAPTURED_AT", at)
        yield


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
