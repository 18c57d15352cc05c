"""The clients of docs/clients.md: what of them works, and the test that shows it."""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class KnownClient:
    """package: its name in a lock file."""

    name: str
    package: str
    works: str
    test: str


CLIENTS = (
    KnownClient(
        name="openai",
        package="openai",
        works="completions and chats, streams, log probabilities, several prompts and choices",
        test="tests/api/test_openai.py",
    ),
    KnownClient(
        name="boto3's `sagemaker-runtime`",
        package="boto3",
        works="`invoke_endpoint` and its stream, typed errors",
        test="tests/api/test_sagemaker.py",
    ),
    KnownClient(
        name="lm-eval's `local-completions`",
        package="lm_eval",
        works="`loglikelihood`, `loglikelihood_rolling`, `multiple_choice` and `generate_until`",
        test="tests/clients/test_clients.py",
    ),
    KnownClient(
        name="guidellm's `openai_http`",
        package="guidellm",
        works="`/v1/completions` and `/v1/chat/completions`, streamed; an adapter as the model",
        test="tests/clients/test_clients.py",
    ),
    KnownClient(
        name="langchain-openai",
        package="langchain-openai",
        works="`ChatOpenAI` and `OpenAI`: `invoke`, `batch`, `stream`, log probabilities",
        test="tests/clients/test_clients.py",
    ),
    KnownClient(
        name="litellm",
        package="litellm",
        works="`openai/`, `hosted_vllm/` and `text-completion-openai/`: whole, streamed, log probabilities",
        test="tests/clients/test_clients.py",
    ),
    KnownClient(
        name="openai's `decisions`",
        package="openai",
        works="typed questions: answers, errors, also asynchronously",
        test="tests/clients/test_typed_clients.py",
    ),
    KnownClient(
        name="typesafe-sdk",
        package="typesafe-sdk",
        works="`system_one`, `models.list`, errors, also asynchronously",
        test="tests/clients/test_typed_clients.py",
    ),
    KnownClient(
        name="langchain-openai's `OpenAIDecisions`",
        package="langchain-openai",
        works="`invoke` and `ainvoke`; a conversation with answers arrives as the JSON text of one message",
        test="tests/clients/test_typed_clients.py",
    ),
    KnownClient(
        name="langchain-typesafe",
        package="langchain-typesafe",
        works="`TypeSafeClassifier` with texts and messages: `invoke` and `ainvoke`",
        test="tests/clients/test_typed_clients.py",
    ),
    KnownClient(
        name="pydantic-ai's `system-one`",
        package="pydantic-ai-slim",
        works="an `Agent` whose output's fields are named for classifiers",
        test="tests/clients/test_typed_clients.py",
    ),
    KnownClient(
        name="litellm's gateway",
        package="litellm",
        works="in front of Loraplex as `openai/` and as `hosted_vllm/`: `/v1/decisions` and `/v1/systemone`",
        test="tests/clients/test_typed_clients.py",
    ),
    KnownClient(
        name="jevcompat",
        package="jevcompat",
        works="all 32 MUSTs that apply of System One's unofficial specification, with 255 options",
        test="tests/clients/test_typed_clients.py",
    ),
)


def client_table() -> str:
    """The table of docs/clients.md."""
    locked = "".join((ROOT / f"requirements-{which}.lock").read_text() for which in ("dev", "clients"))
    versions = dict(line.split("==") for line in locked.split())
    lines = ["| client | version | what works | shown by |", "|---|---|---|---|"]
    lines += [f"| {one.name} | {versions[one.package]} | {one.works} | `{one.test}` |" for one in CLIENTS]
    return "\n".join(lines)
