"""One classifier's verdict in a call: makes its prompt and sequences, and the verdict from their outcomes."""

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

from loraplex.adapters.slots import NO_ADAPTER, prefix_slot
from loraplex.classifier import DEFAULT_ROLES, kept_messages
from loraplex.engine.block_pool import BASE_KV
from loraplex.engine.sequence import NEXT_TOKEN, Outcome, Sampling, Sequence, SequenceOutput, Target
from loraplex.errors import LoraplexError
from loraplex.messages import tool_calls_left_out
from loraplex.service.base import Base
from loraplex.service.classifiers import ClassifierVersion
from loraplex.text.prompt import Prompt, verbatim
from loraplex.text.template import Template
from loraplex.text.tokenizer import Conversations
from loraplex.types import ClassifyRequest, ErrorInfo, Message, Roles, Verdict


@dataclass(slots=True, kw_only=True)
class Computed:
    """Holds what the engine computed for one part of a call, or the `error` that prevents this."""

    sequences: Seq[Sequence] = ()
    outputs: Seq[SequenceOutput] = ()
    error: LoraplexError | None = None

    def take(self, outcomes: Seq[Outcome]) -> None:
        """Record the outcomes, one per sequence."""
        self.error = self.error or next((outcome for outcome in outcomes if isinstance(outcome, LoraplexError)), None)
        self.outputs = [outcome for outcome in outcomes if isinstance(outcome, SequenceOutput)]


@dataclass(slots=True, kw_only=True)
class Evaluation(Computed):
    """One classifier's part of a call: the conversation under the version in `slot`, or the `error` that prevents
    this."""

    name: str
    version: ClassifierVersion | None = None
    slot: int = NO_ADAPTER
    prompt: Prompt | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt.token_ids) if self.prompt is not None else 0

    def tokenize(self, request: ClassifyRequest, base: Base, conversations: Conversations) -> None:
        """Make the prompt and the sequences, or record the error."""
        version = self.version
        assert version is not None, "no version is leased"
        try:
            self.prompt = render(version, request.input, base, conversations, request.roles)
            if version.has_score:
                self.prompt = _without_padding(self.prompt, base.pad_token_id)
            keep = request.conversation_id is not None
            if version.template is None:
                self.sequences = [make_sequence(self.prompt, version, self.slot, keep=keep)]
            else:
                self.sequences = _label_sequences(self.prompt, version, self.slot, version.template, keep=keep)
        except LoraplexError as exc:
            self.error = exc

    def verdict(self, id: str | None = None) -> Verdict:
        ref = self.version.ref if self.version is not None else None
        if self.error is not None:
            return Verdict(id=id, classifier=self.name, adapter=ref, error=ErrorInfo.of(self.error))
        assert self.version is not None and self.prompt is not None, "an evaluation without an error was computed"
        contract, labels = self.version.source.contract, self.version.labels
        if contract is not None:
            decision = contract.decide(_label_log_probs(self.outputs, self.version))
            warnings = self.prompt.warnings + decision.warnings or None
            return replace(decision.verdict(self.name), id=id, adapter=ref, warnings=warnings)
        [output] = self.outputs
        if labels is None:
            label, confidence, scores = (
                self.version.tokenizer.decode(output.tokens[0].id),
                math.exp(output.tokens[0].log_prob),
                None,
            )
        else:  # a score head without a contract
            scores = dict(zip(labels, map(math.exp, output.log_probs), strict=True))
            label = max(scores, key=scores.__getitem__)
            confidence = scores[label]
        return Verdict(
            id=id,
            classifier=self.name,
            label=label,
            confidence=confidence,
            scores=scores,
            adapter=ref,
            warnings=self.prompt.warnings or None,
        )


def _without_padding(prompt: Prompt, pad_token_id: int | None) -> Prompt:
    """Drop padding tokens at the prompt's end, even if the text spells them: transformers' classifiers read the last
    token that is not padding."""
    end = len(prompt.token_ids)
    while end > 1 and prompt.token_ids[end - 1] == pad_token_id:
        end -= 1
    return replace(prompt, token_ids=prompt.token_ids[:end], num_conversation=min(end, prompt.num_conversation))


