"""The training loop: steps over conversations, evaluations on dev, and the best weights of each adapter."""

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from loraplex.evaluation.quality import Quality, quality
from loraplex.machine import peak_bytes
from loraplex.training.adamw import StackedAdamW
from loraplex.training.asked import Asked, to_score, to_train
from loraplex.training.batch import Conversation
from loraplex.training.settings import TrainSettings
from loraplex.training.trainee import Trainee

EPOCHS, LEAST_STEPS, MOST_EPOCHS = 3, 60, 30  # by default: few conversations are read more often
LEAST_BETWEEN = 4  # steps between evaluations: on few conversations, F1 is high by chance now and then
POOL = 50  # batches that are sorted by length together, so that the passes of a step have few different lengths


class DivergedError(Exception):
    """A loss or a gradient of `adapters` was infinite or no number, first at `step`. Their weights are the best before
    that."""

    def __init__(self, step: int, adapters: Seq[int]) -> None:
        super().__init__(step, adapters)
        self.step, self.adapters = step, adapters


@dataclass(slots=True, kw_only=True)
class Told:
    """What the loop tells after a step.

    losses:   of each adapter in this step, in nats; None where it had no question.
    peak_bytes: the most memory so far: of the device, or of this process on a CPU.
    quality:  of each adapter on dev, after an evaluation; None after other steps.
    """

    step: int
    num_steps: int
    epoch: float
    losses: Seq[float | None]
    num_tokens: int
    seconds: float
    learning_rate: float
    peak_bytes: int
    quality: Seq[Quality | None] | None = None
    is_best: Seq[bool] = ()
    stopped: Seq[bool] = ()


@dataclass(slots=True)
class _Best:
    """The best weights of each adapter so far.

    misses:      evaluations since the last better one.
    log_losses:  the lowest of each adapter. While it falls, nothing is missed: F1 may stand still before it rises.
    """

    scores: list[float]
    quality: list[Quality | None]
    weights: list[torch.Tensor]
    steps: list[int]
    misses: list[int]
    log_losses: list[float]


