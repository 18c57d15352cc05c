"""The scheduler, steps and blocks on a simulated clock and a simulated model that knows what each block holds."""

import itertools
from collections.abc import Callable
from collections.abc import Sequence as Seq

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraplex.adapters.slots import NO_ADAPTER
from loraplex.engine.block_pool import BASE_KV, BLOCK_SIZE, BlockPool, block_hashes
from loraplex.engine.scheduler import Scheduler
from loraplex.engine.sequence import EngineRequest, Sampling, Sequence, Target, Token
from loraplex.engine.step import Step
from loraplex.errors import CancelledError, DeadlineExceededError, LoraplexError
from sound import check_blocks

UNIQUE = itertools.count(1000)
Content = tuple[tuple[bytes, int], ...]  # (K/V identity, token) of every position up to a block's end


def sequence(
    tokens: Seq[int],
    slot: int = NO_ADAPTER,
    *,
    activation: int = 0,
    num_kept: int = 0,
    targets: int = 1,
    max_tokens: int = 1,
) -> Sequence:
    return Sequence(
        token_ids=tuple(tokens),
        slot=slot,
        kv_id=BASE_KV if slot == NO_ADAPTER else bytes([slot + 1]) * 32,
        activation=activation,
        num_kept=num_kept,
        targets=tuple(Target(position=-1 - i, token_id=0) for i in range(targets)),
        sampling=Sampling(max_tokens=max_tokens),
    )


def request(*num_tokens: int, slot: int = NO_ADAPTER, deadline_s: float | None = None) -> EngineRequest:
    """Sequences that share nothing."""
    texts = [(next(UNIQUE), *range(n - 1)) for n in num_tokens]
    return EngineRequest([sequence(text, slot) for text in texts], deadline_s=deadline_s)


def scheduler(*, tokens: int = 100, sequences: int = 10, blocks: int = 0) -> Scheduler:
    return Scheduler(max_step_tokens=tokens, max_step_sequences=sequences, pool=BlockPool(blocks))


