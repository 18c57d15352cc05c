"""Everything that uses PEFT: the article's first implementation as a backend, and the oracle of `adapters verify`.

Native is measured against this backend, so it does what PEFT's users do and is no faster: `load_adapter` per adapter,
`set_adapter` or `disable_adapter` per sequence, `generate` for one token with its scores.
"""

import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from loraplex.adapters.checkpoint import read_unidentified, rename_tensors
from loraplex.adapters.slots import NO_ADAPTER
from loraplex.adapters.weights import AdapterWeights, BaseLayers
from loraplex.bundle import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterSource
from loraplex.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.outcomes import read_outcomes
from loraplex.engine.scheduler import MAX_STEP_ROWS, Scheduler
from loraplex.engine.sequence import Outcome, Sequence
from loraplex.engine.step import Step
from loraplex.errors import AdapterError
from loraplex.executors.capabilities import PEFT, PEFT_MIXED, Capabilities
from loraplex.machine import give_back
from loraplex.model.loader import (
    base_layers,
    default_step_tokens,
    load_transformers_model,
    max_positions,
    model_class,
    read_stop_ids,
    resolve_device,
    resolve_dtype,
)

BASE = "__base__"  # PEFT's name for the base in adapter_names


class PeftExecutor:
    """An Executor with PEFT. The engine's one thread computes; adapters come and go between two forward passes."""

    name = "peft"
    max_slots = None

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._is_mixed = config.peft_batching == "mixed"
        self._runner: PeftRunner | None = None
        self._parameters: Mapping[str, torch.Tensor] = {}
        self._layers = BaseLayers(linear={})
        self.stop_ids: frozenset[int] = frozenset()

    @property
    def capabilities(self) -> Capabilities:
        return PEFT_MIXED if self._is_mixed else PEFT

    def max_model_len(self, config: PreTrainedConfig) -> int:
        return max_positions(config)

    def load(self, base: Path, config: PreTrainedConfig, adapters: Seq[AdapterSource]) -> Engine:
        options = self._config
        device = resolve_device(options.device)
        attention = "eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa"  # sdpa ignores soft caps
        model = load_transformers_model(config, base, resolve_dtype(options.dtype, device), device, attention)
        max_step_tokens = options.max_step_tokens or default_step_tokens(device, model.dtype, config)
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._layers = base_layers(model)
        self.stop_ids = read_stop_ids(base, config)
        model.generation_config = GenerationConfig()  # not the base's own, which may have penalties
        self._runner = PeftRunner(model, is_mixed=self._is_mixed, max_tokens=max_step_tokens)
        scheduler = Scheduler(
            max_step_tokens=max_step_tokens,
            # One by one: a sequence is answered as soon as it is computed, and its deadline is checked right before.
            max_step_sequences=options.max_step_sequences if self._is_mixed else 1,
            shares=False,
        )
        engine = Engine(self._runner, scheduler)
        engine.start()
        return engine

    @property
    def item_bytes(self) -> int:
        return 4  # PEFT keeps adapters in float32, whatever the base's dtype

    def parameter(self, name: str) -> torch.Tensor | None:
        return self._parameters.get(name)

    def set_slot(self, slot: int, folder: Path, weights: AdapterWeights) -> None:
        # PEFT must read exactly the files that are checked here, even if somebody writes into the folder meanwhile.
        with tempfile.TemporaryDirectory(prefix="loraplex-") as copy:
            for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
                try:
                    shutil.copy(folder / name, copy)
                except OSError as exc:
                    raise AdapterError(folder / name, f"not readable: {exc}", remedy="put the file back") from None
            found = read_unidentified(Path(copy), self._layers).identify(self.parameter)
            if found.kv_id != weights.kv_id:
                raise AdapterError(
                    folder,
                    "changed on disk since it was loaded",
                    remedy="load it again, or put the old files back",
                )
            rename_tensors(Path(copy), Path(copy))  # PEFT reads names with "default" in an adapter of that name only
            self._loaded.set_slot(slot, Path(copy), weights.invocation_tokens is not None)

    def clear_slot(self, slot: int) -> None:
        self._loaded.clear_slot(slot)

    def give_back(self) -> None:
        give_back(self._loaded.model.device)

    def close(self) -> None:
        self._runner, self._parameters = None, {}

    @property
    def _loaded(self) -> "PeftRunner":
        assert self._runner is not None, "the base is not loaded"
        return self._runner


