"""What a CUDA graph is, without a GPU: operators recorded with the very tensors they had, run again on the same."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loraplex.executors import native
from loraplex.model import step_memo
from loraplex.model.graphs import Capture


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


class Recorded:
    """A stand-in for loraplex.model.graphs.Capture that counts what it captures and replays."""

    def __init__(self) -> None:
        self.num_captured = self.num_replayed = 0

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        self.num_captured += 1
        recorder = Recorder()
        with recorder:
            function()

        def replay() -> None:
            self.num_replayed += 1
            recorder.replay()

        return replay

    def prove_over(self) -> None:
        """Nothing is ever under way."""


@contextmanager
def captures(capture: Capture | None = None, *, at: int) -> Iterator[None]:
    """With `cuda_graphs`, steps are captured here, too, the `at`-th time that they come."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "CUDACapture", lambda device: capture or Recorded())
        patch.setattr(step_memo, "CAPTURED_AT", at)
        yield


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _storage(tensor: torch.Tensor) -> int:
    if tensor.layout is torch._mkldnn:  # type: ignore[attr-defined]  # a packed weight, which nobody writes
        return id(tensor)
    return int(tensor.untyped_storage()._cdata)
