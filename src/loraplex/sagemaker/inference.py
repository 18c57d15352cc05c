"""The entry point that AWS's Hugging Face images load: an artifact holds a copy of this file as `code/inference.py`."""

from loraplex.sagemaker.handlers import input_fn, model_fn, output_fn, predict_fn

__all__ = ["input_fn", "model_fn", "output_fn", "predict_fn"]
