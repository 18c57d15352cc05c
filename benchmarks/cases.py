"""The cases of `python -m benchmarks.engine`: the engine and PEFT on the same texts and adapters."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.driver import NUM_ADAPTERS, RANK, Driver
from benchmarks.shapes import SHAPES, texts_work
from loraplex.adapters.slots import NO_ADAPTER
from loraplex.engine.scheduler import Scheduler
from loraplex.engine.sequence import Sequence
from loraplex.planning.work import Run, Work

NUM_TEXTS, TEXT_TOKENS = 32, 256
CONVERSATION, SUFFIX, NEW_TURN = 500, 12, 40
MIXED, FIRST_TURN, NEXT_TURN = "16 adapters mixed", "16 verdicts, shared", "next turn, shared"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One thing to time. The result of `prepare`, which is not timed, is the argument of `run`."""

    name: str
    num_prompt_tokens: int
    work: Work
    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


class Texts:
    """Random texts of a shape, the same in every process."""

    def __init__(self, shape: str) -> None:
        generator = torch.Generator().manual_seed(1)

        def texts(num: int, num_tokens: int) -> list[list[int]]:
            found: list[list[int]] = torch.randint(
                3, SHAPES[shape]["vocab_size"], (num, num_tokens), generator=generator
            ).tolist()
            return found

        self.shape = shape
        self.mixed = texts(NUM_TEXTS, TEXT_TOKENS)
        [self.conversation], [self.new_turn] = texts(1, CONVERSATION), texts(1, NEW_TURN)
        self.suffixes = texts(NUM_ADAPTERS, SUFFIX)

    @property
    def num_mixed_tokens(self) -> int:
        return NUM_TEXTS * TEXT_TOKENS

    def mixed_work(self, num_adapters: int) -> Work:
        runs = [Run(TEXT_TOKENS, 0, num_adapters)] * NUM_TEXTS
        return texts_work(self.shape, runs, num_adapters=num_adapters, rank=RANK, num_rows=NUM_TEXTS)

    def verdicts_work(self, num_old: int, num_new: int, shared: bool) -> Work:
        """16 verdicts on `num_old` cached tokens, `num_new` other ones, and the suffixes."""
        conversations = [Run(num_new, num_old)] if shared else [Run(num_new, num_old, 1)] * NUM_ADAPTERS
        suffixes = [Run(SUFFIX, num_old + num_new, 1)] * NUM_ADAPTERS
        return texts_work(
            self.shape, [*conversations, *suffixes], num_adapters=NUM_ADAPTERS, rank=RANK, num_rows=NUM_ADAPTERS
        )


def engine_cases(texts: Texts, driver: Driver) -> list[Case]:
    """The base alone, adapters mixed, and 16 verdicts on one conversation without and with sharing."""

    def packed(slot_of: Callable[[int], int]) -> Callable[[Any], object]:
        return lambda _: driver.run(
            driver.scheduler(), ([driver.sequence(tokens, slot_of(i))] for i, tokens in enumerate(texts.mixed))
        )

    longer = texts.conversation + texts.new_turn
    total = texts.num_mixed_tokens
    first, next_turn = shared_cases(texts, driver)
    return [
        Case(name="base only", num_prompt_tokens=total, work=texts.mixed_work(0), run=packed(lambda i: NO_ADAPTER)),
        Case(
            name=MIXED,
            num_prompt_tokens=total,
            work=texts.mixed_work(NUM_ADAPTERS),
            run=packed(lambda i: i % NUM_ADAPTERS),
        ),
        Case(
            name="16 verdicts, plain",
            num_prompt_tokens=first.num_prompt_tokens,
            work=texts.verdicts_work(0, CONVERSATION, False),
            run=lambda _: driver.run(driver.scheduler(), [_verdicts(texts, driver, texts.conversation, False)]),
        ),
        first,
        Case(
            name="next turn, plain",
            num_prompt_tokens=next_turn.num_prompt_tokens,
            work=texts.verdicts_work(0, CONVERSATION + NEW_TURN, False),
            run=lambda _: driver.run(driver.scheduler(), [_verdicts(texts, driver, longer, False)]),
        ),
        next_turn,
    ]


def shared_cases(texts: Texts, driver: Driver, note: str = "") -> tuple[Case, Case]:
    """16 verdicts on one conversation that is computed once, and on its next turn. note: ends the cases' names."""
    longer = texts.conversation + texts.new_turn

    def after_first_turn() -> Scheduler:
        scheduler = driver.scheduler()
        driver.run(scheduler, [_verdicts(texts, driver, texts.conversation, True)])
        return scheduler

    return (
        Case(
            name=FIRST_TURN + note,
            num_prompt_tokens=NUM_ADAPTERS * (CONVERSATION + SUFFIX),
            work=texts.verdicts_work(0, CONVERSATION, True),
            run=lambda _: driver.run(driver.scheduler(), [_verdicts(texts, driver, texts.conversation, True)]),
        ),
        Case(
            name=NEXT_TURN + note,
            num_prompt_tokens=NUM_ADAPTERS * (CONVERSATION + NEW_TURN + SUFFIX),
            work=texts.verdicts_work(CONVERSATION // 16 * 16, NEW_TURN + CONVERSATION % 16, True),
            prepare=after_first_turn,
            run=lambda scheduler: driver.run(scheduler, [_verdicts(texts, driver, longer, True)]),
        ),
    )


def _verdicts(texts: Texts, driver: Driver, conversation: Seq[int], shared: bool) -> list[Sequence]:
    n = len(conversation) if shared else 0
    return [driver.sequence((*conversation, *suffix), slot, n) for slot, suffix in enumerate(texts.suffixes)]


def peft_cases(texts: Texts, base: Any) -> list[Case]:
    """PEFT as its users run it: one adapter after the other, and its mixed batch; logits of the last position only.
    base: transformers' model, which PEFT changes."""
    from peft import LoraConfig, get_peft_model

    device, dtype = base.device, base.dtype
    names = [f"a{i}" for i in range(NUM_ADAPTERS)]
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.01)
    model.to(dtype).eval()
    ids = torch.tensor(texts.mixed, device=device)

    @torch.inference_mode()
    def one_by_one(_: Any) -> None:
        for i in range(len(ids)):
            model.set_adapter(names[i % NUM_ADAPTERS])
            model(input_ids=ids[i : i + 1], use_cache=False, logits_to_keep=1).logits.log_softmax(-1)

    @torch.inference_mode()
    def mixed(_: Any) -> None:
        model.set_adapter(names[0])
        adapter_names = [names[i % NUM_ADAPTERS] for i in range(len(ids))]
        model(input_ids=ids, use_cache=False, logits_to_keep=1, adapter_names=adapter_names).logits.log_softmax(-1)

    mixed_work = texts.mixed_work(NUM_ADAPTERS)
    return [
        Case(name="PEFT one by one", num_prompt_tokens=texts.num_mixed_tokens, work=mixed_work, run=one_by_one),
        Case(name="PEFT mixed batch", num_prompt_tokens=texts.num_mixed_tokens, work=mixed_work, run=mixed),
    ]
