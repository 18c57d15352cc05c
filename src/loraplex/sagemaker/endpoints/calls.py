"""A call to AWS as data: it can be shown before it is made."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CHANGING = ("Create", "Update", "Delete", "Put", "Register", "Deregister")
# Variables whose values are settings, unless their names or values look like secrets. Of all others nobody knows.
SETTING = re.compile(r"(LORAPLEX|SAGEMAKER)_\w+|OMP_NUM_THREADS|HF_HUB_OFFLINE")
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
USER_IN_URL = re.compile(r"://[^/\s]*@")


@dataclass(frozen=True, slots=True)
class Call:
    """One operation of one of AWS's services, under the names in AWS's API reference, with its parameters."""

    service: str
    operation: str
    parameters: Mapping[str, Any]

    @property
    def action(self) -> str:
        """The call as IAM policies name it, such as `sagemaker:CreateModel`."""
        return f"{self.service.removesuffix('-runtime')}:{self.operation}"

    @property
    def method(self) -> str:
        """The name of boto3's method, such as `create_model`."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", self.operation).lower()

    @property
    def changes(self) -> bool:
        """Whether the call changes something in the account."""
        return self.operation.startswith(CHANGING)

    def to_json(self) -> str:
        """Return the call as one line of JSON. Of an environment, only the values of known settings are shown."""
        return json.dumps({"client": self.service, "operation": self.method, "parameters": masked(self.parameters)})


def masked(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters with `***` for each value of an environment that may be a secret."""

    def show(key: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            if key == "Environment":
                return {name: text if _is_setting(name, text) else "***" for name, text in value.items()}
            return masked(value)
        return [show("", one) for one in value] if isinstance(value, list | tuple) else value

    return {key: show(key, value) for key, value in parameters.items()}


def _is_setting(name: str, value: str) -> bool:
    return bool(SETTING.fullmatch(name)) and not (SECRET.search(name) or USER_IN_URL.search(value))