class Fit:
    """Trains the adapters of a trainee. After `run`, or after an interrupt, `best` is what to keep."""

    def __init__(
        self,
        trainee: Trainee,
        settings: TrainSettings,
        train: Seq[Asked],
        dev: Seq[Asked],
        label_ids: Seq[Seq[Seq[int]]],
        label_weights: Seq[Seq[float]],
    ) -> None:
        """label_ids, label_weights: [classifier][label] the label's tokens, and what it counts in the loss."""
        self._trainee, self._settings, self._label_ids = trainee, settings, label_ids
        self._bias = [[-math.log(weight) for weight in weights] for weights in label_weights]
        self._conversations, self._dev = to_train(train, label_ids, label_weights), list(dev)
        self._optimizer = StackedAdamW(
            trainee.parameters(), weight_decay=settings.weight_decay, max_norm=settings.max_norm
        )
        self.steps_an_epoch = max(1, math.ceil(len(self._conversations) / settings.batch))
        epochs = settings.epochs or min(MOST_EPOCHS, max(EPOCHS, LEAST_STEPS / self.steps_an_epoch))
        self.num_steps = max(1, round(self.steps_an_epoch * epochs))
        self._evaluate_every = max(LEAST_BETWEEN, round(self.steps_an_epoch / settings.evaluations))
        n = trainee.num_adapters
        self._step = 0
        self._best = _Best(
            scores=[-math.inf] * n,
            quality=[None] * n,
            weights=[one.detach().clone() for one in trainee.parameters()],
            steps=[0] * n,
            misses=[0] * n,
            log_losses=[math.inf] * n,
        )
        self._diverged: dict[int, int] = {}  # adapter -> step

    @property
    def has_best(self) -> bool:
        """Whether any adapter has been evaluated."""
        return max(self._best.scores) > -math.inf

    @property
    def step(self) -> int:
        """How many steps were made."""
        return self._step

    def best_step(self, adapter: int) -> int | None:
        """Return after which step the adapter was best on dev; None where it was never evaluated."""
        return self._best.steps[adapter] if self._best.scores[adapter] > -math.inf else None

    def is_lost(self, adapter: int) -> bool:
        """Return whether the adapter diverged before it was ever evaluated."""
        return adapter in self._diverged and self.best_step(adapter) is None

    @property
    def stopped(self) -> list[bool]:
        """Return which adapters have stopped: no evaluation was better for `patience` times, by log-loss neither, or
        they diverged."""
        patience = self._settings.patience
        return [misses >= patience or one in self._diverged for one, misses in enumerate(self._best.misses)]

    def run(
        self, tell: Callable[[Told], bool | None], save: Callable[[dict[str, Any]], None] = lambda state: None
    ) -> bool:
        """Train until the last step, or until every adapter has stopped, or `tell` returns that the run is to end.

        save:  takes the loop's state after each evaluation, and at the end that `tell` wanted.
        Returns whether the run came to its own end. Raises DivergedError, at the end where others are sound."""
        for batch in self._batches():
            if all(self.stopped):
                break
            started = time.perf_counter()
            losses, num_tokens = self._learn(batch)
            self._step += 1
            told = Told(
                step=self._step,
                num_steps=self.num_steps,
                epoch=self._step / self.steps_an_epoch,
                losses=losses,
                num_tokens=num_tokens,
                seconds=time.perf_counter() - started,
                learning_rate=self._rate(self._step - 1),
                peak_bytes=peak_bytes(self._trainee.device),
            )
            if self._step % self._evaluate_every == 0 or self._step == self.num_steps:
                told.quality = self.evaluate(self._dev)
                told.is_best, told.stopped = self._keep(told.quality), self.stopped
                save(self.state())
            if tell(told) and self._step < self.num_steps:
                save(self.state())
                return False
        if self._diverged:
            raise DivergedError(min(self._diverged.values()), sorted(self._diverged))
        return True

    def restore_best(self) -> list[Quality | None]:
        """Put each adapter's best weights back, and return what they were on dev. Those never evaluated stay."""
        with torch.no_grad():
            for parameter, best in zip(self._trainee.parameters(), self._best.weights, strict=True):
                for adapter, score in enumerate(self._best.scores):
                    if score > -math.inf:
                        parameter[adapter].copy_(best[adapter])
        return self._best.quality

    def log_probs(self, asked: Seq[Asked]) -> list[list[float]]:
        """Return the log probability of every label of each prompt."""
        conversations, read = to_score(asked, self._label_ids)
        found = [[0.0] * len(self._label_ids[one.classifier]) for one in asked]
        answers = iter(read)
        for batch in _passes(conversations, self._settings.step_tokens):
            for log_prob in self._trainee.log_probs(batch).tolist():
                number, label = next(answers)
                found[number][label] += log_prob
        return found

    def evaluate(self, asked: Seq[Asked]) -> list[Quality | None]:
        """Return each adapter's figures; None for those that no prompt is for. What the weights of labels added to the
        scores is taken off, as the contract's calibration will."""
        found: list[list[tuple[list[float], int, int]]] = [[] for _ in range(self._trainee.num_adapters)]
        diverged: set[int] = set()
        for one, log_probs in zip(asked, self.log_probs(asked), strict=True):
            if not all(map(math.isfinite, log_probs)):
                diverged.add(one.classifier)
                continue
            scores = (torch.tensor(log_probs) + torch.tensor(self._bias[one.classifier])).softmax(-1).tolist()
            found[one.classifier].append((scores, one.truth, max(range(len(scores)), key=scores.__getitem__)))
        self._freeze(diverged)
        if diverged and diverged == {one.classifier for one in asked}:
            raise DivergedError(self._step, sorted(diverged))
        return [
            quality(*zip(*rows, strict=True)) if rows and adapter not in diverged else None
            for adapter, rows in enumerate(found)
        ]

    def state(self) -> dict[str, Any]:
        """Return what `load_state` goes on from."""
        return {
            "step": self._step,
            "parameters": [one.detach() for one in self._trainee.parameters()],
            "optimizer": self._optimizer.state(),
            "diverged": self._diverged,
            "best": {
                "scores": self._best.scores,
                "weights": self._best.weights,
                "steps": self._best.steps,
                "misses": self._best.misses,
                "log_losses": self._best.log_losses,
                "quality": [
                    None if one is None else [one.n, one.accuracy, one.f1, one.auc, one.log_loss]
                    for one in self._best.quality
                ],
            },
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a state of the same data and settings."""
        self._step = state["step"]
        with torch.no_grad():
            for parameter, saved in zip(self._trainee.parameters(), state["parameters"], strict=True):
                parameter.copy_(saved)
        self._optimizer.load_state(state["optimizer"])
        self._diverged = state["diverged"]
        best = state["best"]
        self._best = _Best(
            scores=best["scores"],
            quality=[
                None
                if one is None
                else Quality(**dict(zip(("n", "accuracy", "f1", "auc", "log_loss"), one, strict=True)))
                for one in best["quality"]
            ],
            weights=best["weights"],
            steps=best["steps"],
            misses=best["misses"],
            log_losses=best["log_losses"],
        )

    def _learn(self, batch: Seq[Conversation]) -> tuple[list[float | None], int]:
        """One step of the optimizer. Each adapter's loss is the mean over its own questions in the whole step."""
        stopped = self.stopped
        batch = [_without(one, stopped) for one in batch]
        n = self._trainee.num_adapters
        totals = torch.zeros(n)
        for one in batch:
            for question in one.questions:
                totals[question.adapter] += sum(answer.weight for answer in question.answers)
        included = totals > 0
        losses, num_tokens = torch.zeros(n), 0
        for some in _passes(batch, self._settings.step_tokens):
            found, _ = self._trainee.losses(some)
            device = found.device
            (found / totals.to(device).clamp(min=1e-12)).sum().backward()
            losses += found.detach().cpu()
            num_tokens += sum(_num_tokens(one) for one in some)
        rates = torch.full((n,), self._rate(self._step), device=self._trainee.device)
        if included.any():
            sound = losses.isfinite()
            if sound[included].all():
                sound &= self._optimizer.step(rates, included.to(self._trainee.device)).isfinite().cpu()
            if not sound[included].all():
                self._freeze(self._diverging(batch, [one for one in range(n) if included[one] and not sound[one]]))
                if all(self.stopped[one] for one in range(n) if included[one]):
                    raise DivergedError(self._step + 1, sorted(self._diverged))
                return self._learn(batch)
        return [
            float(loss / total) if total > 0 else None for loss, total in zip(losses, totals, strict=True)
        ], num_tokens

    def _diverging(self, batch: Seq[Conversation], adapters: Seq[int]) -> Seq[int]:
        """Return which of the adapters have a gradient that is no number by themselves: in a common pass, it spreads to
        the others that attend to the same conversation."""
        for parameter in self._trainee.parameters():
            parameter.grad = None
        found = []
        for adapter in adapters if len(adapters) > 1 else ():
            others = [one != adapter for one in range(self._trainee.num_adapters)]
            for some in _passes([_without(one, others) for one in batch], self._settings.step_tokens):
                loss = self._trainee.losses(some)[0][adapter]
                gradients = torch.autograd.grad(loss, self._trainee.parameters())
                if not all(bool(one.isfinite().all()) for one in (loss, *gradients)):
                    found.append(adapter)
                    break
        return found or adapters

    def _freeze(self, adapters: Iterable[int]) -> None:
        """Stop adapters that diverged, with their best weights, so that the others go on."""
        for adapter in adapters:
            self._diverged[adapter] = self._step + 1
            with torch.no_grad():
                for parameter, best in zip(self._trainee.parameters(), self._best.weights, strict=True):
                    parameter[adapter].copy_(best[adapter])

    def _keep(self, found: Seq[Quality | None]) -> list[bool]:
        is_best, stopped = [], self.stopped
        for adapter, one in enumerate(found):
            score = -math.inf if one is None else _score(one, self._settings.select)
            better = score > self._best.scores[adapter] and not stopped[adapter]
            is_best.append(better)
            if better:
                self._best.scores[adapter], self._best.quality[adapter] = score, one
                self._best.steps[adapter] = self._step
                with torch.no_grad():
                    for best, parameter in zip(self._best.weights, self._trainee.parameters(), strict=True):
                        best[adapter].copy_(parameter[adapter])
            if one is not None:
                is_lower = one.log_loss < self._best.log_losses[adapter]
                self._best.log_losses[adapter] = min(one.log_loss, self._best.log_losses[adapter])
                is_miss = stopped[adapter] or not (better or is_lower)
                self._best.misses[adapter] = self._best.misses[adapter] + 1 if is_miss else 0
        return is_best

    def _rate(self, step: int) -> float:
        settings = self._settings
        warmup = max(1, round(settings.warmup * self.num_steps))
        falling = 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.num_steps)))
        return settings.learning_rate * min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * falling)

    def _batches(self) -> Iterator[list[Conversation]]:
        """Yield the batches that are left, in an order that seed and epoch alone decide."""
        size, epoch, done = self._settings.batch, 0, 0
        while done < self.num_steps:
            draw = random.Random(f"{self._settings.seed}/{epoch}")
            order = list(self._conversations)
            draw.shuffle(order)
            batches: list[list[Conversation]] = []
            for start in range(0, len(order), size * POOL):
                pool = sorted(order[start : start + size * POOL], key=_num_tokens)
                batches += [pool[at : at + size] for at in range(0, len(pool), size)]
            draw.shuffle(batches)
            for batch in batches[: self.num_steps - done]:
                done += 1
                if done > self._step:
                    yield batch
            epoch += 1


