"""SageMaker: packs bundles, runs in its containers, and makes endpoints. What it asks of the HTTP server is in
`server/sagemaker.py`."""
