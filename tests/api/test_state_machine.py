"""Random histories of load, replace, unload, route and classify over HTTP, against a model of what must be there."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

import serving

TEXT = "Customer: hello, is my payment done?"
CONTENTS = ("task0", "task1", "task2")  # folders of the bundle
ADAPTERS = ("task0", "task1", "n0", "n1")
ROUTES = ("task0", "r0", "r1")
NAMES = (*dict.fromkeys((*ADAPTERS, *ROUTES)), "nobody")

Revisions = list[tuple[frozenset[str], frozenset[str]] | None]  # targets and shadows, or None: deleted


@pytest.fixture(scope="module")
def http(tiny_bundle: Path) -> Iterator[httpx.Client]:
    with serving.serve(tiny_bundle, "--dtype", "float32") as server, serving.client(server) as client:
        yield client


def machine(http: httpx.Client, folder: Path) -> type[RuleBasedStateMachine]:
    def classify(*names: str, **body: Any) -> httpx.Response:
        return http.post("/v1/classify", json={"input": TEXT, "classifiers": names, **body})

    expected = {verdict["classifier"]: verdict for verdict in classify(*CONTENTS).json()["verdicts"]}

    class Server(RuleBasedStateMachine):
        loaded: dict[str, str]  # adapter -> content
        revisions: dict[str, Revisions]

        @initialize()
        def begin(self) -> None:
            """From whatever the last history left behind."""
            for route in http.get("/v1/routes").json()["routes"]:
                assert http.delete(f"/v1/routes/{route['name']}").status_code == 200
            for name in ADAPTERS:
                assert http.delete(f"/v1/adapters/{name}").status_code in (200, 404)
            self.loaded, self.revisions = {}, {name: [None] for name in ROUTES}

        @property
        def routes(self) -> dict[str, tuple[frozenset[str], frozenset[str]]]:
            return {name: found[-1] for name, found in self.revisions.items() if found[-1] is not None}

        @rule(name=st.sampled_from(ADAPTERS), content=st.sampled_from(CONTENTS), in_place=st.booleans())
        def load(self, name: str, content: str, in_place: bool) -> None:
            body = {"lora_name": name, "lora_path": str(folder / content), "load_inplace": in_place}
            response = http.post("/v1/load_lora_adapter", json=body)
            if name in self.loaded and not in_place:
                assert response.status_code == 409
            else:
                assert response.status_code == 200, response.text
                self.loaded[name] = content

        @rule(name=st.sampled_from(ADAPTERS), source=st.sampled_from(["nowhere", "../..", "s3:"]))
        def load_what_is_not_sound(self, name: str, source: str) -> None:
            assert http.put(f"/v1/adapters/{name}", json={"source": str(folder / source)}).status_code == 422

        @rule(name=st.sampled_from(ADAPTERS))
        def unload(self, name: str) -> None:
            is_routed = any(name in targets | shadows for targets, shadows in self.routes.values())
            response = http.delete(f"/v1/adapters/{name}")
            assert response.status_code == (409 if is_routed else 200 if name in self.loaded else 404)
            if response.status_code == 200:
                del self.loaded[name]

        @rule(
            name=st.sampled_from(ROUTES),
            to=st.sets(st.sampled_from(ADAPTERS), min_size=1, max_size=2),
            shadows=st.sets(st.sampled_from(ADAPTERS), max_size=1),
        )
        def set_route(self, name: str, to: set[str], shadows: set[str]) -> None:
            body = {"targets": dict.fromkeys(sorted(to), 1), "shadows": sorted(shadows)}
            response = http.put(f"/v1/routes/{name}", json=body)
            if to | shadows <= self.loaded.keys():
                assert response.status_code == 200, response.text
                self.revisions[name].append((frozenset(to), frozenset(shadows)))
            else:
                missing = (to | shadows) - self.loaded.keys()
                codes = {"invalid_request" if one in self.routes else "unknown_classifier" for one in missing}
                assert response.status_code == 422 and response.json()["error"]["code"] in codes, response.text

        @rule(name=st.sampled_from(ROUTES))
        def delete_route(self, name: str) -> None:
            response = http.delete(f"/v1/routes/{name}")
            assert response.status_code == (200 if name in self.routes else 404)
            if response.status_code == 200:
                self.revisions[name].append(None)

        @rule(name=st.sampled_from(ROUTES))
        def roll_back(self, name: str) -> None:
            """Only to what this history made."""
            history = self.revisions[name]
            if len(history) > 2 and history[-2] is not None:
                answer = http.post(f"/v1/routes/{name}/rollback").json()
                history.pop()
                targets, shadows = self.routes[name]
                assert set(answer["targets"]) == targets and set(answer["shadows"]) == shadows

        @rule(
            names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=4),
            conversation_id=st.sampled_from([None, "a", "b"]),
        )
        def classify(self, names: list[str], conversation_id: str | None) -> None:
            response = classify(*names, conversation_id=conversation_id)
            wanted = {name: self.answers(name) for name in names}
            if not any(wanted.values()):
                assert response.status_code == 404
                return
            assert response.status_code == 200, response.text
            verdicts = response.json()["verdicts"]
            assert [verdict["classifier"] for verdict in verdicts] == list(wanted)
            for verdict in verdicts:
                adapters = wanted[verdict["classifier"]]
                if not adapters:
                    assert verdict["error"]["code"] == "unknown_classifier"
                    continue
                answered = verdict["adapter"]["name"]
                assert answered in adapters
                right = expected[self.loaded[answered]]
                assert verdict["adapter"]["version"] == right["adapter"]["version"]
                assert verdict["scores"] == pytest.approx(right["scores"], abs=1e-4)

        @rule()
        def classify_all(self) -> None:
            response = http.post("/v1/classify", json={"input": TEXT})
            routed = {one for targets, shadows in self.routes.values() for one in targets | shadows}
            wanted = set(self.routes) | (self.loaded.keys() - routed) | {"task2", "verbatim"}
            assert {verdict["classifier"] for verdict in response.json()["verdicts"]} == wanted
            assert not [verdict for verdict in response.json()["verdicts"] if "error" in verdict]

        @invariant()
        def lists_what_there_is(self) -> None:
            adapters = {one["name"]: one["state"] for one in http.get("/v1/adapters").json()["adapters"]}
            assert adapters == dict.fromkeys((*self.loaded, "task2", "verbatim"), "ready")
            assert {one["name"] for one in http.get("/v1/routes").json()["routes"]} == set(self.routes)

        def answers(self, name: str) -> frozenset[str]:
            """The adapters that may answer for a name."""
            found = self.routes.get(name)
            return found[0] if found is not None else frozenset({name} & self.loaded.keys())

    return Server


def test_random_histories(http: httpx.Client, tiny_bundle: Path) -> None:
    profile = settings(
        max_examples=15, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    run_state_machine_as_test(machine(http, tiny_bundle), settings=profile)
