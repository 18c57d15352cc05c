"""A call to AWS as data: it can be shown before it is made."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CHANGING = ("Create", "Update", "Delete", "Put", "Register", "Deregister")
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)


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
        """Return the call as one line of JSON. The values of variables that look like secrets are masked."""
        return json.dumps({"client": self.service, "operation": self.method, "parameters": masked(self.parameters)})


def masked(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters with `***` for each value of an environment whose name looks like a secret's."""

    def show(key: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            if key == "Environment":
                return {name: "***" if SECRET.search(name) else text for name, text in value.items()}
            return masked(value)
        return [show("", one) for one in value] if isinstance(value, list | tuple) else value

    return {key: show(key, value) for key, value in parameters.items()}
