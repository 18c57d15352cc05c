"""Reads one version of a classifier: an adapter and its contract, checked against the base."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loraplex.adapters.base_name import ServedBase
from loraplex.adapters.checkpoint import Unidentified, read_unidentified
from loraplex.adapters.files import FILES
from loraplex.adapters.weights import AdapterWeights, BaseLayers
from loraplex.bundle import AdapterSource, open_adapter
from loraplex.classifier import Contract
from loraplex.disk import unchanged
from loraplex.errors import AdapterError, ContractError, InvalidRequestError
from loraplex.executors.capabilities import Capabilities
from loraplex.text.adapter_prompt import AdapterPrompts
from loraplex.text.chat_template import ChatTemplate
from loraplex.text.template import Template
from loraplex.text.tokenizer import Tokenizer
from loraplex.types import AdapterRef


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifierVersion:
    """One version of a classifier: its adapter's weights, its contract, and its tokenizer.

    id:             hash of all three; answers show it as the version.
    chat:           the chat template and the tokenizer: the adapter's own, or the base's.
    labels:         the labels in the order of the scores; None where the likeliest token is the answer.
    shares_prefix:  the base computes the tokens before the activation.
    has_score:      the adapter answers with a score head of its own.
    warnings:       what is odd about the adapter, although it is served.
    """

    source: AdapterSource
    id: str
    kv_id: str
    chat: ChatTemplate
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
    warnings: tuple[str, ...]

    @property
    def tokenizer(self) -> Tokenizer:
        return self.chat.tokenizer

    @property
    def ref(self) -> AdapterRef:
        return AdapterRef(name=self.source.name, version=self.id)

    @property
    def prefix_kv_id(self) -> bytes:
        """Identity of the K/V before the activation, if the base does not compute it."""
        return hashlib.sha256(f"{self.kv_id} prefix".encode()).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedClassifier:
    """A classifier that was read once and checked, as far as possible without the base's weights."""

    source: AdapterSource
    adapter: Unidentified
    chat: ChatTemplate
    template: Template | None
    labels: tuple[str, ...] | None
    warnings: tuple[str, ...]


class ClassifierChecker:
    """Reads and checks classifiers before the base's weights are loaded. Any thread may call."""

    def __init__(
        self,
        layers: BaseLayers,
        chat: ChatTemplate,
        max_model_len: int,
        capabilities: Capabilities,
        base: ServedBase,
    ) -> None:
        self._base = base
        self._layers, self._max_model_len = layers, max_model_len
        self._prompts = AdapterPrompts(chat)
        self.capabilities = capabilities

    def check(self, source: AdapterSource) -> CheckedClassifier:
        """Read the classifier that the source's folder holds now, and check it. Raises AdapterError or ContractError,
        which say what is wrong."""
        with unchanged([source.path / name for name in FILES], AdapterError):
            source = open_adapter(source.name, source.path)
            adapter = read_unidentified(source.path, self._layers)
            chat = self._prompts.read(source.path)
        # PEFT often saves the base's own embedding beside LoRA on it. Whether it differs is not known yet.
        self.capabilities.check(source.path, adapter.kinds - {"other_embedding"})
        _check_changes(source, adapter.weights)
        labels = _labels(source, adapter.weights)
        template = None if source.contract is None else self._bind(source, source.contract, chat, adapter.weights)
        warnings = (*adapter.warnings, *self._base.warn_of(adapter.config.base_model_name_or_path))
        return CheckedClassifier(
            source=source, adapter=adapter, chat=chat, template=template, labels=labels, warnings=warnings
        )

    def _bind(self, source: AdapterSource, contract: Contract, chat: ChatTemplate, weights: AdapterWeights) -> Template:
        path, reads_labels = source.contract_path, weights.score is None
        try:
            return Template(
                chat, contract, self._max_model_len, path, weights.invocation_tokens, reads_labels=reads_labels
            )
        except InvalidRequestError as exc:  # the template writes a token that the base does not have
            raise ContractError(f"{path}, key 'template'", exc.message, remedy=exc.remedy) from None


class ClassifierReader:
    """Reads folders as versions and their weights, once the base is loaded. Any thread may call."""

    def __init__(self, checker: ClassifierChecker, parameter: Callable[[str], Any], item_bytes: int) -> None:
        """parameter: returns the base's tensor of a name. item_bytes: bytes per adapter parameter on the device."""
        self._checker, self._parameter, self._item_bytes = checker, parameter, item_bytes

    def read(self, source: AdapterSource) -> tuple[ClassifierVersion, AdapterWeights]:
        """Read the version that the folder holds now. Raises AdapterError or ContractError, which say what is wrong."""
        return self.identify(self._checker.check(source))

    def identify(self, checked: CheckedClassifier) -> tuple[ClassifierVersion, AdapterWeights]:
        """Return the version and weights of a checked classifier. Raises AdapterError where the backend does not serve
        the adapter exactly, or the adapter changes nothing."""
        source, weights = checked.source, checked.adapter.identify(self._parameter)
        self._checker.capabilities.check(source.path, weights.kinds)
        _check_changes(source, weights)
        version = ClassifierVersion(
            source=source,
            id=_version_id(weights.kv_id, source, checked.chat),
            kv_id=weights.kv_id,
            chat=checked.chat,
            template=checked.template,
            labels=checked.labels,
            invocation_tokens=weights.invocation_tokens,
            shares_prefix=weights.invocation_tokens is not None and not weights.changes_prefix,
            has_score=weights.score is not None,
            changes_layers=bool(weights.modules),
            rank=weights.rank,
            num_parameters=weights.num_parameters,
            num_bytes=weights.num_placed * self._item_bytes,
            host_bytes=weights.num_bytes,
            warnings=checked.warnings,
        )
        return version, weights


def _check_changes(source: AdapterSource, weights: AdapterWeights) -> None:
    if weights.is_zero:
        raise AdapterError(
            source.path,
            "changes nothing: all of its lora_B are zero, so every answer would be the base's",
            remedy="save the adapter after its training",
        )


def _labels(source: AdapterSource, weights: AdapterWeights) -> tuple[str, ...] | None:
    labels = None if source.contract is None else source.contract.labels
    if weights.score is None:
        return labels
    num_labels = len(weights.score.weight)
    if num_labels < 2:
        raise AdapterError(
            source.path,
            "its score head has one output, which is a number and not a choice between labels",
            remedy="train it as a classifier, with two labels or more",
        )
    if labels is not None and len(labels) != num_labels:
        raise ContractError(
            f"{source.contract_path}, key 'labels'",
            f"names {len(labels)} labels, the adapter's score head has {num_labels}",
            remedy="name them all, in the order of the training's label ids",
        )
    return labels or tuple(f"LABEL_{i}" for i in range(num_labels))  # transformers' default names


def _version_id(kv_id: str, source: AdapterSource, chat: ChatTemplate) -> str:
    # Without defaults, so that a key that a later version of Loraplex adds changes no id.
    contract = source.contract.model_dump_json(exclude_defaults=True) if source.contract is not None else ""
    own = "" if chat.is_bases else chat.version
    return hashlib.sha256(f"{kv_id}\n{contract}\n{own}".encode()).hexdigest()[:16]
