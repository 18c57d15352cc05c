"""Calls to AWS as they are shown."""

import json

from loraplex.sagemaker.endpoints.calls import Call


def test_only_settings_are_shown_of_an_environment() -> None:
    shown = {"LORAPLEX_DTYPE": "bfloat16", "SAGEMAKER_PROGRAM": "inference.py", "OMP_NUM_THREADS": "4"}
    hidden = {
        "LORAPLEX_API_KEYS": "ci:infer:0123456789abcdef",
        "LORAPLEX_CORS_ORIGIN": "https://user:pw@host",
        "DATABASE_URL": "postgres://u:pw@h/db",
        "PGPASS": "q",
        "AUTH": "Bearer x",
        "HF_TOKEN": "hf_x",
    }
    call = Call("sagemaker", "CreateModel", {"PrimaryContainer": {"Image": "i", "Environment": shown | hidden}})
    container = json.loads(call.to_json())["parameters"]["PrimaryContainer"]
    assert container == {"Image": "i", "Environment": shown | dict.fromkeys(hidden, "***")}
