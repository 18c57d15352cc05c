"""Every system gets the same conversations, and none that it knows from before."""

from loraplex.bench.load import Job
from loraplex.bench.supply import Supply, turns_of
from loraplex.labelled import Labelled
from loraplex.types import Message

ROWS = [Labelled(line=i, input=f"Customer: hello {i}", labels={}) for i in range(3)]
MESSAGES = tuple(Message(role=role, content=text) for role, text in (("user", "a"), ("assistant", "b"), ("user", "c")))


def texts(job: Job) -> list[object]:
    return [call.input for calls in job.turns for call in calls]


def test_a_text_is_asked_once_as_it_is_and_then_with_a_number_that_is_new() -> None:
    supply = Supply(ROWS, ("a", "b"))
    warm = supply.take("warm-up", 0)
    jobs = [supply.take("measured", index) for index in range(1, 5)]
    assert texts(warm) == ["#1 Customer: hello 2"]
    assert [texts(one) for one in jobs] == [
        *(["Customer: hello 0"], ["Customer: hello 1"], ["Customer: hello 2"]),
        ["#2 Customer: hello 0"],
    ]
    assert [one.repeat for one in jobs] == [0, 0, 0, 1]
    assert texts(supply.take("measured", 5, counts=False)) == ["#3 Customer: hello 1"]
    assert texts(supply.take("cool-down", 6)) == ["#4 Customer: hello 0"], "each is another one"


def test_all_classifiers_together_or_each() -> None:
    [calls] = Supply(ROWS, ("a", "b")).take("measured", 0).turns
    assert [call.classifiers for call in calls] == [("a", "b")] and calls[0].conversation_id is None
    [calls] = Supply(ROWS, ("a", "b"), asking="each").take("measured", 0).turns
    assert [call.classifiers for call in calls] == [("a",), ("b",)]


def test_turns_are_those_of_the_one_who_spoke_last() -> None:
    text = "Customer: Hi\nAgent: Yes?\nmore of it\nCustomer: A table: two\nAgent: Where?\nCustomer: Here"
    lines = text.splitlines()
    assert turns_of(text) == ["Customer: Hi", "\n".join(lines[:4]), text]
    assert turns_of("no names in it\nat all") == ["no names in it\nat all"]
    assert turns_of(MESSAGES) == [MESSAGES[:1], MESSAGES]


def test_turns_of_a_conversation_share_an_id_that_no_other_has() -> None:
    supply = Supply([Labelled(line=1, input=MESSAGES, labels={})], ("a",), turns=True)
    first, second, warm = supply.take("measured", 0), supply.take("measured", 1), supply.take("warm-up", 2)
    ids = [{call.conversation_id for calls in job.turns for call in calls} for job in (first, second, warm)]
    assert [len(one) for one in ids] == [1, 1, 1] and len(set.union(*ids)) == 3
    begun = second.turns[0][0].input
    assert isinstance(begun, tuple) and begun[0].content == "#1 a" and len(second.turns) == 2