class SimulatedModel:
    """Runs steps as the engine does, and asserts that every block read holds what its reader would have computed."""

    def __init__(self, policy: Scheduler) -> None:
        self.policy = policy
        self.contents: dict[int, Content] = {}
        self.now = 0.0
        self.finished: dict[Sequence, float] = {}
        self.steps: list[int] = []
        self.dropped: list[tuple[Sequence, LoraplexError]] = []

    def step(self, *, fails: Callable[[int], bool] = lambda index: False) -> bool:
        """A second for every 1,000 tokens; False where nothing was to be done. fails: whether the sequence of that
        place in the step fails."""
        step, dropped = self.policy.next_step(self.now)
        self.dropped += dropped
        if step is None:
            return False
        self.check(step)
        self.steps.append(step.num_tokens)
        self.check_budget(step)
        self.now += step.num_tokens / 1000
        failed = {placed.sequence for index, placed in enumerate(step.placed) if fails(index)}
        for half in step.halves() if failed else (step,):  # as the engine does, down to those that fail alone
            assert half.num_tokens <= step.num_tokens
            self.check(half)
            for placed in half.placed:
                for index, block in placed.kept.items():
                    end = placed.kept_positions(index).stop
                    written = content(placed.sequence, end)
                    if placed.sequence not in failed:
                        self.contents[block] = written
                    elif self.contents.get(block, ())[:end] != written:  # else it wrote what was there already
                        self.contents[block] = ()
        answered = [one.sequence for one in step.placed if not one.is_chunk and one.sequence not in failed]
        generating = {one for one in answered if one.append(Token(7 + one.num_tokens % 5, 0.0))}
        self.finished |= {one: self.now for one in (*answered, *failed) if one not in generating}
        self.policy.finish(step, failed=failed, generating=generating, seconds=step.num_tokens / 1000)
        check_blocks(self.policy.pool)
        return True

    def check_budget(self, step: Step) -> None:
        """A step exceeds the budget only with one sequence, where there were too few blocks for a chunk of it, or where
        the tokens whose logits are wanted, which are computed together, are more."""
        budget = self.policy.max_step_tokens
        if step.num_tokens > budget:
            [placed] = step.placed
            last_block = min((placed.start + budget) // BLOCK_SIZE, placed.sequence.num_cacheable_blocks)
            num_wanted = last_block - placed.start // BLOCK_SIZE
            num_free = self.policy.pool.num_available + sum(index >= len(placed.cached) for index in placed.kept)
            assert num_wanted <= 0 or num_free < num_wanted, f"{step.num_tokens} tokens, {num_free} blocks are free"

    def check(self, step: Step) -> None:
        assert step.num_tokens == sum(run.num_tokens for run in step.runs())
        for placed in step.placed:
            assert placed.last is not None
            path, position = placed.last.path(), placed.start
            for run in path:
                assert run.start == position and run.cached == placed.cached
                assert run.token_ids == placed.sequence.token_ids[run.start : run.end]
                assert run.slot == (NO_ADAPTER if run.start < placed.sequence.activation else placed.sequence.slot)
                position = run.end
            assert position == placed.end
            assert placed.start <= placed.sequence.num_tokens - len(placed.sequence.targets)
            for index, block in enumerate(placed.cached):
                end = min((index + 1) * BLOCK_SIZE, placed.start)
                assert self.contents[block][:end] == content(placed.sequence, end)

    def run(self) -> None:
        while self.step():
            pass


def content(one: Sequence, end: int) -> Content:
    """What the K/V up to `end` depends on: who computes each token, and all tokens."""
    identities = [BASE_KV if i < one.activation else one.kv_id for i in range(end)]
    return tuple(zip(identities, one.token_ids[:end], strict=True))


# ------------------------------------------------------------------------------------------------- budgets


def test_fills_a_step_up_to_the_token_budget() -> None:
    policy, wanted = scheduler(), request(60, 30, 20)
    policy.add(wanted, 0.0)
    steps = [policy.next_step(0.0)[0] for _ in range(3)]
    assert [[placed.sequence for placed in step.placed] for step in steps if step] == [
        list(wanted.sequences[:2]),
        [wanted.sequences[2]],
    ]


def test_fills_a_step_up_to_the_sequence_budget() -> None:
    model = SimulatedModel(scheduler(sequences=2))
    model.policy.add(request(1, 1, 1), 0.0)
    model.run()
    assert len(model.steps) == 2


def test_a_step_holds_few_rows_of_logits() -> None:
    policy = scheduler(tokens=10_000, sequences=600)
    asked = EngineRequest([sequence((next(UNIQUE), *range(699)), targets=num) for num in (300, 212, 1, 700, 1)])
    policy.add(asked, now=0.0)
    rows = []
    while (step := policy.next_step(0.0)[0]) is not None:
        rows.append([one.sequence.num_rows for one in step.placed])
        policy.finish(step)
    assert rows == [[300, 212, 1], [700], [1]]  # one that is larger runs alone


def test_without_blocks_a_prompt_beyond_the_budget_runs_alone() -> None:
    model = SimulatedModel(scheduler())
    model.policy.add(request(500, 1), 0.0)
    model.run()
    assert model.steps == [500, 1]


def test_knows_the_tokens_that_wait_and_how_long_they_take() -> None:
    model = SimulatedModel(scheduler(sequences=1))
    model.policy.add(request(100), 0.0)
    model.step()
    texts = [[next(UNIQUE), *range(99)] for _ in range(2)]
    shared = EngineRequest([sequence(texts[0], 0, targets=1), sequence(texts[0], 0, targets=2)])
    model.policy.add(shared, 0.0)  # 100 tokens, which two sequences share
    model.policy.add(request(60, 40), 0.0)
    assert model.policy.num_waiting_tokens == 200
    assert model.policy.wait_s == pytest.approx(0.2)  # at 1,000 tokens a second
    model.run()
    assert model.policy.wait_s == model.policy.num_waiting_tokens == 0


def test_what_a_request_costs_is_known_before_it_is_queued() -> None:
    model = SimulatedModel(scheduler(tokens=1000, sequences=100, blocks=100))
    asked = aloras(range(200, 300), 16)
    assert model.policy.cost(asked) == 100 + 16 * 4
    model.policy.add(asked, 0.0)
    model.run()
    assert model.policy.cost(aloras(range(200, 330), 16)) == 130 - 96 + 16 * 4


def test_what_is_dropped_waits_no_more() -> None:
    model = SimulatedModel(scheduler())
    model.policy.add(request(10), 0.0)
    model.run()
    model.policy.add(request(40, 33, deadline_s=model.now + 1), model.now)
    model.policy.add(request(200, 11), model.now)
    assert model.policy.wait_s == pytest.approx(0.284)
    model.now += 2
    model.policy.next_step(model.now)  # drops the late ones and takes the 11
    assert model.policy.wait_s == pytest.approx(0.106)  # half of 211 was counted to it


def test_drops_what_is_late_or_abandoned() -> None:
    model = SimulatedModel(scheduler())
    late, abandoned, fine = request(1, deadline_s=5.0), request(1), request(1, deadline_s=6.0)
    for one in (late, abandoned, fine):
        model.policy.add(one, 0.0)
    abandoned.future.cancel()
    model.now = 5.0
    model.run()
    assert list(model.finished) == list(fine.sequences)
    assert [type(error) for _, error in model.dropped] == [DeadlineExceededError, CancelledError]
    assert len(model.policy) == 0


# -------------------------------------------------------------------------------------------- order and fairness


def test_the_shortest_work_comes_first_but_waiting_counts() -> None:
    model = SimulatedModel(scheduler(tokens=1000))
    old, long, short = request(950), request(900), request(500)
    model.policy.add(old, 0.0)
    model.policy.add(long, 0.3)
    model.policy.add(short, 0.3)
    model.run()
    assert list(model.finished) == [*old.sequences, *short.sequences, *long.sequences]


def test_a_cold_adapter_is_not_starved_by_a_flood_of_a_hot_one() -> None:
    """A hot adapter keeps hundreds of requests waiting, the cold one asks now and then: it waits for about one step."""
    model = SimulatedModel(scheduler(tokens=1000, sequences=100))
    cold: list[EngineRequest] = []
    for _ in range(200):
        for _ in range(15):  # more than a step takes
            model.policy.add(request(100, slot=0), model.now)
        cold.append(request(100, slot=1))
        model.policy.add(cold[-1], model.now)
        model.step()
    waits = sorted(model.finished[one.sequences[0]] - one.sequences[0].arrived_s for one in cold)
    assert len(model.policy) > 500, "there is no flood"
    assert waits[int(0.99 * len(waits))] <= 1.0, "the cold adapter waits longer than one step"


def test_a_flow_that_comes_back_does_not_make_up_for_its_absence() -> None:
    model = SimulatedModel(scheduler(tokens=100))
    for _ in range(50):
        model.policy.add(request(100, slot=0), model.now)
    for _ in range(30):
        model.step()
    for _ in range(20):
        model.policy.add(request(100, slot=1), model.now)
    before = len(model.finished)
    for _ in range(20):
        model.step()
    slots = [one.slot for one in list(model.finished)[before:]]
    assert slots.count(0) >= 9 and slots.count(1) >= 9


# -------------------------------------------------------------------------------------------- sharing and blocks


def aloras(conversation: Seq[int], num: int, num_suffix: int = 4) -> EngineRequest:
    """`num` activated adapters on one conversation, each with a question of its own behind it."""
    n = len(conversation)
    return EngineRequest(
        [
            sequence((*conversation, 7, *range(100 + i, 99 + i + num_suffix)), i, activation=n, num_kept=n)
            for i in range(num)
        ]
    )


def test_a_conversation_is_computed_once_for_all_activated_adapters_and_its_next_turn_only_where_it_is_new() -> None:
    model = SimulatedModel(scheduler(tokens=1000, sequences=100, blocks=100))
    model.policy.add(aloras(range(200, 300), 16), 0.0)
    model.run()
    model.policy.add(aloras(range(200, 330), 16), 0.0)
    model.run()
    assert model.steps == [100 + 16 * 4, 130 - 96 + 16 * 4]


def test_a_plain_adapters_conversation_is_found_by_itself_only() -> None:
    model = SimulatedModel(scheduler(tokens=1000, blocks=100))
    for slot in (0, 0, 1):
        model.policy.add(EngineRequest([sequence(range(100), slot, num_kept=96)]), 0.0)
        model.run()
    assert model.steps == [100, 4, 100]


def test_what_is_not_kept_leaves_no_blocks_behind() -> None:
    model = SimulatedModel(scheduler(tokens=1000, blocks=100))
    model.policy.add(EngineRequest([sequence(range(100), 0)]), 0.0)
    model.run()
    assert not model.contents


def test_the_tokens_whose_logits_are_wanted_are_computed_even_if_they_are_cached() -> None:
    model = SimulatedModel(scheduler(tokens=1000, blocks=100))
    for _ in range(2):
        model.policy.add(EngineRequest([sequence(range(96), 0, num_kept=96, targets=17)]), 0.0)
        model.run()
    assert model.steps == [96, 32]


def test_short_beginnings_are_shared_within_a_request_only() -> None:
    texts = [(0, *range(10 * i, 10 * i + 9)) for i in range(1, 4)]  # one BOS, and nothing else in common
    model = SimulatedModel(scheduler())
    model.policy.add(EngineRequest([sequence(text) for text in texts]), 0.0)
    model.run()
    for text in texts:
        model.policy.add(EngineRequest([sequence(text)]), 0.0)
    model.run()
    assert model.steps == [28, 30]


def test_a_long_prompt_runs_in_chunks_and_another_finds_them() -> None:
    model = SimulatedModel(scheduler(tokens=64, blocks=40))
    model.policy.add(EngineRequest([sequence(range(300), 0)]), 0.0)
    model.policy.add(EngineRequest([sequence(range(20), 1)]), 0.0)
    model.run()
    assert max(model.steps) <= 64 + BLOCK_SIZE
    assert sum(model.steps) == 320
    model.policy.add(EngineRequest([sequence(range(320), 0, num_kept=320)]), 0.0)
    model.run()
    assert sum(model.steps) == 320 + 320 - 256
    assert len(model.finished) == 3


def test_a_chunked_prompt_that_is_abandoned_gives_its_blocks_back() -> None:
    model = SimulatedModel(scheduler(tokens=64, blocks=40))
    wanted = EngineRequest([sequence(range(300), 0)])
    model.policy.add(wanted, 0.0)
    model.step()
    wanted.future.cancel()
    model.run()
    assert len(model.policy) == 0
    assert model.policy.pool.num_available == 40


@pytest.mark.parametrize("blocks", [188, 200, 400])
def test_a_long_prompt_keeps_to_the_budget_where_there_are_blocks_for_it(blocks: int) -> None:
    model = SimulatedModel(scheduler(tokens=512, blocks=blocks))
    model.policy.add(EngineRequest([sequence(range(3000))]), 0.0)
    model.run()
    assert model.steps == [512, 512, 512, 512, 512, 440]


def test_two_long_prompts_that_do_not_fit_together_both_finish() -> None:
    model = SimulatedModel(scheduler(tokens=64, blocks=20))
    for slot in (0, 1):
        model.policy.add(EngineRequest([sequence(range(300), slot)]), 0.0)
    model.run()
    assert len(model.finished) == 2


TEXT = st.lists(st.integers(0, 1), max_size=70).map(lambda tail: (5,) * 20 + tuple(tail))
SEQUENCE = st.builds(
    lambda text, slot, activation, num_kept, targets, max_tokens: sequence(
        text,
        slot,
        activation=min(activation, len(text) - targets),
        num_kept=min(num_kept, len(text)),
        targets=0 if max_tokens > 1 else targets,
        max_tokens=max_tokens,
    ),
    TEXT,
    st.integers(NO_ADAPTER, 2),
    st.sampled_from([0, 0, 16, 20, 22, 33, 50]),
    st.sampled_from([0, 40, 200]),
    st.integers(1, 18),
    st.sampled_from([1, 1, 2, 20]),
)


@settings(max_examples=300, deadline=None)
@given(
    traffic=st.lists(st.tuples(st.lists(SEQUENCE, min_size=1, max_size=4), st.integers(0, 3)), max_size=25),
    tokens=st.sampled_from([16, 60, 200]),
    blocks=st.sampled_from([0, 3, 10, 60]),
)
def test_random_traffic_never_reads_a_block_that_holds_something_else(
    traffic: list[tuple[list[Sequence], int]], tokens: int, blocks: int
) -> None:
    """Requests arrive, and after each a step runs, or fails, or the request is abandoned; the few blocks are evicted
    all the time. No reference stays behind."""
    model = SimulatedModel(scheduler(tokens=tokens, blocks=blocks))
    for sequences, event in traffic:
        wanted = EngineRequest(sequences)
        model.policy.add(wanted, model.now)
        if event == 0:
            wanted.future.cancel()
        model.step(fails=(lambda index: index % 2 == 0) if event == 1 else lambda index: False)
    model.run()
    assert len(model.policy) == 0
    assert model.policy.pool.num_available == blocks, "a reference stayed behind"


def test_halves_compute_no_more_where_the_shared_third_is_in_the_other_half() -> None:
    """The first and the third are of one request, and share less than a block with the second."""
    text = [5] * 20
    first, third = sequence(text, NO_ADAPTER), sequence(text, 0, activation=15)
    second = sequence(text, 0, activation=16)
    EngineRequest([first, third])
    EngineRequest([second])
    step = Step.of([first, second, third])
    assert step.num_tokens == 29
    assert [half.num_tokens for half in step.halves()] == [20, 25]


# ------------------------------------------------------------------------------------------------------- blocks


def test_hashes_tell_identity_tokens_and_history_apart() -> None:
    one, other = bytes([1] * 32), bytes([2] * 32)
    tokens = list(range(48))
    chains = [
        block_hashes(tokens, 0, one),
        block_hashes(tokens, 0, other),
        block_hashes([99, *tokens[1:]], 0, one),
        block_hashes(tokens, 48, one),
    ]
    assert all(len(chain) == 3 for chain in chains)
    assert len({digest for chain in chains for digest in chain}) == 12
    # Tokens 0-31 are the base's for both; the block with the activation in it is the adapter's.
    assert block_hashes(tokens, 40, one)[:2] == block_hashes(tokens, 33, other)[:2] == chains[3][:2]
    assert block_hashes(tokens, 40, one)[2] != block_hashes(tokens, 33, other)[2]


def test_the_block_not_used_for_longest_is_evicted_and_a_chain_from_its_end() -> None:
    pool = BlockPool(4)
    chains = {name: block_hashes([number] * 32, 0, BASE_KV) for number, name in enumerate("ab")}
    for chain in chains.values():
        blocks = pool.allocate(2)
        assert blocks is not None
        for block, digest in zip(blocks, chain, strict=True):
            pool.register(block, digest)
        pool.release(blocks)
    pool.acquire(pool.match(chains["a"]))
    pool.release(pool.match(chains["a"]))  # used again: now "b" is the older one
    assert pool.allocate(1) is not None
    assert len(pool.match(chains["b"])) == 1 and len(pool.match(chains["a"])) == 2
    assert pool.allocate(4) is None
    check_blocks(pool)