class PeftRunner:
    """The engine's Runner. Sequences are computed whole: one by one or, if mixed, in batches padded on the left."""

    def __init__(self, model: PreTrainedModel, *, is_mixed: bool, max_tokens: int) -> None:
        """max_tokens: of a padded batch of several sequences."""
        self.model = model
        self._is_mixed, self._max_tokens = is_mixed, max_tokens
        self._modules = dict(model.named_modules())
        self._peft: Any = None  # PeftModel, while there are adapters
        self._activated: set[int] = set()  # slots of aLoRA adapters
        # An adapter is active for the whole model, so computing, loading and deleting exclude each other. `_turn` lets
        # the first in line go next; without it, a busy engine would keep adapters out for ever.
        self._turn, self._busy = threading.Lock(), threading.Lock()

    def set_slot(self, slot: int, folder: Path, is_activated: bool) -> None:
        name = _name(slot)
        with self._alone():
            try:
                if self._peft is None:
                    self._peft = PeftModel.from_pretrained(self.model, folder, adapter_name=name)
                else:
                    self._peft.load_adapter(folder, adapter_name=name)
            except BaseException:
                self._delete(name)
                raise
            self._peft.eval()
            self._activated.discard(slot)
            self._activated |= {slot} if is_activated else set()

    def clear_slot(self, slot: int) -> None:
        with self._alone():
            self._delete(_name(slot))

    @torch.inference_mode()
    def run(self, step: Step) -> list[tuple[Sequence, Outcome]]:
        outcomes: list[tuple[Sequence, Outcome]] = []
        for sequences in self._batches([placed.sequence for placed in step.placed]):
            with self._alone():
                outcomes += self._answer(sequences)
        return outcomes

    def _batches(self, sequences: Seq[Sequence]) -> Iterator[list[Sequence]]:
        batch: list[Sequence] = []
        for sequence in sequences:
            both = [*batch, sequence]
            num_tokens, num_rows = max(one.num_tokens for one in both) * len(both), _num_last(both) * len(both)
            if batch and not (self._is_mixed and num_tokens <= self._max_tokens and num_rows <= MAX_STEP_ROWS):
                yield batch
                batch = []
            batch.append(sequence)
        yield batch

    def _answer(self, sequences: Seq[Sequence]) -> list[tuple[Sequence, Outcome]]:
        started = time.monotonic()
        for sequence in sequences:
            sequence.started_s = started if sequence.started_s is None else sequence.started_s
        num_last = _num_last(sequences)
        logits = self._logits(sequences, num_last)  # [sequences, K, vocab]
        device = logits.device
        targets = [
            (row * num_last + num_last + target.position, target.token_id)
            for row, one in enumerate(sequences)
            for target in one.targets
        ]
        return read_outcomes(
            sequences,
            logits.flatten(0, 1),
            torch.tensor([row for row, _ in targets], dtype=torch.long, device=device),
            torch.tensor([token_id for _, token_id in targets], dtype=torch.long, device=device),
            torch.arange(num_last - 1, logits.shape[0] * num_last, num_last, device=device),
            {},
        )

    def _logits(self, sequences: Seq[Sequence], num_last: int) -> torch.Tensor:
        inputs: dict[str, Any] = _padded(sequences, self.model.device)
        slots = [sequence.slot for sequence in sequences]
        model: Any = self._peft or self.model
        disabled: Any = nullcontext()
        if not self._activated.isdisjoint(slots):
            # Without offsets, PEFT would also search the generated tokens for the invocation.
            inputs["alora_offsets"] = [
                one.num_tokens - one.activation if one.slot in self._activated else None for one in sequences
            ]
        if self._peft is None:
            assert set(slots) == {NO_ADAPTER}, f"{slots} are empty"
        elif self._is_mixed:
            inputs["adapter_names"] = [_name(slot) for slot in slots]
        elif slots == [NO_ADAPTER]:
            disabled = model.disable_adapter()
        else:
            model.set_adapter(_name(slots[0]), inference_mode=True)
        try:
            with disabled:
                if num_last > 1:
                    return _forward(model, inputs, num_last)
                return _generate(model, inputs)
        except BaseException:
            self._remove_hooks()
            raise

    def _remove_hooks(self) -> None:
        """Remove the hooks that PEFT leaves behind when a forward pass fails. They tell PEFT's layers the adapter names
        and activations. They would pile up, and apply to later passes that set none."""
        for module in self.model.modules():
            module._forward_pre_hooks.clear()
            module._forward_pre_hooks_with_kwargs.clear()

    def _delete(self, name: str) -> None:
        """Delete an adapter, even one that loaded only in part. Restores the base's modules with the last adapter."""
        if self._peft is not None and name in self._peft.peft_config:
            self._peft.delete_adapter(name)
        if self._peft is None or not self._peft.peft_config:  # PEFT cannot disable adapters if there are none
            self._peft = None
            for path, module in self._modules.items():
                if path:
                    self.model.set_submodule(path, module)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with self._turn:
            self._busy.acquire()
        try:
            yield
        finally:
            self._busy.release()


