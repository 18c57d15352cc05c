"""A system in a process of its own that is asked in process: `python -m loraplex.bench.worker`.

Reads JSON lines from standard input: first {"bundle", "engine"}, then loads. Answers in JSON lines: {"classifiers"} or
{"error"}, then {"ended": 1} for each conversation, and {"samples"} at a load's end. Ends with its input.
"""

import json
import os
import sys
from typing import Any

from loraplex.bench.call import Call, Reply
from loraplex.bench.load import Load, generate
from loraplex.errors import LoraplexError, OverloadedError
from loraplex.inprocess import Loraplex
from loraplex.types import ClassifyRequest


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    job = json.loads(sys.stdin.readline())

    def answer(line: dict[str, Any]) -> None:
        print(json.dumps(line), file=answers, flush=True)

    try:
        loraplex = Loraplex.load(job["bundle"], **job["engine"])
    except LoraplexError as exc:
        answer({"error": str(exc)})
        return
    with loraplex:
        answer({"classifiers": {one.name: one.error.message if one.error else "" for one in loraplex.adapters()}})
        for line in sys.stdin:
            load = Load.from_json(json.loads(line))
            samples = loraplex.run(generate(lambda call: ask(loraplex, call), load, lambda: answer({"ended": 1})))
            answer({"samples": [one.to_json() for one in samples]})


async def ask(loraplex: Loraplex, call: Call) -> Reply:
    """Ask on the event loop of `loraplex`. Never raises for what it answers."""
    request = ClassifyRequest(
        input=call.input, classifiers=call.classifiers, conversation_id=call.conversation_id, cascade=False
    )
    try:
        return Reply.of(await loraplex.router.classify(request))
    except LoraplexError as exc:
        return Reply(status="refused" if isinstance(exc, OverloadedError) else "failed", error=exc.code)


if __name__ == "__main__":
    main()
