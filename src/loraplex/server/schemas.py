"""Bodies of the HTTP API. `loraplex.types` explains their fields."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, Tag, TypeAdapter, model_validator
from pydantic.json_schema import SkipJsonSchema

from loraplex.discovery import SkippedFolder
from loraplex.errors import encodable
from loraplex.labelled import YES_NO
from loraplex.messages import MAX_ITEMS, MessageBody
from loraplex.problems import NumbersAreNoBooleans, either, wrong
from loraplex.questions import MAX_LABELS, MAX_QUESTIONS
from loraplex.types import (
    AdapterInfo,
    BatchResult,
    ClassifyRequest,
    ClassifyResult,
    ErrorInfo,
    Names,
    Question,
    QuestionType,
    Roles,
    Route,
    classifier_names,
)

RESULT: TypeAdapter[ClassifyResult | BatchResult] = TypeAdapter(ClassifyResult | BatchResult)


def result_json(result: ClassifyResult | BatchResult) -> bytes:
    """Return the answer as the API and `loraplex classify --json` give it. Fields that are None are left out."""
    return RESULT.dump_json(result, exclude_none=True)


class Body(NumbersAreNoBooleans):
    model_config = ConfigDict(extra="forbid")


TextOrMessages = (
    Annotated[str, Tag("text")] | Annotated[list[MessageBody], Tag("list"), Field(max_length=MAX_ITEMS, fail_fast=True)]
)


RoleNames = Annotated[
    dict[str, str | None],
    Field(
        max_length=MAX_ITEMS,
        description="role -> the name that a contract writes before its turns, where it differs from the contract's "
        "`roles`; null leaves the role's turns out",
    ),
]


class QuestionBody(Body):
    """A question in words. Where no adapter was trained for it, the bare base answers (`--adhoc-questions`)."""

    type: QuestionType = Field(
        description="predicate: whether something holds; choice: which label; score: which level, from the lowest"
    )
    instructions: str = Field("", description="what is asked")
    labels: list[str] | None = Field(
        None, max_length=MAX_LABELS, description="the answers, in order; by default those that `criteria` describes"
    )
    criteria: dict[str, str | None] | None = Field(
        None,
        max_length=MAX_LABELS,
        description="label -> what it means; a predicate's labels are yes and no by default",
    )

    def to_question(self) -> Question:
        described = {label: text for label, text in (self.criteria or {}).items() if text}
        labels = tuple(self.labels or self.criteria or ())
        if self.type == "predicate" and self.labels is None:  # the order of an object's keys says nothing
            labels = next((one for one in YES_NO if {*labels} <= {*one}), labels)
        return Question(type=self.type, instructions=self.instructions, labels=labels, descriptions=described)


class ConversationBody(Body):
    input: Annotated[TextOrMessages, either("text or a list of messages")]
    conversation_id: str | None = None

    def to_request(
        self,
        classifiers: Names,
        deadline_ms: float | None,
        roles: Roles | None,
        questions: Mapping[str, Question],
        cascade: bool,
    ) -> ClassifyRequest:
        return ClassifyRequest(
            input=self.input if isinstance(self.input, str) else tuple(one.to_message() for one in self.input),
            classifiers=classifiers,
            deadline_ms=deadline_ms,
            conversation_id=self.conversation_id,
            roles=roles,
            questions=questions,
            cascade=cascade,
        )


class ClassifyBody(Body):
    """One conversation (`input`) or several (`inputs`), and any number of classifiers."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "example": {
                "input": "Customer: My order never came.\nAgent: I have sent a new one.\nCustomer: Thanks, that's all!",
                "classifiers": "*",
            },
            "oneOf": [{"required": ["input"]}, {"required": ["inputs"]}],
        },
    )

    input: Annotated[TextOrMessages, either("text or a list of messages")] | SkipJsonSchema[None] = Field(
        None, description="a conversation: text, or its turns in order"
    )
    inputs: (
        Annotated[
            list[
                Annotated[
                    TextOrMessages | Annotated[ConversationBody, Tag("object")],
                    either("text, a list of messages or an object with `input` and `conversation_id`"),
                ]
            ],
            Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True),
        ]
        | SkipJsonSchema[None]
    ) = Field(None, description="several conversations; `results` holds their answers in order")
    classifiers: Annotated[
        Annotated[str, Tag("text")] | Annotated[list[str], Tag("list"), Field(max_length=MAX_ITEMS, fail_fast=True)],
        either("a name or a list of names"),
    ] = Field("*", description='names of classifiers or routes, or "*" for all')
    conversation_id: str | None = Field(
        None,
        description="the same id for every turn of a conversation: the next turn reuses cached work, and a route "
        "keeps its target",
    )
    deadline_ms: float | None = Field(
        None,
        gt=0,
        strict=True,
        description="milliseconds from the request; a classifier that is not computed by then returns an error",
    )
    roles: RoleNames | None = None
    questions: dict[str, QuestionBody] = Field(
        {},
        max_length=MAX_QUESTIONS,
        description="name -> a question; the classifier or route of this name answers it, or else the bare base, with "
        "--adhoc-questions",
    )
    cascade: bool = Field(
        True, strict=True, description="false runs every classifier, whatever its gate says (`when` in loraplex.yaml)"
    )

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        given = {"input", "inputs"} & self.model_fields_set
        if len(given) != 1 or (self.input is None and self.inputs is None):
            raise wrong("give either `input` or `inputs`", "give `input` one conversation, or `inputs` several")
        if self.inputs is not None and self.conversation_id is not None:
            raise wrong(
                "`conversation_id` is beside `inputs`, and not in each of them",
                'give each as {"input": …, "conversation_id": …}',
            )
        return self

    def to_requests(self) -> list[ClassifyRequest]:
        """Return one request for `input`, or one for each of `inputs`."""
        given = self.inputs if self.input is None else [self.input]
        classifiers = classifier_names(self.classifiers)
        conversations = (
            one
            if isinstance(one, ConversationBody)
            else ConversationBody.model_construct(input=one, conversation_id=self.conversation_id)
            for one in given or ()
        )
        questions = {name: one.to_question() for name, one in self.questions.items()}
        return [
            one.to_request(classifiers, self.deadline_ms, self.roles, questions, self.cascade) for one in conversations
        ]


