"""The article's client for many task types: boto3's SageMaker runtime client.

python examples/article/classify_conversation.py http://127.0.0.1:8000    # a Loraplex server here
python examples/article/classify_conversation.py                          # AWS's endpoint `mistral-7b-multi-lora`
"""

import json
import sys
from typing import Any

import boto3
from prompt import CONVERSATION, TASKS, format_prompt

LOCAL = {"region_name": "us-east-1", "aws_access_key_id": "any", "aws_secret_access_key": "any"}
runtime = boto3.client("sagemaker-runtime", **({"endpoint_url": sys.argv[1]} | LOCAL if sys.argv[1:] else {}))


def classify_conversation(conversation_text: str, task_type: str) -> dict[str, Any]:
    payload = {
        "input_text": format_prompt(conversation_text, task_type),
        "adapter_name": task_type,
        "raw": True,  # the prompt is already formatted; the adapter's contract would format it again
    }
    response = runtime.invoke_endpoint(
        EndpointName="mistral-7b-multi-lora", ContentType="application/json", Body=json.dumps(payload)
    )
    result: list[dict[str, Any]] = json.loads(response["Body"].read().decode())
    return result[0]  # {"confidence_score": 0.98, "predicted_text": "yes"}


for task in TASKS:
    answer = classify_conversation(CONVERSATION, task)
    print(f"{task:24} {answer['predicted_text']:4} {answer['confidence_score']:.6f}")
