"""Bodies of the HTTP API. What they mean is in `loraplex.types`."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, TypeAdapter

from loraplex.types import AdapterInfo, ClassifyRequest, ClassifyResult, ErrorInfo, Message, classifier_names

MAX_ITEMS = 10_000  # in a list of a body
CLASSIFY_RESULT = TypeAdapter(ClassifyResult)


def result_json(result: ClassifyResult) -> bytes:
    """The answer as the API and `loraplex classify --json` give it; what does not apply is left out."""
    return CLASSIFY_RESULT.dump_json(result, exclude_none=True)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


def _text_or_list(value: Any) -> str | None:
    if isinstance(value, str):
        return "text"
    return "list" if isinstance(value, list) else None


def _either(what: str) -> Discriminator:
    """Text or a list, told apart by type: one error, that of the one given, and not one for each that it is not."""
    return Discriminator(_text_or_list, custom_error_type="text_or_list", custom_error_message=f"should be {what}")


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

    input: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[list[MessageBody], Tag("list"), Field(max_length=MAX_ITEMS, fail_fast=True)],
        _either("text, or a list of messages"),
    ] = Field(description="text, or the turns in order")
    classifiers: Annotated[
        Annotated[str, Tag("text")] | Annotated[list[str], Tag("list"), Field(max_length=MAX_ITEMS, fail_fast=True)],
        _either("a name, or a list of names"),
    ] = Field("*", description='a name, names, or "*" for every classifier')
    conversation_id: str | None = Field(
        None, description="the same for every turn of a conversation: what was computed is kept for the next turn"
    )
    deadline_ms: float | None = Field(None, gt=0, description="a classifier not computed by then answers with an error")

    def to_request(self) -> ClassifyRequest:
        return ClassifyRequest(
            input=self.input
            if isinstance(self.input, str)
            else tuple(Message(role=message.role, content=message.content) for message in self.input),
            classifiers=classifier_names(self.classifiers),
            deadline_ms=self.deadline_ms,
            conversation_id=self.conversation_id,
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


class AdapterBody(_Body):
    """Where an adapter comes from."""

    source: str = Field(description="a path below an adapter root, hf://org/name@revision, or s3://bucket/prefix")
    pinned: bool | None = Field(None, description="keep its place on the device; as it was, where not given")


class VllmLoadBody(BaseModel):
    """vLLM's body; other fields of it are ignored."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class VllmUnloadBody(BaseModel):
    lora_name: str


class SageMakerAdapterBody(_Body):
    name: str
    src: str
    preload: bool = True
    pin: bool = False


class AdapterList(BaseModel):
    adapters: list[AdapterInfo]


class ErrorBody(BaseModel):
    error: ErrorInfo


def error_json(code: str, message: str, remedy: str) -> dict[str, Any]:
    """The text may repeat what the client sent; half a surrogate pair in it is escaped."""
    return {"error": {"code": code, "message": message.encode(errors="backslashreplace").decode(), "remedy": remedy}}


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
