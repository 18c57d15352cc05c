"""A model with several adapters, as PEFT saves it: each is a classifier that answers as PEFT does."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import serving
import tiny

TEXT = "Customer: hello, is it done?"
NAMES = ("run", "isAngry", "isFraud")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    bundle = tmp_path_factory.mktemp("nested") / "bundle"
    tiny.save_base(bundle, tiny.FAMILIES["mistral"])
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(bundle), LoraConfig(target_modules=["q_proj", "v_proj"])
    )
    for name in ("isFraud", "isAngry"):
        model.add_adapter(name, LoraConfig(target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.5)
    model.save_pretrained(str(bundle / "run"))
    model.save_pretrained(str(bundle / "run" / "checkpoint-10"))
    model.save_pretrained(str(bundle / "parts"), selected_adapters=["isFraud", "isAngry"])
    (bundle / "parts").rename(bundle / ".parts")
    return bundle


def test_all_are_served_and_what_is_left_out_is_named(bundle: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with serving.serve(bundle, "--dtype", "float32", log=str(log)) as server, serving.client(server) as http:
        listed = http.get("/v1/adapters").json()
        answer = http.post("/v1/classify", json={"input": TEXT, "classifiers": list(NAMES)}).json()
        run = serving.loraplex("adapters", "list", "--skipped", "--url", server.url)
        as_json = serving.loraplex("adapters", "list", "--skipped", "--json", "--url", server.url)
        (bundle / ".parts").rename(bundle / "parts")
        refused = http.put("/v1/adapters/new", json={"source": "parts/"})
        loaded = http.put("/v1/adapters/new", json={"source": "parts/isFraud"})
    assert [one["name"] for one in listed["adapters"]] == list(NAMES)
    assert [one["path"] for one in listed["skipped"]] == [f"{bundle}/.parts", f"{bundle}/run/checkpoint-10"]
    assert f"left out of {bundle}/run: checkpoint-10 (a trainer's checkpoint)" in log.read_text()
    assert run.stdout.splitlines()[1] == f"{bundle}/run/checkpoint-10: a trainer's checkpoint", run.stdout + run.stderr
    assert json.loads(as_json.stdout) == listed["skipped"]
    assert refused.status_code == 422 and "in folders in it" in refused.json()["error"]["message"]
    assert "'parts/isAngry', 'parts/isFraud'" in refused.json()["error"]["remedy"]
    assert loaded.status_code == 200, loaded.text

    token_ids = AutoTokenizer.from_pretrained(bundle)(TEXT, return_tensors="pt").input_ids
    for name, verdict in zip(NAMES, answer["verdicts"], strict=True):
        folder = bundle / "run" if name == "run" else bundle / "run" / name
        base = AutoModelForCausalLM.from_pretrained(bundle, dtype=torch.float32)
        with torch.no_grad():
            probabilities = PeftModel.from_pretrained(base, folder)(token_ids).logits[0, -1].softmax(-1)
        assert math.isclose(verdict["confidence"], float(probabilities.max()), abs_tol=1e-4), name
