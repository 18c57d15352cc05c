"""The round of docs/improving.md on a tiny base: served, corrected, retrained, shadowed, promoted."""

import json
import random
import time
from pathlib import Path

import serving
import tiny
from loraplex import Client

CLUES = {"yes": "thanks", "no": "broken"}
WORDS = "order hotel room table booking seat payment card date name".split()


def dialogues(num: int, seed: int) -> list[tuple[str, str]]:
    draw = random.Random(seed)
    found = []
    for _ in range(num):
        label = draw.choice(("yes", "no"))
        words = [*draw.choices(WORDS, k=3), *[CLUES[label]] * 3]
        draw.shuffle(words)
        found.append((f"Customer: {' '.join(words)}", label))
    return found


def test_served_corrected_retrained_shadowed_promoted(tmp_path: Path) -> None:
    base, trained, data = tmp_path / "bundle", tmp_path / "trained", tmp_path / "corrected.jsonl"
    base.mkdir()
    tiny.save_base(base, tiny.FAMILIES["llama"])
    tiny.save_adapter(base, base / "isDone", contract=tiny.CONTRACT)
    trained.mkdir()
    options = ("--dtype", "float32", "--state-dir", tmp_path / "state", "--adapter-root", trained)
    with serving.serve(base, *options, "--keep-inputs", "1h") as server, Client(server.url) as client:
        # Served and corrected, with a conversation that nobody corrects.
        client.classify("Customer: nobody looks at this", "isDone")
        for text, label in dialogues(100, seed=0):
            verdict = client.classify(text, "isDone")["isDone"]
            client.feedback(verdict.id or "", label)
        run = serving.loraplex("routes", "export", "isDone", "--since", "1h", "--out", data, "--url", server.url)
        assert run.returncode == 0, run.stderr
        rows = [json.loads(line) for line in data.read_text().splitlines()]
        assert {row["text"]: row["labels"]["isDone"] for row in rows} == {
            text: label == "yes" for text, label in dialogues(100, seed=0)
        }

        # Retrained, and loaded as a shadow.
        command: list[object] = [
            "train",
            "--base",
            base,
            "--data",
            data,
            "--out",
            trained / "first",
            "--load",
            server.url,
        ]
        command += ["--template", "{conversation}<|ask|>\n", "--seed", 1]
        command += ["--epochs", 5, "--learning-rate", 0.01, "--rank", 8, "--dtype", "float32"]
        done = serving.loraplex(*command)
        assert done.returncode == 0, done.stderr
        assert "isDone-v2" in done.stderr and "loraplex routes stats isDone" in done.stderr
        assert client.route("isDone").targets == {"isDone": 1} and client.route("isDone").shadows == ("isDone-v2",)
        contract = (trained / "first" / "isDone" / "classifier.yaml").read_text()
        assert not any(row["text"] in contract for row in rows), "no text of a user's is in the contract"

        # Shadowed: its answers are counted, not returned.
        unseen = dialogues(25, seed=1)
        for text, label in unseen:
            verdict = client.classify(text, "isDone")["isDone"]
            assert verdict.adapter is not None and verdict.adapter.name == "isDone"
            client.feedback(verdict.id or "", label)
        until = time.monotonic() + 20
        while True:
            stats = {(one.target, one.role): one for one in client.route_stats("isDone").targets}
            shadow = stats.get(("isDone-v2", "shadow"))
            if shadow is not None and shadow.agreement is not None and shadow.agreement.num_compared == 25:
                break
            assert time.monotonic() < until
            time.sleep(0.1)
        assert shadow.accuracy is not None and shadow.accuracy.num_labelled == 25
        assert shadow.accuracy.share > 0.8, shadow.accuracy

        # Promoted, and undone.
        run = serving.loraplex("routes", "set", "isDone", "isDone-v2", "--url", server.url)
        assert run.returncode == 0, run.stderr
        verdict = client.classify(unseen[0][0], "isDone")["isDone"]
        assert verdict.adapter is not None and verdict.adapter.name == "isDone-v2"
        assert client.rollback_route("isDone").targets == {"isDone": 1}

        # An error leaves the server as it was, and the trained adapters where they are.
        routes, adapters = client.routes(), client.adapters()
        command[command.index("--out") + 1] = tmp_path / "elsewhere"
        refused = serving.loraplex(*command, "--epochs", 0.1)
        assert refused.returncode == 1 and "does not lie below an adapter root" in refused.stderr, refused.stderr
        assert "nothing was changed" in refused.stderr and (tmp_path / "elsewhere" / "isDone").is_dir()
        assert (client.routes(), [one.name for one in client.adapters()]) == (routes, [one.name for one in adapters])