class InvocationBody(Body):
    """The article's body. Without `adapter_name` the bare base answers."""

    input_text: str
    adapter_name: str | None = None
    raw: bool = Field(False, description="take `input_text` verbatim even if the adapter has a contract")


class InvocationResult(BaseModel):
    confidence_score: float
    predicted_text: str


class AdapterBody(Body):
    """Where to load an adapter from, and whether to pin it."""

    source: str = Field(description="a path below an adapter root, hf://org/name@revision, or s3://bucket/prefix")
    pinned: bool | None = Field(None, description="keep the adapter in its slot on the device; default: unchanged")


class VllmLoadBody(BaseModel):
    """vLLM's body. Its other fields are ignored."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class VllmUnloadBody(BaseModel):
    lora_name: str


class SageMakerAdapterBody(Body):
    name: str
    src: str
    preload: bool = True
    pin: bool = False


class AdapterList(BaseModel):
    adapters: list[AdapterInfo]
    skipped: list[SkippedFolder] = Field(description="folders of the bundle that hold an adapter and were left out")


class RouteList(BaseModel):
    routes: list[Route]


class FeedbackBody(Body):
    """Names a verdict, or the request that it answered: `request_id`, and `classifier` if the request asked several."""

    verdict_id: str | None = Field(None, description="the `id` of a verdict")
    request_id: str | None = Field(
        None,
        description="the request's X-Amzn-SageMaker-Inference-Id or X-Request-ID; of several texts, the one with the "
        "index i has the id with -i after it",
    )
    classifier: str | None = Field(None, description="the classifier or route that was requested")
    label: str = Field(description="the label that the verdict should have had")

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.verdict_id is None) == (self.request_id is None):
            raise wrong("give either `verdict_id` or `request_id`", "give the `id` of a verdict, or its request's id")
        if self.classifier is not None and self.request_id is None:
            raise wrong("`classifier` is beside `verdict_id`", "leave it out: a verdict has one classifier")
        return self


class FeedbackResult(BaseModel):
    """Repeats the id that was given."""

    verdict_id: str | None = None
    request_id: str | None = None
    num_answers: int = Field(
        description="number of answers that the label applies to: the returned one and those of its shadows"
    )


class ExamplesBody(Body):
    """Which kept texts to return."""

    classifiers: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[list[str], Tag("list"), Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)],
        either("a name or a list of names"),
    ] = Field("*", description='names of routes, or of classifiers that were asked by their own; "*" for all')
    since_s: float | None = Field(None, gt=0, le=1e9, description="only requests of the last so many seconds")
    only: Literal["corrected", "all"] = Field(
        "corrected", description="corrected: labels that feedback gave; all: also what was answered and not corrected"
    )
    after: str | None = Field(None, description="the `after` of the page before")


class ErrorBody(BaseModel):
    error: ErrorInfo


def errors(**descriptions: str) -> dict[int | str, dict[str, Any]]:
    """Return an HTTP route's `responses` for some statuses, such as `errors(_404="no such adapter")`."""
    return {
        int(status[1:]): {"model": ErrorBody, "description": description}
        for status, description in descriptions.items()
    }


COMMON = errors(
    _400="the body is not JSON in UTF-8",
    _401="no API key, or a key that this server does not know",
    _403="the scope of the API key does not allow this",
    _408="the body did not arrive in time",
    _413="the body is too large",
    _415="the body is compressed in a way that this server does not read",
    _422="not a JSON object, or a field is missing, unknown, empty or of the wrong type",
    _429="too many requests in flight",
    _500="an error in the server",
    _503="the server is not ready, or is stopping",
)


def error_json(code: str, message: str, remedy: str) -> dict[str, Any]:
    """Return an error as JSON. Its text may repeat what the client sent, so halves of surrogate pairs are escaped."""
    return {"error": {"code": code, "message": encodable(message), "remedy": encodable(remedy)}}


class FailedAdapter(BaseModel):
    """An adapter that cannot be used. Its error has more at GET /v1/adapters, which needs an admin key."""

    name: str
    code: str


class Readiness(BaseModel):
    status: Literal["ok"] = "ok"
    num_failed: int = Field(description="number of adapters that cannot be used")
    failed: list[FailedAdapter] = Field(
        [], description="these adapters; empty for a caller who has to send a key and sends none"
    )
    keeps_inputs: str | None = Field(
        None, description="for how long the texts of requests are stored, such as 7d; missing if none are"
    )


class ModelCard(BaseModel):
    """A model as OpenAI's API lists it. The parent of an adapter is the base."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "loraplex"
    parent: str | None = None


class TypeSafeModel(BaseModel):
    """A model as TypeSafe's API lists it. release_date: the day on which this server was started."""

    name: str
    description: str
    release_date: str


class ModelList(BaseModel):
    """OpenAI's list, and the same for TypeSafe's client."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
    models: list[TypeSafeModel]
