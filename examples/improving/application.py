"""Stands for your application: asks the route `done` about conversations, and tells Loraplex what was right.

Run beside `loraplex serve …`: python -m examples.improving.application 1
"""

import random
import sys
from itertools import product

from loraplex import Client

OPENINGS = (
    "My parcel never came.",
    "The app logs me out.",
    "You billed me twice.",
    "My room has no heating.",
    "The voucher is refused.",
    "My seat was given away.",
)
ANSWERS = (
    "I have sent a new one.",
    "Please try again now.",
    "It is corrected.",
    "A colleague is on the way.",
    "You have a new code.",
    "I have booked another one.",
)
ENDINGS = {
    "yes": ("That did the trick, cheers!", "Sorted, you may close this.", "Lovely, nothing else from my side."),
    "no": ("Nope, same as before.", "Hold on, that is not it.", "Well, now there is another thing."),
}
NUM_WEEKS = 2


def conversations(week: int) -> list[tuple[str, str]]:
    """Return a week's conversations: text, and what an agent says afterwards. No two weeks have one in common."""
    found = [
        (f"Customer: {opening}\nAgent: {answer}\nCustomer: {ending}", label)
        for label, endings in ENDINGS.items()
        for opening, answer, ending in product(OPENINGS, ANSWERS, endings)
    ]
    random.Random(0).shuffle(found)
    return found[week - 1 :: NUM_WEEKS]


def main() -> None:
    num_right, found = 0, conversations(int(sys.argv[1]))
    with Client() as client:
        for text, label in found:
            verdict = client.classify(text, "done")["done"]
            assert verdict.id is not None
            num_right += verdict.label == label
            client.feedback(verdict.id, label)
    print(f"{num_right} of {len(found)} verdicts were right")


if __name__ == "__main__":
    main()
