"""The seam inside a backend, between what serves (names, leases, questions, verdicts) and what computes sequences."""

from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any, Protocol

from loraplex.bundle import AdapterSource
from loraplex.engine.engine import Steps
from loraplex.engine.sequence import EngineRequest
from loraplex.executors.capabilities import Capabilities


class Computation(Protocol):
    """Takes requests from any thread and resolves every one that it accepted exactly once. `Engine` is one."""

    @property
    def alive(self) -> bool: ...

    @property
    def num_waiting(self) -> int:
        """Sequences that were accepted and do not run yet. Cheap, as all figures are."""
        ...

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens to compute for these sequences."""
        ...

    @property
    def num_running(self) -> int: ...

    @property
    def max_step_tokens(self) -> int:
        """Tokens that one forward pass computes at most."""
        ...

    @property
    def num_blocks(self) -> tuple[int, int]:
        """Of K/V: all, and those that are free or could be."""
        ...

    @property
    def wait_s(self) -> float:
        """How long what waits now will take."""
        ...

    @property
    def steps(self) -> Steps:
        """What ran so far."""
        ...

    def cost(self, request: EngineRequest) -> int:
        """Tokens to compute for a request, as far as is known before it is submitted. Any thread may ask."""
        ...

    def submit(self, request: EngineRequest) -> None:
        """Its future resolves. Returns at once, whatever the computation is busy with. NotReadyError: the request was
        not accepted."""
        ...

    def close(self) -> None:
        """Finish what was accepted, then stop. Safe to call twice."""
        ...


class Executor(Protocol):
    """One base with adapters in slots, which are small integers that the caller gives out. Not all of it is torch: one
    that runs in other processes takes the folders, and token ids."""

    @property
    def name(self) -> str:
        """What `--backend` calls it."""
        ...

    @property
    def capabilities(self) -> Capabilities: ...

    def max_model_len(self, config: Any) -> int:
        """Tokens that a prompt may have; `config` is the base's PreTrainedConfig. Before it is loaded."""
        ...

    def load(self, base: Path, config: Any, adapters: Seq[AdapterSource]) -> Computation:
        """Read the base's weights. adapters: those that will come at least. UnsupportedModelError: the base cannot be
        served."""
        ...

    @property
    def max_slots(self) -> int | None:
        """As many adapters have a place, whatever their size; None where memory and the options say how many."""
        ...

    @property
    def item_bytes(self) -> int:
        """Of one number of an adapter on the device. From here on: once it is loaded."""
        ...

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens with which a text ends."""
        ...

    def parameter(self, name: str) -> Any:
        """The base's own tensor, such as "lm_head.weight"; None where there is none at hand."""
        ...

    def set_slot(self, slot: int, folder: Path, weights: Any) -> None:
        """Place an adapter: `weights` (AdapterWeights), which were read from `folder`. While others are computed, on
        one thread, which `clear_slot` runs on, too."""
        ...

    def clear_slot(self, slot: int) -> None:
        """No sequence is under the slot."""
        ...

    def give_back(self) -> None:
        """What was freed goes back to the machine."""
        ...

    def close(self) -> None:
        """Free the model. Its computation is closed by then."""
        ...