def render(
    version: ClassifierVersion,
    input: str | tuple[Message, ...],
    base: Base,
    conversations: Conversations,
    changed_roles: Roles | None = None,
) -> Prompt:
    """Return the input's prompt: in the contract's template if there is one, else verbatim. changed_roles: those that
    differ from the contract's. Raises InputTooLongError or InvalidRequestError where the input makes no prompt."""
    contract = version.source.contract
    if version.template is None:
        text = conversations.text(input, {**DEFAULT_ROLES, **(changed_roles or {})})
        prompt = verbatim(text, version.tokenizer, base.max_model_len, version.invocation_tokens)
    else:
        prompt = version.template.prompt(input, conversations, changed_roles)
    if contract is not None and contract.format == "chat":
        return prompt
    return warned(prompt, input, {**(DEFAULT_ROLES if contract is None else contract.roles), **(changed_roles or {})})


def warned(prompt: Prompt, input: str | tuple[Message, ...], roles: Roles) -> Prompt:
    """Return the prompt, with a warning where it leaves out calls of tools."""
    if isinstance(input, str) or not any(message.tool_calls for message in input):
        return prompt
    left_out = tool_calls_left_out(message for _, message in kept_messages(input, roles))
    return replace(prompt, warnings=(left_out, *prompt.warnings)) if left_out else prompt


def make_sequence(
    prompt: Prompt,
    version: ClassifierVersion | None,
    slot: int,
    *,
    keep: bool,
    targets: tuple[Target, ...] = (),
    continuation: tuple[int, ...] = (),
    sampling: Sampling = NEXT_TOKEN,
) -> Sequence:
    """Return the prompt's sequence under an adapter's version; None is the bare base. K/V that the base computes is
    always kept. K/V that an adapter computes is kept only if `keep` says that the conversation goes on."""
    shared = version is None or version.shares_prefix
    has_own_prefix = version is not None and version.invocation_tokens is not None and not shared
    return Sequence(
        token_ids=prompt.token_ids + continuation,
        slot=slot,
        kv_id=BASE_KV if version is None else bytes.fromhex(version.kv_id),
        activation=prompt.activation,
        prefix_slot=prefix_slot(slot) if has_own_prefix else NO_ADAPTER,
        prefix_kv_id=version.prefix_kv_id if version is not None and has_own_prefix else BASE_KV,
        num_kept=prompt.activation if shared else prompt.num_conversation if keep else 0,
        targets=targets,
        sampling=sampling,
    )


def _label_sequences(
    prompt: Prompt, version: ClassifierVersion, slot: int, template: Template, *, keep: bool
) -> list[Sequence]:
    """Return the sequences that read a version's labels.

    One sequence reads all labels of one token. Each longer label has a sequence of its own: the prompt and the label's
    tokens but the last, with every token of the label as a target. A score head needs the prompt only.
    """
    if version.has_score:
        return [make_sequence(prompt, version, slot, keep=keep)]
    labels = template.label_ids.values()
    single = tuple(Target(position=-1, token_id=ids[0]) for ids in labels if len(ids) == 1)
    sequences = [make_sequence(prompt, version, slot, keep=keep, targets=single)] if single else []
    for ids in labels:
        if len(ids) > 1:
            targets = tuple(Target(position=i - len(ids), token_id=token_id) for i, token_id in enumerate(ids))
            sequences.append(make_sequence(prompt, version, slot, keep=keep, targets=targets, continuation=ids[:-1]))
    return sequences


def _label_log_probs(outputs: Seq[SequenceOutput], version: ClassifierVersion) -> Seq[float]:
    """Return each label's log probability, in the contract's order, from the outputs of `_label_sequences`."""
    if version.has_score:
        return outputs[0].log_probs
    assert version.template is not None
    labels = version.template.label_ids.values()
    longer = iter(outputs[1:] if any(len(ids) == 1 for ids in labels) else outputs)
    single = iter(outputs[0].log_probs)
    return [next(single) if len(ids) == 1 else math.fsum(next(longer).log_probs) for ids in labels]
