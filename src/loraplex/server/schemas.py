"""Bodies of the HTTP API. What they mean is in `loraplex.types`."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, TypeAdapter

from loraplex.errors import LoraplexError
from loraplex.types import ClassifyRequest, ClassifyResult, ErrorInfo, Message

CLASSIFY_RESULT = TypeAdapter(ClassifyResult)


def result_json(result: ClassifyResult) -> bytes:
    """The answer as the API and `loraplex classify --json` give it; what does not apply is left out."""
    return CLASSIFY_RESULT.dump_json(result, exclude_none=True)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class MessageBody(_Body):
    role: str = Field(description="`user` or `assistant`, or what the contract's `roles` names")
    content: str


class ClassifyBody(_Body):
    """One conversation, any number of classifiers."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "example": {
                "input": "Customer: My order never came.\nAgent: I have sent a new one.\nCustomer: Thanks, that's all!",
                "classifiers": "*",
            }
        },
    )

    input: str | list[MessageBody] = Field(description="text, or the turns in order")
    classifiers: str | list[str] = Field("*", description='a name, names, or "*" for every classifier')
    deadline_ms: float | None = Field(None, gt=0, description="a classifier not computed by then answers with an error")

    def to_request(self) -> ClassifyRequest:
        names = [self.classifiers] if isinstance(self.classifiers, str) else self.classifiers
        return ClassifyRequest(
            input=self.input
            if isinstance(self.input, str)
            else tuple(Message(role=message.role, content=message.content) for message in self.input),
            classifiers="*" if names == ["*"] else tuple(names),
            deadline_ms=self.deadline_ms,
        )


class InvocationBody(_Body):
    """The article's body. Without `adapter_name` the bare base answers."""

    input_text: str
    adapter_name: str | None = None
    raw: bool = Field(False, description="take `input_text` verbatim although the adapter has a contract")


class InvocationResult(BaseModel):
    confidence_score: float
    predicted_text: str


def _body_kind(body: Any) -> Literal["article", "native"]:
    given = body if isinstance(body, dict) else {}
    return "native" if "input" in given and "input_text" not in given else "article"


SageMakerBody = Annotated[
    Annotated[InvocationBody, Tag("article")] | Annotated[ClassifyBody, Tag("native")],
    Discriminator(_body_kind),
]


class ErrorBody(BaseModel):
    error: ErrorInfo


def error_json(error: LoraplexError) -> dict[str, Any]:
    return {"error": {"code": error.code, "message": error.message, "remedy": error.remedy}}


class ModelCard(BaseModel):
    """As OpenAI lists models; an adapter's parent is the base."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "loraplex"
    parent: str | None = None


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]
