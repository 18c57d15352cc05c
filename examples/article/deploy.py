"""The article's deployment, with the three calls that its HuggingFaceModel made of boto3.

    python examples/article/deploy.py --role ROLE_ARN --image IMAGE_URI --model-data s3://my-bucket/model.tar.gz

It creates a model, an endpoint configuration and an endpoint, and waits until the endpoint is in service. Each of them
must not exist yet. `loraplex sagemaker deploy` does the same, can be run again, and deletes what it made.
"""

import argparse
import sys

import boto3

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--role", required=True, help="ARN of the role that the endpoint runs with")
parser.add_argument("--image", required=True, help="Loraplex's image in ECR, or one of AWS's")
parser.add_argument("--model-data", required=True, help="what `loraplex sagemaker pack` wrote")
parser.add_argument("--name", default="mistral-7b-multi-lora")
parser.add_argument("--instance-type", default="ml.g5.2xlarge")


def deploy(role: str, image: str, model_data: str, name: str, instance_type: str) -> None:
    sagemaker = boto3.client("sagemaker")
    sagemaker.create_model(
        ModelName=name,
        ExecutionRoleArn=role,
        PrimaryContainer={
            "Image": image,
            "ModelDataUrl": model_data,
            # The last two are read by AWS's Hugging Face images, and change nothing in Loraplex's own.
            "Environment": {
                "LORAPLEX_BACKEND": "native",
                "SAGEMAKER_PROGRAM": "inference.py",
                "SAGEMAKER_MODEL_SERVER_WORKERS": "1",  # each worker would load a base of its own
            },
        },
    )
    variant = {
        "VariantName": "AllTraffic",
        "ModelName": name,
        "InstanceType": instance_type,
        "InitialInstanceCount": 1,
        "InferenceAmiVersion": "al2023-ami-sagemaker-inference-gpu-4-1",  # the driver for the image's CUDA 13.0
        "ModelDataDownloadTimeoutInSeconds": 1800,  # for the 14 GB of a 7B base
        "ContainerStartupHealthCheckTimeoutInSeconds": 1200,
    }
    sagemaker.create_endpoint_config(EndpointConfigName=name, ProductionVariants=[variant])
    sagemaker.create_endpoint(EndpointName=name, EndpointConfigName=name)
    print(f"creating {name}; this takes minutes", file=sys.stderr)
    sagemaker.get_waiter("endpoint_in_service").wait(EndpointName=name)
    print(name)


if __name__ == "__main__":
    deploy(**vars(parser.parse_args()))