def _score(one: Quality, select: str) -> float:
    """Return a figure that is higher for better weights. Where it cannot be told, the log-loss decides, far below."""
    value = -one.log_loss if select == "log_loss" else getattr(one, select)
    return -1000.0 - one.log_loss if value is None else value - 1e-6 * one.log_loss


def _without(one: Conversation, stopped: Seq[bool]) -> Conversation:
    if not any(stopped):
        return one
    return Conversation(
        token_ids=one.token_ids,
        questions=tuple(question for question in one.questions if not stopped[question.adapter]),
    )


def _num_tokens(one: Conversation) -> int:
    return len(one.token_ids) + sum(len(question.token_ids) for question in one.questions)


def _apart(one: Conversation) -> list[Conversation]:
    return [Conversation(token_ids=(), questions=(question,)) for question in one.questions]


def _passes(conversations: Seq[Conversation], step_tokens: int) -> Iterator[list[Conversation]]:
    """Yield the conversations that have questions, in parts of at most `step_tokens` tokens, or of one conversation.
    Where the base computes nothing of it, its questions share nothing, and may be in different parts."""
    part: list[Conversation] = []
    size = 0
    for one in chain.from_iterable([whole] if whole.token_ids else _apart(whole) for whole in conversations):
        if not one.questions:
            continue
        if part and size + _num_tokens(one) > step_tokens:
            yield part
            part, size = [], 0
        part.append(one)
        size += _num_tokens(one)
    if part:
        yield part
