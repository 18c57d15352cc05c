"""The seam between the service (names, leases, evaluations, verdicts) and what computes sequences."""

from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any, Protocol

from loraplex.bundle import AdapterSource
from loraplex.engine.engine import Steps
from loraplex.engine.sequence import EngineRequest
from loraplex.executors.capabilities import Capabilities


class Computation(Protocol):
    """Computes requests. Takes them from any thread and resolves every accepted one exactly once. `Engine` is one."""

    @property
    def alive(self) -> bool: ...

    @property
    def num_waiting(self) -> int:
        """Sequences that were accepted and do not run yet. Cheap to read, like all figures here."""
        ...

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens to compute for the waiting sequences."""
        ...

    @property
    def num_running(self) -> int: ...

    @property
    def max_step_tokens(self) -> int:
        """The most tokens that one forward pass computes."""
        ...

    @property
    def num_blocks(self) -> tuple[int, int]:
        """K/V blocks: how many there are, and how many are free or can be evicted."""
        ...

    @property
    def wait_s(self) -> float:
        """Estimated seconds until the waiting sequences are computed."""
        ...

    @property
    def steps(self) -> Steps:
        """Totals over all steps that ran."""
        ...

    def cost(self, request: EngineRequest) -> int:
        """Return the estimated tokens to compute for a request that is not submitted yet. Any thread may call."""
        ...

    def submit(self, request: EngineRequest) -> None:
        """Accept a request; its future resolves exactly once. Returns at once, however busy the computation is. Raises
        NotReadyError where the request is not accepted."""
        ...

    def close(self) -> None:
        """Finish all accepted requests, then stop. Safe to call twice."""
        ...


class Executor(Protocol):
    """One base with adapters in slots. The caller gives out the slots, which are small integers.

    `name`, `capabilities`, `max_model_len` and `close` may be used at any time, the other members only after `load`.
    An executor need not use torch: one that runs in other processes takes adapter folders and token ids.
    """

    @property
    def name(self) -> str:
        """The executor's value of `--backend`."""
        ...

    @property
    def capabilities(self) -> Capabilities: ...

    def max_model_len(self, config: Any) -> int:
        """Return the most tokens of a prompt. `config` is the base's PreTrainedConfig."""
        ...

    def load(self, base: Path, config: Any, adapters: Seq[AdapterSource]) -> Computation:
        """Read the base's weights and start computing. adapters: the adapters known now; others may follow. Raises
        UnsupportedModelError where the base cannot be served."""
        ...

    @property
    def max_slots(self) -> int | None:
        """How many adapters fit on the device, whatever their size; None where memory and the options decide."""
        ...

    @property
    def item_bytes(self) -> int:
        """Bytes per adapter parameter on the device."""
        ...

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end a text."""
        ...

    def parameter(self, name: str) -> Any:
        """Return the base's own tensor, such as "lm_head.weight"; None where it is not available."""
        ...

    def set_slot(self, slot: int, folder: Path, weights: Any) -> None:
        """Place an adapter in a slot: `weights` (AdapterWeights), which were read from `folder`. Called on the same
        thread as `clear_slot`, while other adapters compute."""
        ...

    def clear_slot(self, slot: int) -> None:
        """Free a slot that no sequence uses."""
        ...

    def give_back(self) -> None:
        """Return freed memory to the machine."""
        ...

    def close(self) -> None:
        """Free the model. The caller has closed the computation before."""
        ...
