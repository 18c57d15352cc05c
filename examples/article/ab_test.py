"""The article's A/B test: first drawn by the client, as in the article, then by a route of the server.

    python examples/article/ab_test.py http://127.0.0.1:8000

Both versions are the demo's issueResolved here. With a route the caller asks one name, all turns of a conversation stay
with one version, and feedback shows which version is right more often.
"""

import random
import sys
from collections import Counter

from prompt import BUNDLE, CONVERSATION

from loraplex import Client

VERSIONS = ("issueResolved_v1", "issueResolved_v2")

with Client(sys.argv[1]) as client:
    for version in VERSIONS:
        client.load_adapter(version, (BUNDLE / "issueResolved").resolve())

    drawn: Counter[str] = Counter()
    for _ in range(100):
        adapter = "issueResolved_v2" if random.random() < 0.1 else "issueResolved_v1"
        drawn[client.classify(CONVERSATION, adapter).verdicts[0].classifier] += 1
    print("drawn by the client: ", dict(sorted(drawn.items())))

    client.set_route("isResolved", {"issueResolved_v1": 90, "issueResolved_v2": 10})
    for number in range(100):
        for _ in range(2):  # two turns, one version
            verdict = client.classify(CONVERSATION, "isResolved", conversation_id=f"conversation {number}")[
                "isResolved"
            ]
        client.feedback(verdict.id or "", "yes")  # what an agent says later; over SageMaker: a body of /invocations
    print("drawn by the route:  ", {one.target: one.num_verdicts for one in client.route_stats("isResolved").targets})
    for one in client.route_stats("isResolved").targets:
        if one.accuracy is not None:
            print(
                f"{one.target} is right in {one.accuracy.share:.0%} ({one.accuracy.low:.0%} to {one.accuracy.high:.0%})"
            )

    client.delete_route("isResolved")
    for version in VERSIONS:
        client.unload_adapter(version)
