"""Serves every other transformers model, with packed attention and adapters hooked into the model's own code.

All patching is in this file. A transformers model passes its layers nothing but their input, so the layers that we
insert read the step from one object that they share.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from loraplex.adapters.weights import AdapterWeights
from loraplex.errors import UnsupportedModelError
from loraplex.machine import budget_bytes
from loraplex.model.adapted_layers import AdaptedLayer, AdaptedLayers
from loraplex.model.decoder import MEMO_MEMORY, rms_norm
from loraplex.model.inputs import ModelInputs, ModelOutput
from loraplex.model.kv_cache import KVCache, Shape, kv_bytes, kv_shapes
from loraplex.model.lora_embedding import LoRAEmbedding
from loraplex.model.lora_linear import LoRALinear
from loraplex.model.packed_linear import PackedLinear, can_pack
from loraplex.model.score_heads import ScoreHeads
from loraplex.model.step_memo import StepMemo
from loraplex.ops.attention import packed_attention

ATTENTION = "loraplex"  # the name of `_attention` in transformers' AttentionInterface

# Arguments that models pass to their attention and that have no effect here.
_INERT = frozenset({"dropout", "is_causal", "use_cache", "position_ids", "output_attentions", "output_hidden_states"})


class _Step:
    """The step that runs now, shared by the layers that we insert into one model."""

    def __init__(self, kv_shapes: tuple[Shape, ...]) -> None:
        self.kv_shapes = kv_shapes
        self.cache: KVCache | None = None
        self.inputs: ModelInputs | None = None
        self.hidden: torch.Tensor | None = None  # the output head's input

    @property
    def running(self) -> ModelInputs:
        assert self.inputs is not None, "no step runs"
        return self.inputs


class Hooked:
    """A Model around a transformers model. The last layer computes all tokens; the output head the wanted rows only."""

    max_captured_tokens = 0

    def __init__(self, model: PreTrainedModel) -> None:
        """model: loaded with attention ATTENTION. This object changes the model and owns it from now on."""
        self._model = model
        self.device, self.dtype, self.vocab_size = model.device, model.dtype, int(model.config.vocab_size)
        self._step = _Step(kv_shapes(model.config))
        self.kv_bytes = kv_bytes(self._step.kv_shapes, self.dtype)
        # The stacks that are kept between small steps.
        self.memo = StepMemo(budget_bytes(MEMO_MEMORY, model.device))
        replace_norms(model)
        _pack_linears(model)
        head = model.get_output_embeddings()
        assert head is not None, "a causal language model has an output head"
        [self._output] = [path for path, module in model.named_modules() if module is head]
        self.scores = ScoreHeads(model.device, model.dtype)
        # The head is wrapped now, because every step reads its input. Other layers are wrapped when an adapter first
        # needs them, maybe while a step runs.
        self._adapted = AdaptedLayers({self._output: self._wrap(self._output)}, self._output, self.scores, self._wrap)

    def allocate_cache(self, num_slots: int) -> None:
        self._step.cache = KVCache(self._step.kv_shapes, num_slots, self.dtype, self.device)

    def forward(self, inputs: ModelInputs) -> ModelOutput:
        self.memo.begin(inputs.segments, inputs.last_segments)
        self._step.inputs = inputs
        try:
            logits = self._model(
                input_ids=inputs.input_ids[None],
                position_ids=inputs.position_ids[None],
                use_cache=False,
                logits_to_keep=inputs.logit_rows,
                loraplex_step=self._step,
            ).logits[0]
            assert self._step.hidden is not None, "the output head did not run"
            return ModelOutput(logits, self._step.hidden)
        except torch.OutOfMemoryError:
            self.memo.clear()
            raise
        finally:
            self._step.inputs = self._step.hidden = None
            self.memo.end(inputs.segments, inputs.last_segments)

    def set_slot(self, slot: int, adapter: AdapterWeights) -> None:
        self.memo.clear_slot(slot)
        self._adapted.set_slot(slot, adapter)

    def clear_slot(self, slot: int) -> None:
        self.memo.clear_slot(slot)
        self._adapted.clear_slot(slot)

    def parameter(self, name: str) -> torch.Tensor | None:
        path, _, kind = name.rpartition(".")
        try:
            layer: Any = self._model.get_submodule(path)
        except AttributeError:
            return None
        if isinstance(layer, _HookedLayer):
            layer = layer.adapted.base_layer
        tensor = getattr(layer, kind, None)
        return tensor if isinstance(tensor, torch.Tensor) else None

    def _wrap(self, path: str) -> AdaptedLayer:
        """Replace the layer at `path` by a layer that takes adapters."""
        layer = self._model.get_submodule(path)
        adapted: AdaptedLayer
        if isinstance(layer, nn.Embedding):
            adapted = LoRAEmbedding(layer)
        else:
            assert isinstance(layer, nn.Linear | PackedLinear | Conv1D), f"{path} is a {type(layer).__name__}"
            adapted = LoRALinear(layer)
        parent, _, name = path.rpartition(".")
        hooked = _HookedLayer(adapted, self._step, is_output=path == self._output)
        setattr(self._model.get_submodule(parent), name, hooked)
        return adapted


class _HookedLayer(nn.Module):
    """The module in a transformers model that calls a layer that takes adapters."""

    def __init__(self, adapted: AdaptedLayer, step: _Step, *, is_output: bool) -> None:
        super().__init__()
        self.adapted, self._step, self._is_output = adapted, step, is_output

    @property
    def weight(self) -> torch.Tensor:
        return self.adapted.base_layer.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [1, T, ...] -> [1, T, out]
        inputs = self._step.running
        if not self._is_output:
            return self.adapted(x[0], inputs.segments)[None]
        self._step.hidden = x[0]
        return self.adapted(x[0], inputs.last_segments)[None]


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, H, T, D]
    key: torch.Tensor,  # [1, G, T, D]
    value: torch.Tensor,  # [1, G, T, D]
    attention_mask: torch.Tensor | None,
    *,
    loraplex_step: _Step,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # [1, T, H, D]
    """Compute transformers' attention call by packed attention, and write K/V to the cache. Raises
    UnsupportedModelError for an argument that packed attention does not support."""
    assert attention_mask is None, "a mask was built for an attention that derives its own"
    for name, given in kwargs.items():
        if given is not None and name not in _INERT:
            raise _unsupported(module, f"its attention uses {name!r}, which is not supported")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    index, step, inputs = module.layer_idx, loraplex_step, loraplex_step.running
    assert isinstance(index, int)
    if index >= len(step.kv_shapes) or k.shape[1:] != step.kv_shapes[index] or v.shape != k.shape:
        raise _unsupported(module, f"layer {index} has keys and values of other shapes than its config says")
    if step.cache is not None and inputs.kv_rows is not None and inputs.kv_slots is not None:
        step.cache.write(index, inputs.kv_slots, k[inputs.kv_rows], v[inputs.kv_rows])
    cache = None if step.cache is None else step.cache.layer(index)
    attended = packed_attention(
        q, k, v, inputs.layout, cache=cache, scaling=scaling, window=sliding_window, softcap=softcap
    )
    return attended[None], None


AttentionInterface.register(ATTENTION, _attention)


def _unsupported(module: nn.Module, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(type(module).__name__, what, remedy="serve another base")


def _pack_linears(model: PreTrainedModel) -> None:
    head = model.get_output_embeddings()  # may share its weight with the embeddings
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if layer is not head and can_pack(layer):
                setattr(module, name, PackedLinear(layer))  # type: ignore[arg-type]


def replace_norms(model: nn.Module) -> None:
    """Give RMS norms a forward of one kernel, where a test input shows that it computes the same."""
    for module in list(model.modules()):
        forward = _fused_norm(module)
        if forward is not None:
            module.forward = forward


def _fused_norm(module: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Return a forward of one kernel for an RMS norm like Llama's or Gemma's; None for any other module."""
    weight = getattr(module, "weight", None)
    eps = next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(weight, torch.Tensor) or eps is None:
        return None
    shape, one_plus_weight = weight.shape, 1.0 + weight.detach().float()

    def llama(x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, module.weight, eps)

    def gemma(x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), shape, one_plus_weight, eps).type_as(x)

    # Compared in the weight's own dtype, whose rounding the tolerance allows. Any other kind of norm differs by more.
    probe = torch.linspace(-2, 3, 3 * weight.numel(), device=weight.device).view(3, -1).to(weight.dtype)
    tolerance = 4 * torch.finfo(weight.dtype).eps
    for forward in (llama, gemma):
        if weight.ndim == 1 and torch.allclose(module(probe), forward(probe), tolerance, tolerance):
            return forward
    return None
