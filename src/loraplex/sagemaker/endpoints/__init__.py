"""Endpoints on SageMaker: what one should be, the calls to AWS that make, change and delete it, and what is left."""
