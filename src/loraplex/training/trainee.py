"""A base with N adapters that are trained in one pass."""

from collections.abc import Collection
from collections.abc import Sequence as Seq
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from loraplex.adapters.weights import BaseLayers
from loraplex.errors import UnsupportedModelError
from loraplex.machine import budget_bytes
from loraplex.model.loader import build_skeleton, load_transformers_model
from loraplex.training.attention import ATTENTION, PASS, Pass, PrefixDone
from loraplex.training.batch import Answer, Conversation, Packed, Question, pack
from loraplex.training.kept_kv import KV, Ids, KeptKV
from loraplex.training.stacked_lora import Rows, StackedLoRA

TRIAL_TOKENS = 24
HEAD_STD = 0.02  # of a new head's weights, as transformers begins them


class Trainee:
    """A frozen transformers model and its adapters' LoRA, stacked layer by layer.

    loras:  path of a linear layer -> the layer.
    target_modules: these layers as PEFT's config names them: ends of paths, or paths where others end alike.
    score:  the adapters' own heads, [num_adapters, most labels, hidden], for which an answer's token is its label's
            number; None where adapters answer with the base's tokens.
    """

    def __init__(
        self,
        model: Any,
        layers: BaseLayers,
        *,
        num_adapters: int,
        rank: int,
        alpha: float,
        targets: Collection[str],
        num_labels: Seq[int] | None = None,
        kv_bytes: int = 0,
    ) -> None:
        """model: transformers', which this object changes and owns from now on. targets: the last parts of the paths of
        the layers to train, such as "q_proj". num_labels: of each adapter that answers with a head of its own.
        kv_bytes: memory for the conversations' keys and values, which are then computed once."""
        self.num_adapters, self.device = num_adapters, model.device
        self._kv = KeptKV(kv_bytes, self._prefix_kv)
        self._model, self._rows, self._pass = model.requires_grad_(False).eval(), Rows(), Pass()
        _attend_by(self._pass, model)
        self.loras: dict[str, StackedLoRA] = {}
        for path, shape in layers.linear.items():
            parent, _, name = path.rpartition(".")
            if name in targets and path not in layers.beside_text:
                base_layer = model.get_submodule(path)
                self.loras[path] = StackedLoRA(base_layer, shape, self._rows, num_adapters, rank, alpha / rank)
                setattr(model.get_submodule(parent), name, self.loras[path])
        ends = {path.rpartition(".")[2] for path in self.loras}
        is_all = all(path in self.loras for path in layers.linear if path.rpartition(".")[2] in ends)
        self.target_modules = sorted(ends if is_all else self.loras)
        self.score: nn.Parameter | None = None
        if num_labels is not None:
            score = torch.zeros(num_adapters, max(num_labels), layers.hidden_size, device=self.device)
            for one, count in zip(score, num_labels, strict=True):
                one[:count].normal_(std=HEAD_STD)
            self.score = nn.Parameter(score)
            known = torch.tensor(num_labels, device=self.device)[:, None]
            self._has_label = torch.arange(max(num_labels), device=self.device) < known  # [num_adapters, most labels]

    @classmethod
    def load(
        cls,
        base: Path,
        config: Any,
        layers: BaseLayers,
        dtype: torch.dtype,
        device: torch.device,
        *,
        kv_memory: str = "0",
        **lora: Any,
    ) -> "Trainee":
        """Load the base's weights, frozen, in `dtype`.

        kv_memory:  for the conversations' keys and values: a size, or a share of what the base leaves free.
        lora:       as for `Trainee`.
        Raises UnsupportedModelError where the base does not answer in a training pass as it does by itself.
        """
        check_trainable(config, base)
        model = load_transformers_model(config, base, dtype, device, ATTENTION)
        expected = _ask_alone(model)
        trainee = cls(model, layers, kv_bytes=budget_bytes(kv_memory, device), **lora)
        trainee._check(expected)
        return trainee

    def parameters(self) -> list[nn.Parameter]:
        """Return all that is trained; the first dimension is the adapter's."""
        heads = [] if self.score is None else [self.score]
        return [part for lora in self.loras.values() for part in (lora.lora_A, lora.lora_B)] + heads

    def losses(self, conversations: Seq[Conversation]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return for each adapter the weighted sum of its answers' negative log probabilities, and the sum of their
        weights; 0 where it has no question. Gradients flow to the adapters, and not into the conversations."""
        logits, packed = self._answers(conversations)
        zeros = torch.zeros(self.num_adapters, device=self.device)
        nats = F.cross_entropy(logits, packed.answer_ids, reduction="none")
        found = zeros.index_add(0, packed.adapter_of, nats * packed.weights)
        return found, zeros.index_add(0, packed.adapter_of, packed.weights)

    @torch.no_grad()
    def log_probs(self, conversations: Seq[Conversation]) -> torch.Tensor:
        """Return the log probability of every answer, in the order in which the conversations list them."""
        logits, packed = self._answers(conversations)
        found = -F.cross_entropy(logits, packed.answer_ids, reduction="none")
        return torch.empty_like(found).index_copy(0, packed.answer_order, found)

    def _answers(self, conversations: Seq[Conversation]) -> tuple[torch.Tensor, Packed]:
        """Return float32 logits where an answer should follow, [num_answers, vocabulary or labels]."""
        kept = [one for one in conversations if one.questions]
        kv = self._kv.of([one.token_ids for one in kept])
        packed = pack(kept, self.num_adapters, self.device)
        self._pass.packed, self._pass.kv, self._pass.masks = packed, kv, {}
        try:
            self._rows.of_adapters = packed.rows
            self._rows.counts, self._rows.num_tokens = packed.counts, len(packed.input_ids)
            logits = self._run(packed.input_ids, packed.positions, packed.answer_rows)
            if self.score is not None:
                scores = torch.einsum("ah,alh->al", logits.float(), self.score[packed.adapter_of])
                logits = scores.masked_fill(~self._has_label[packed.adapter_of], -torch.inf)
        finally:
            self._pass.packed, self._pass.kv, self._rows.of_adapters = None, (), None
        return logits.float(), packed

    @torch.no_grad()
    def _prefix_kv(self, ids: Ids) -> KV:
        """Return a conversation's keys and values, as the base alone computes them."""
        run, run.is_prefix, run.prefix_kv = self._pass, True, {}
        try:
            with suppress(PrefixDone):
                tokens = torch.tensor(ids, device=self.device)
                self._run(tokens, torch.arange(len(ids), device=self.device), torch.zeros(1, dtype=torch.long))
            run.last_layer = next(reversed(run.prefix_kv))
            return run.prefix_kv
        finally:
            run.is_prefix, run.prefix_kv = False, {}

    def _run(self, ids: torch.Tensor, positions: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Return the logits of the rows `kept`, or the output head's input where the adapters have heads."""
        inputs = {"input_ids": ids[None], "position_ids": positions[None], "use_cache": False}
        found: torch.Tensor
        if self.score is None:
            found = self._model(**inputs, logits_to_keep=kept.to(self.device)).logits[0]
        else:
            found = self._model.base_model(**inputs).last_hidden_state[0][kept.to(self.device)]
        return found

    def _check(self, expected: torch.Tensor) -> None:
        """Compare a text's log probabilities in a training pass, in which adapters change nothing yet, with `expected`:
        transformers' own. A base may attend to later tokens, or count positions in its own way."""
        ids = _trial_ids(self._model)
        half = TRIAL_TOKENS // 2
        asked = tuple(Answer(position=at, token_id=ids[half + at + 1]) for at in range(half - 1))
        question = Question(adapter=self.num_adapters - 1, token_ids=tuple(ids[half:]), answers=asked)
        score, self.score = self.score, None
        try:
            found = self.log_probs([Conversation(token_ids=tuple(ids[:half]), questions=(question,))])
        finally:
            self.score = score
        wanted = expected[torch.arange(half, TRIAL_TOKENS - 1), ids[half + 1 :]].to(found)
        difference = float((found - wanted).square().mean().sqrt())
        if not difference <= (1e-3 if self._model.dtype == torch.float32 else 0.25):
            raise _untrainable(
                self._model,
                f"its log probabilities in a training pass differ by {difference:.2g} from those that it has by itself",
            )


def check_trainable(config: Any, base: Path) -> None:
    """Raise UnsupportedModelError where the base's attention has something that a training pass does not compute. Reads
    no weights."""
    model: Any = build_skeleton(config, base).eval()
    run = Pass()
    _attend_by(run, model)
    ids = torch.zeros(1, TRIAL_TOKENS, dtype=torch.long, device="meta")
    run.is_prefix = True
    try:
        with torch.no_grad():
            model(input_ids=ids, position_ids=torch.arange(TRIAL_TOKENS, device="meta")[None], use_cache=False)
    except UnsupportedModelError:
        raise
    except Exception:  # such as experts, who look at values, which there are none of yet: `Trainee.load` compares them
        return


def _attend_by(run: Pass, model: Any) -> None:
    model.set_attn_implementation(ATTENTION)
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            setattr(module, PASS, run)


@torch.no_grad()  # and not inference mode, whose tensors a model may keep and a training pass cannot use
def _ask_alone(model: Any) -> torch.Tensor:
    """Return transformers' own log probabilities, [TRIAL_TOKENS, vocabulary]. Eager attention rounds to 16 bits what a
    training pass does not."""
    is_fused = model.dtype != torch.float32 and getattr(model, "_supports_sdpa", False)
    model.set_attn_implementation("sdpa" if is_fused else "eager")
    found: torch.Tensor = model(
        input_ids=torch.tensor([_trial_ids(model)], device=model.device), use_cache=False
    ).logits
    return found[0].float().log_softmax(-1)


def _trial_ids(model: Any) -> list[int]:
    vocab_size = int(model.config.get_text_config().vocab_size)
    return [(1 + 7 * number) % vocab_size for number in range(TRIAL_TOKENS)]


def _untrainable(model: Any, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(type(model).__name__, what, remedy="train on another base")