def _name(slot: int) -> str:
    return BASE if slot == NO_ADAPTER else f"slot{slot}"


def _num_last(sequences: Seq[Sequence]) -> int:
    """Return K: all sequences of a batch end together, so the wanted rows are among the last K of each."""
    return max([1, *(-target.position for one in sequences for target in one.targets)])


def _padded(sequences: Seq[Sequence], device: torch.device) -> dict[str, torch.Tensor]:
    length = max(sequence.num_tokens for sequence in sequences)
    paddings = [length - sequence.num_tokens for sequence in sequences]
    ids = [[0] * padding + list(one.token_ids) for padding, one in zip(paddings, sequences, strict=True)]
    mask = [[0] * padding + [1] * (length - padding) for padding in paddings]
    return {
        "input_ids": torch.tensor(ids, device=device),  # [sequences, length]
        "attention_mask": torch.tensor(mask, device=device),
    }


def _generate(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Return the next token's scores: [sequences, 1, vocab]."""
    config = GenerationConfig(
        max_new_tokens=1, do_sample=False, output_scores=True, return_dict_in_generate=True, pad_token_id=0
    )
    [scores] = model.generate(**inputs, generation_config=config).scores
    found: torch.Tensor = scores.unsqueeze(1)
    return found


def _forward(model: Any, inputs: dict[str, Any], num_last: int) -> torch.Tensor:
    """Return the logits of the last tokens: [sequences, num_last, vocab]. Positions count from the first token that is
    not padding, as in `generate`."""
    position_ids = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    found: torch.Tensor = model(**inputs, position_ids=position_ids, logits_to_keep=num_last, use_cache=False).logits
    return found


class PeftOracle:
    """One base and one adapter in PEFT, in float32 on the CPU. `loraplex adapters verify` compares answers with it."""

    def __init__(self, base: Path, adapter: Path, *, num_labels: int | None) -> None:
        """num_labels: labels of a score head; None for a causal language model."""
        options: dict[str, Any] = dict(dtype=torch.float32, local_files_only=True, use_safetensors=True)
        options["attn_implementation"] = "eager"  # sdpa ignores soft-capped scores
        model: Any
        if num_labels is None:
            config = AutoConfig.from_pretrained(base, local_files_only=True)
            model = model_class(config).from_pretrained(base, config=config, **options)
        else:
            model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=num_labels, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about PEFT's own use of transformers
            self._model: Any = PeftModel.from_pretrained(model, adapter).eval()

    @torch.inference_mode()
    def label_log_probs(self, prompt: Seq[int], labels: Seq[Seq[int]]) -> list[float]:
        """Return each label's log probability after the prompt: the sum over its tokens, over the whole vocabulary."""
        found = []
        for label in labels:
            ids = [*prompt, *label[:-1]]
            log_probs = self._model(input_ids=torch.tensor([ids])).logits[0, len(prompt) - 1 :].log_softmax(-1)
            found.append(sum(log_probs[i, token_id].item() for i, token_id in enumerate(label)))
        return found

    @torch.inference_mode()
    def score_log_probs(self, prompt: Seq[int]) -> list[float]:
        """Return the log probabilities of the score head's labels."""
        found: list[float] = self._model(input_ids=torch.tensor([list(prompt)])).logits[0].log_softmax(-1).tolist()
        return found
