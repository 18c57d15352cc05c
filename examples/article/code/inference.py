"""The article's entry point for SageMaker's Hugging Face containers: `model_fn` loads the base and every adapter below
`model_dir`, and `predict_fn` answers `{"input_text", "adapter_name"}` with `[{"confidence_score", "predicted_text"}]`.

`loraplex sagemaker pack` writes such a file. LORAPLEX_BACKEND in the environment chooses the backend.
"""

from loraplex.sagemaker.handlers import input_fn, model_fn, output_fn, predict_fn

__all__ = ["input_fn", "model_fn", "output_fn", "predict_fn"]
