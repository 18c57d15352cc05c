"""An adapter with its contract, checked against the base: what the store reads from disk and places on the device."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from loraplex.adapters.checkpoint import read_adapter
from loraplex.adapters.kinds import kinds_of
from loraplex.adapters.peft_config import read_peft_config
from loraplex.adapters.weights import AdapterWeights, BaseLayers
from loraplex.backends.capabilities import Capabilities
from loraplex.backends.executor import Executor
from loraplex.bundle import CONTRACT, AdapterSource, open_adapter
from loraplex.engine.tokenizer import Template, Tokenizer
from loraplex.errors import AdapterError, ContractError
from loraplex.types import AdapterRef


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedClassifier:
    """One version. labels: in the order of the answer's scores; None where the top token is the answer.
    shares_prefix: the tokens before the activation are computed as the base's. has_score: a head of its own answers."""

    source: AdapterSource
    version: str
    kv_id: str
    template: Template | None
    labels: tuple[str, ...] | None
    invocation_tokens: tuple[int, ...] | None
    shares_prefix: bool
    has_score: bool
    changes_layers: bool
    rank: int
    num_parameters: int
    num_bytes: int
    host_bytes: int
    pad_token_id: int | None = None

    @property
    def ref(self) -> AdapterRef:
        return AdapterRef(name=self.source.name, version=self.version)

    @property
    def prefix_kv_id(self) -> bytes:
        """Identity of the K/V before its activation, where they are not the base's."""
        return hashlib.sha256(f"{self.kv_id} prefix".encode()).digest()

    @property
    def contract_path(self) -> Path:
        return self.source.path / CONTRACT


class ClassifierReader:
    """Folders -> versions and their weights, for one base. Any thread may call."""

    def __init__(
        self,
        layers: BaseLayers,
        tokenizer: Tokenizer,
        max_model_len: int,
        capabilities: Capabilities,
        pad_token_id: int | None = None,
    ) -> None:
        self._layers, self._tokenizer, self._max_model_len = layers, tokenizer, max_model_len
        self._capabilities, self._pad_token_id = capabilities, pad_token_id
        # Once the base is loaded: compares with its weights, and knows its dtype.
        self.executor: Executor | None = None

    def read(self, source: AdapterSource) -> tuple[LoadedClassifier, AdapterWeights]:
        """AdapterError, ContractError: what is wrong, with a remedy. The contract is read again, too."""
        source = open_adapter(source.name, source.path)
        weights = read_adapter(source.path, self._layers)
        if self.executor is not None:
            weights = weights.without_base_copies(self.executor.parameter)
        kinds = kinds_of(read_peft_config(source.path), weights)
        if self.executor is None:
            kinds -= {"other_embedding"}  # PEFT often saves the base's own: not known yet
        self._capabilities.check(source.path, kinds)
        if weights.is_zero:
            raise AdapterError(
                source.path,
                "changes nothing: all of its lora_B are zero, so every answer would be the base's",
                remedy="save the adapter after its training",
            )
        contract, path = source.contract, source.path / CONTRACT
        labels = None if contract is None else contract.labels
        if weights.score is not None:
            num_labels = len(weights.score.weight)
            if num_labels < 2:
                raise AdapterError(
                    source.path,
                    "its score head has one output, a number and no choice between labels",
                    remedy="train it as a classifier, with two labels or more",
                )
            if labels is not None and len(labels) != num_labels:
                raise ContractError(
                    f"{path}, key 'labels'",
                    f"names {len(labels)} labels, the adapter's score head has {num_labels}",
                    remedy="name them all, in the order of the training's label ids",
                )
            labels = labels or tuple(f"LABEL_{i}" for i in range(num_labels))  # as transformers calls them
        template = None
        if contract is not None:
            template = Template(
                self._tokenizer,
                contract,
                self._max_model_len,
                path,
                weights.invocation_tokens,
                reads_labels=weights.score is None,
            )
        version = LoadedClassifier(
            source=source,
            version=_version(weights.kv_id, source),
            kv_id=weights.kv_id,
            template=template,
            labels=labels,
            invocation_tokens=weights.invocation_tokens,
            shares_prefix=weights.invocation_tokens is not None and not weights.changes_prefix,
            has_score=weights.score is not None,
            changes_layers=bool(weights.modules),
            rank=weights.rank,
            num_parameters=weights.num_parameters,
            num_bytes=weights.num_placed * (4 if self.executor is None else self.executor.item_bytes),
            pad_token_id=self._pad_token_id,
            host_bytes=weights.num_bytes,
        )
        return version, weights


def _version(kv_id: str, source: AdapterSource) -> str:
    contract = source.contract.model_dump_json() if source.contract is not None else ""
    return hashlib.sha256(f"{kv_id}\n{contract}".encode()).hexdigest()[:16]
