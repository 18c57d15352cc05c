"""Loads a base's folder as a model that computes packed steps, or says why the base cannot be served.

transformers' modelling code takes seconds to import. Only bases that need it import it, and our own decoder does not.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from loraplex.adapters.weights import BaseLayers
from loraplex.disk import unchanged
from loraplex.errors import UnsupportedModelError
from loraplex.machine import free_bytes
from loraplex.model.base_weights import BaseWeights, weight_files
from loraplex.model.decoder import FAMILIES, Decoder, decoder_layers, decodes, needed_shapes
from loraplex.model.graphs import Capture
from loraplex.model.model import Model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SERVED_LAYER_TYPES = {"full_attention", "sliding_attention"}
LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}
# How the tensors of LoRA on a vision-language model began before transformers 4.52, and how they begin now.
LANGUAGE_MODEL = "model.language_model"
LLAVA_NAMES = {
    "language_model.model.": f"{LANGUAGE_MODEL}.",
    "language_model.lm_head.": "lm_head.",
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
}
QWEN_NAMES = {f"model.{part}.": f"{LANGUAGE_MODEL}.{part}." for part in ("layers", "embed_tokens")} | {
    "visual.": "model.visual."
}
FORMER_NAMES = {"qwen2_vl": QWEN_NAMES, "qwen2_5_vl": QWEN_NAMES}


def resolve_device(name: str) -> torch.device:
    """Return the device of that name; "auto" is CUDA if available. Raises UnsupportedModelError where PyTorch finds no
    such CUDA device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():  # torch.device would wrap a large index around
        raise UnsupportedModelError(
            f"device {name!r}",
            f"PyTorch finds {torch.cuda.device_count()} CUDA devices",
            remedy="use --device cpu",
        )
    return torch.device(name)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of that name; "auto" is bfloat16 if the device computes in it, else float32."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        # By default emulation counts as support, but FlashAttention's kernels refuse devices that emulate.
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def default_step_tokens(device: torch.device, dtype: torch.dtype, config: PreTrainedConfig) -> int:
    """Return the tokens of one forward pass: enough for full speed of the matrix products.

    More tokens only cost memory. On a CPU they also overflow its caches, and the operations between the products then
    take several times longer per token. On CUDA a step's activations take at most a tenth of the free memory.
    """
    text = config.get_text_config()
    per_token = step_token_bytes(int(text.hidden_size), inner_size(text), dtype.itemsize)
    free = free_bytes(device) if device.type == "cuda" else None
    return step_tokens(dtype.itemsize, per_token, free)


def inner_size(text: Any) -> int:
    """Return the widest layer of the gated MLP. text: the base's text config."""
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    return max(inner) if isinstance(inner, list | tuple) else int(inner)


def step_token_bytes(hidden_size: int, inner_size: int, item_bytes: int) -> int:
    """Return the bytes of one token's activations: of the tensors that are alive at once within a layer."""
    return item_bytes * (8 * hidden_size + 3 * inner_size)


