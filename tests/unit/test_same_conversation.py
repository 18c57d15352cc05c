"""What is one conversation: copies, turns, and what a file says."""

from typing import Any

from loraplex.labelled import Labelled
from loraplex.same_conversation import NO_PROMPTS, Prompts, conversations, copies
from loraplex.training.split import SIDES, report_on, split_rows
from loraplex.types import Message

CHAT = ["Customer: My room is cold.", "Agent: I see.", "Customer: Thank you.", "Agent: Bye."]


def rows_of(*texts: Any, ids: tuple[str | None, ...] = ()) -> list[Labelled]:
    return [
        Labelled(line=line, input=text, labels={"a": True}, conversation_id=id)
        for line, (text, id) in enumerate(zip(texts, ids or (None,) * len(texts), strict=True))
    ]


def grouped(rows: list[Labelled], prompts: Prompts = NO_PROMPTS) -> list[list[int]]:
    found: dict[str, list[int]] = {}
    for index, id in enumerate(conversations(rows, prompts)):
        found.setdefault(id, []).append(index)
    return list(found.values())


def test_a_conversation_that_grows_is_one_whatever_the_order_and_the_form() -> None:
    turns = ["\n".join(CHAT[:num]) for num in (3, 1, 4, 2)]
    rows = rows_of(turns[0], "Customer: another", *turns[1:], "customer:  my room is\tCOLD.\n\nAgent: I see.")
    assert grouped(rows) == [[0, 2, 3, 4, 5], [1]]
    said = [Message(role="user", content=line) for line in CHAT]
    assert grouped(rows_of(*(tuple(said[:num]) for num in (1, 2, 4)))) == [[0, 1, 2]]
    assert conversations(rows)[0] == conversations(rows[::-1])[-1]


def test_half_a_turn_is_no_beginning() -> None:
    assert grouped(rows_of("Customer: Hi", "Customer: Hire me", "Customer: Hi there\nAgent: Hi")) == [[0], [1], [2]]


def test_a_greeting_with_which_many_begin_ties_nothing_together() -> None:
    ways = [f"Agent: Welcome!\nCustomer: {word}" for word in "abcdefg"]
    longer = [f"{way}\nAgent: I see." for way in ways]
    assert grouped(rows_of("Agent: Welcome!", *ways, *longer)) == [[0], *([1 + one, 8 + one] for one in range(7))]
    assert grouped(rows_of("Agent: Welcome!", *ways[:3])) == [[0, 1, 2, 3]], "few ways are edits of one conversation"


def test_the_file_and_the_prompts_say_it_too() -> None:
    rows = rows_of("a", "b", "c", "d", "e", ids=("4", None, "4", "5", None))
    assert grouped(rows) == [[0, 2], [1], [3], [4]]
    assert grouped(rows, {1: [(0, (1, 2))], 3: [(0, (1, 2)), (1, (1,))], 4: [(1, (1,))]}) == [[0, 2], [1, 3, 4]]
    assert copies(rows, {1: [(0, (1, 2))], 3: [(0, (1, 2))]}) == [0, 1, 2, 1, 4], "the same id makes no copy"


def test_all_turns_of_a_chat_are_on_one_side_of_a_split() -> None:
    chats = [[f"Customer: {chat}", f"Agent: {chat}", f"Customer: more {chat}"] for chat in range(40)]
    rows = rows_of(*("\n".join(chat[: 1 + turn]) for turn in range(3) for chat in chats))
    split = split_rows(rows, dev=0.2, calibration=0.2, seed=0)
    side_of = {index: side for side in SIDES for index in getattr(split, side)}
    assert all(side_of[chat] == side_of[chat + 40] == side_of[chat + 80] for chat in range(40))
    assert {side: len(getattr(split, side)) for side in SIDES} == {"train": 72, "dev": 24, "calibration": 24}


def test_the_same_prompt_is_a_duplicate_in_the_report() -> None:
    rows = rows_of("a", "b", "c")
    prompts = {0: [(0, (1,), (2,))], 2: [(0, (1,), (2,))]}
    for seed in range(5):
        split = split_rows(rows, dev=0.5, calibration=0.0, seed=seed, prompts=prompts)
        assert (0 in split.train) == (2 in split.train)
    assert report_on(rows, {"a": ["yes", "no"]}, split, [], prompts=prompts).num_duplicates == 1
