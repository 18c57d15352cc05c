"""Draws one of a route's targets."""

import math
import random
from hashlib import sha256

from loraplex.types import Route


def choose(route: Route, conversation_id: str | None) -> str:
    """Return a target, drawn by weight. Rendezvous hashing of the conversation's id makes a change of weights move as
    few conversations as possible. Without an id, the draw is random."""
    if len(route.targets) == 1:
        return next(iter(route.targets))
    most = max(route.targets.values())  # scaled by the largest, so that tiny weights do not overflow the division below
    targets = {target: weight / most for target, weight in route.targets.items() if weight / most}
    if conversation_id is None:
        return random.choices(list(targets), list(targets.values()))[0]

    def distance(target: str) -> float:
        digest = sha256(f"{route.name}\0{target}\0{conversation_id}".encode(errors="surrogatepass")).digest()
        uniform = (int.from_bytes(digest[:7]) + 1) / (1 << 56)  # in (0, 1]
        # Exponential with the weight as its rate: a target is nearest with probability weight / sum of weights.
        return -math.log(uniform) / targets[target]

    return min(targets, key=distance)