def step_tokens(item_bytes: int, bytes_per_token: int, free: int | None) -> int:
    """Return the tokens of one forward pass. free: bytes that are free on a CUDA device; None for a CPU."""
    if free is None:
        return 4096 // item_bytes
    num_tokens = max(256, min(16384 // item_bytes, free // 10 // bytes_per_token))
    return 1 << num_tokens.bit_length() - 1  # the power of two below it


def read_config(path: Path, *, packs: bool = True, values: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    """Return the base's config, checked. packs: whether the base must run on packed attention and its own weights.
    values: what the config holds, where no file is to be read; `path` is then only what errors name. Raises
    UnsupportedModelError, which names what cannot be served."""
    config: PreTrainedConfig
    try:
        if values is None:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        else:
            config = AutoConfig.for_model(**values)
    except Exception as exc:  # each config class raises its own errors on unexpected values
        raise _refused(path, _reason(exc), "use a base that transformers knows; no remote code is run") from None
    if packs:
        _check_packing(config, path)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(longest, int) or longest < 1:
        raise _refused(path, f"key 'max_position_embeddings' is {longest!r}, so the longest prompt is not known")
    return config


def max_positions(config: PreTrainedConfig) -> int:
    """Return the tokens of the longest text that the base takes."""
    return int(config.get_text_config().max_position_embeddings)


def _check_packing(config: PreTrainedConfig, path: Path) -> None:
    text = config.get_text_config()
    layer_types = set(getattr(text, "layer_types", None) or ())
    if not layer_types <= SERVED_LAYER_TYPES:
        others = sorted(layer_types - SERVED_LAYER_TYPES)
        raise _refused(path, f"layer types {others} are not served, only full and sliding attention")
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise _refused(
            path,
            f"the base is quantized ({method or 'quantization_config'})",
            "serve the unquantized base, or use --backend vllm",
        )
    for rope_type in _rope_types(getattr(text, "rope_parameters", None) or {}):
        if rope_type in LENGTH_DEPENDENT_ROPE:
            raise _refused(
                path,
                f"rope type {rope_type!r} depends on the batch's longest text, so texts packed together would differ",
            )


def _refused(path: Path, what: str, remedy: str = "serve another base") -> UnsupportedModelError:
    return UnsupportedModelError(path / "config.json", what, remedy=remedy)


def read_layers(config: PreTrainedConfig, path: Path, *, packs: bool = True) -> tuple[BaseLayers, int]:
    """Return the base's layers that an adapter may change, and its number of token embeddings. Reads no weights.

    packs: as in `read_config`. Raises UnsupportedModelError where the base is not a causal language model that can be
    served.
    """
    if packs and decodes(config, BaseWeights(path)):
        return decoder_layers(config), int(config.vocab_size)
    skeleton = build_skeleton(config, path, packs=packs)
    embeddings = skeleton.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    return base_layers(skeleton), embeddings.num_embeddings


def check_weights(config: PreTrainedConfig, path: Path, *, packs: bool = True) -> None:
    """Check on the headers that the base's safetensors files are whole, and that the tensors that our own decoder needs
    are there in their shapes. packs: as in `read_config`. Raises UnsupportedModelError."""
    weights = BaseWeights(path)
    if packs and config.model_type in FAMILIES:
        shapes = needed_shapes(config)
        if not weights.names.isdisjoint(shapes):  # else transformers may know the names
            for name, shape in shapes.items():
                weights.check(name, shape)


def build_skeleton(config: PreTrainedConfig, path: Path, *, packs: bool = True) -> "PreTrainedModel":
    """Return transformers' model on the meta device, without weights. Raises UnsupportedModelError as `read_layers`
    does."""
    try:
        with torch.device("meta"):
            model: PreTrainedModel = model_class(config).from_config(config, trust_remote_code=False)
    except Exception as exc:  # inconsistent shapes raise any kind of error
        raise _refused(path, _reason(exc), "use a causal language model as the base") from None
    if packs and not getattr(model, "_supports_attention_backend", False):
        raise _refused(
            path, f"{type(model).__name__} does not take its attention from transformers' AttentionInterface"
        )
    return model


def model_class(config: PreTrainedConfig) -> Any:
    """Return transformers' automatic class for the base: of causal language models, or of vision-language models."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    is_causal = type(config) in AutoModelForCausalLM._model_mapping
    has_vision = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if has_vision and not is_causal else AutoModelForCausalLM


def base_layers(model: "PreTrainedModel") -> BaseLayers:
    """Return the model's layers that an adapter may change, with paths and shapes. A skeleton is enough."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    linear: dict[str, tuple[int, int]] = {}
    embeddings: dict[str, tuple[int, int]] = {}
    conv1d, biases, other_biases = set(), set(), set()
    output, output_shape = None, (0, 0)
    text = model.config.get_text_config()
    decoder = None if text is model.config else model.get_decoder()
    [text_path] = [path for path, layer in model.named_modules() if layer is decoder] or [""]
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear | Conv1D):
            has_bias = layer.bias is not None
            shape = (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else (layer.nf, layer.nx)
            if layer is head:
                output, output_shape = path, shape
            else:
                linear[path] = shape
            biases |= {path} if has_bias else set()
            conv1d |= {path} if isinstance(layer, Conv1D) else set()
        elif isinstance(layer, nn.Embedding):
            place = {path: (layer.num_embeddings, layer.embedding_dim)}
            embeddings = place | embeddings if layer is embedding else embeddings | place
        elif getattr(layer, "bias", None) is not None:
            other_biases.add(path)
    return BaseLayers(
        linear=linear,
        embeddings=embeddings,
        output=output,
        output_shape=output_shape,
        tied=bool(getattr(model.config, "tie_word_embeddings", False)),
        biases=frozenset(biases),
        other_biases=frozenset(other_biases),
        conv1d=frozenset(conv1d),
        hidden_size=int(text.hidden_size),
        beside_text=frozenset(path for path in linear if text_path and not path.startswith(f"{text_path}.")),
        former_names=FORMER_NAMES.get(model.config.model_type, LLAVA_NAMES) if text_path == LANGUAGE_MODEL else {},
    )


def read_stop_ids(path: Path, config: PreTrainedConfig) -> frozenset[int]:
    """Return the tokens that end a text, from the base's generation_config.json or else its config.json."""
    try:
        named = GenerationConfig.from_pretrained(path, local_files_only=True).eos_token_id
    except OSError:
        named = getattr(config, "eos_token_id", None)
    return frozenset([named] if isinstance(named, int) else named or ())


def load_model(
    config: PreTrainedConfig, path: Path, dtype: torch.dtype, device: torch.device, capture: Capture | None = None
) -> Model:
    """Load the base in `path` as a model with empty slots: our own decoder if the base is built like Llama, else
    transformers' model. capture: captures small steps as CUDA graphs; only our decoder uses it."""
    weights = BaseWeights(path)
    if decodes(config, weights):
        return Decoder(config, weights, dtype, device, capture)
    from loraplex.model.hooked import ATTENTION, Hooked

    if capture is not None:
        logger.warning("CUDA graphs are captured for our own decoder only, which does not serve %s", config.model_type)
    return Hooked(load_transformers_model(config, path, dtype, device, ATTENTION))


def load_transformers_model(
    config: PreTrainedConfig, path: Path, dtype: torch.dtype, device: torch.device, attention: str
) -> "PreTrainedModel":
    """Load transformers' model from safetensors, shard by shard, in `dtype` on `device`. attention: its name in
    transformers' AttentionInterface. Raises UnsupportedModelError where the files do not make a model, or change
    meanwhile."""
    try:
        with unchanged(weight_files(path), UnsupportedModelError):
            loaded: Any = model_class(config).from_pretrained(
                path,
                config=config,
                dtype=dtype,
                attn_implementation=attention,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
            # transformers maps the files, and a mapped file must not change while the model serves.
            for tensor in (*loaded[0].parameters(), *loaded[0].buffers()):
                tensor.data = tensor.data.clone() if tensor.device.type == "cpu" else tensor.data
    except UnsupportedModelError:
        raise
    except Exception as exc:  # from safetensors, PyTorch or the model: the files do not make a model
        raise UnsupportedModelError(
            path, f"the base does not load: {_reason(exc)}", remedy="save or copy the base again"
        ) from None
    model, info = loaded
    if info["missing_keys"]:
        raise UnsupportedModelError(
            path,
            f"the weights lack {sorted(info['missing_keys'])[0]!r} ({len(info['missing_keys'])} tensors in all)",
            remedy="copy all of the base's safetensors files",
        )
    return model.to(device).eval().requires_grad_(False)  # type: ignore[no-any-return]


def _reason(exc: Exception) -> str:
    """Return the first line of the message, with the exception's class where the line alone says little."""
    first = (str(exc).strip().splitlines() or [""])[0]
    return first if isinstance(exc, ValueError | OSError) and first else f"{type(exc).__name__}: {first}"


def _rope_types(parameters: dict[str, Any]) -> set[str]:
    """Return the rope types of one set of parameters, or of one set per layer type."""
    if "rope_type" in parameters:
        return {str(parameters["rope_type"])}
    return {str(inner.get("rope_type")) for inner in parameters.values() if isinstance(inner, dict)}
