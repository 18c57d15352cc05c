"""SageMaker's container route, with the article's body or our own."""

import math

from fastapi import APIRouter, Request, Response

from loraplex.backends.base import GenerateRequest
from loraplex.server.routes import ERRORS, answer, answered, backend_of, metrics_of, while_connected
from loraplex.server.schemas import ClassifyBody, InvocationBody, InvocationResult, SageMakerBody
from loraplex.types import BatchResult, ClassifyRequest, ClassifyResult

router = APIRouter(tags=["sagemaker"])


@router.post("/invocations", response_model=list[InvocationResult] | ClassifyResult | BatchResult, responses=ERRORS)
async def invocations(request: Request, body: SageMakerBody) -> Response | list[InvocationResult]:
    """`{"input_text", "adapter_name"?}` -> `[{"confidence_score", "predicted_text"}]`; the body of /v1/classify is
    answered as there."""
    if isinstance(body, ClassifyBody):
        return await answer(request, body)
    return [await _invoke(request, body)]


async def _invoke(request: Request, body: InvocationBody) -> InvocationResult:
    """Through the adapter's contract where it has one, else verbatim."""
    if body.adapter_name is not None and not body.raw:
        result = await answered(request, ClassifyRequest(input=body.input_text, classifiers=(body.adapter_name,)))
        assert isinstance(result, ClassifyResult)
        verdict = result.verdicts[0]
        assert verdict.label is not None and verdict.confidence is not None, "a lone verdict's error is raised"
        return InvocationResult(confidence_score=verdict.confidence, predicted_text=verdict.label)
    asked = GenerateRequest(prompt=body.input_text, adapter=body.adapter_name)
    generated = await while_connected(request, backend_of(request).generate(asked))
    metrics_of(request).observe_work(generated.usage, generated.timings)
    [token] = generated.tokens
    return InvocationResult(confidence_score=math.exp(token.log_prob), predicted_text=token.text)
