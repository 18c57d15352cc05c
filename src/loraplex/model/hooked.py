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
from loraplex.model.kv_cache import KVCache, Shape, kv_bytes
from loraplex.model.lora_embedding import LoRAEmbedding
from loraplex.model.lora_linear import LoRALinear
from loraplex.model.packed_linear import PackedLinear, can_pack
from loraplex.model.score_heads import ScoreHeads
from loraplex.model.step_memo import StepMemo
from loraplex.ops.attention import packed_attention
from loraplex.ops.layout import Span, layout_of
from loraplex.ops.staging import Staging

ATTENTION = "loraplex"  # the name of `_attention` in transformers' AttentionInterface

STEP = "loraplex_step"  # the attribute by which an attention module finds the step that runs

# Arguments of an attention call that change no answer, whatever their value. None and False ask for nothing.
_INERT = frozenset(
    "output_attentions output_hidden_states output_router_logits position_ids return_dict use_cache".split()
)
_PROBE_TOKENS = 24


class _Step:
    """The step that runs now, shared by the layers that we insert into one model."""

    def __init__(self) -> None:
        self.kv_shapes: dict[int, Shape] = {}  # by layer, as the probe found them
        self.cache: KVCache | None = None
        self.inputs: ModelInputs | None = None  # None: the probe runs
        self.hidden: torch.Tensor | None = None  # the output head's input

    @property
    def running(self) -> ModelInputs:
        assert self.inputs is not None, "no step runs"
        return self.inputs


class Hooked:
    """A Model around a transformers model. The last layer computes all tokens; the output head the wanted rows only."""

    max_captured_tokens = 0

    def __init__(self, model: PreTrainedModel) -> None:
        """model: loaded with attention ATTENTION. This object changes the model and owns it from now on. Raises
        UnsupportedModelError where the model does not answer with packed attention as it does with its own."""
        self._model = model
        self.device, self.dtype = model.device, model.dtype
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        self.has_experts = any(name.endswith(".experts") for name, _ in model.named_modules())
        self._step = _Step()
        _probe(model, self._step, self.vocab_size)
        found = self._step.kv_shapes
        self._kv_shapes = tuple(found.get(index, (0, 0)) for index in range(max(found) + 1))
        self.kv_bytes = kv_bytes(self._kv_shapes, self.dtype)
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
        self._step.cache = KVCache(self._kv_shapes, num_slots, self.dtype, self.device)

    def forward(self, inputs: ModelInputs) -> ModelOutput:
        self.memo.begin(inputs.segments, inputs.last_segments)
        self._step.inputs = inputs
        try:
            logits = self._model(
                input_ids=inputs.input_ids[None],
                position_ids=inputs.position_ids[None],
                use_cache=False,
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # token ids [1, T], or [..., in] with T rows
        """Return the layer's output for all tokens; the output head's only for the wanted ones: [1, L, vocab]."""
        inputs = self._step.running
        is_embedding = isinstance(self.adapted, LoRAEmbedding)
        rows = x.reshape(-1) if is_embedding else x.reshape(-1, x.shape[-1])
        assert len(rows) == len(inputs.input_ids), "a layer with an adapter does not see every token"
        if not self._is_output:
            shape = x.shape if is_embedding else x.shape[:-1]
            return self.adapted(rows, inputs.segments).reshape(*shape, -1)
        self._step.hidden = rows[inputs.logit_rows]
        return self.adapted(self._step.hidden, inputs.last_segments)[None]


def _probe(model: PreTrainedModel, step: _Step, vocab_size: int) -> None:
    """Compare packed attention on one text with transformers' own, and note the shapes of keys and values. This finds
    a model that attends to later tokens, counts its positions otherwise, or passes on arguments that are not read.

    Raises UnsupportedModelError where the answers differ by more than rounding."""
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            setattr(module, STEP, step)
    ids = torch.tensor([[(1 + 7 * i) % vocab_size for i in range(_PROBE_TOKENS)]], device=model.device)
    positions = torch.arange(_PROBE_TOKENS, device=model.device)[None]

    def ask(attention: str, **inputs: Any) -> torch.Tensor:
        model.set_attn_implementation(attention)
        logits = model(input_ids=ids, use_cache=False, **inputs).logits[0]
        return logits.float().log_softmax(-1)  # type: ignore[no-any-return]

    try:
        with torch.inference_mode():
            expected = ask("eager")
            # Eager scores are rounded to 16 bits, and fused ones are not: transformers' two may differ by much.
            rounds = model.dtype != torch.float32 and getattr(model, "_supports_sdpa", False)
            rounding = _distance(ask("sdpa"), expected) if rounds else 0.0
            found = ask(ATTENTION, position_ids=positions)
    except (UnsupportedModelError, torch.OutOfMemoryError):
        raise
    except Exception as exc:  # the model's own code may raise anything
        raise _unsupported(model, f"it does not answer a short text: {type(exc).__name__}: {exc}") from exc
    if not step.kv_shapes:
        raise _unsupported(model, "it has no layer that attends")
    difference = _distance(found, expected)
    if not difference <= max(2 * rounding, 1e-3 if model.dtype == torch.float32 else 0.25):
        raise _unsupported(
            model,
            f"its log probabilities with packed attention differ by {difference:.2g} from those with its own: perhaps "
            "it is an encoder, or counts positions in its own way",
        )


def _distance(some: torch.Tensor, others: torch.Tensor) -> float:
    """Return the root mean square of the differences. Equal infinities do not differ."""
    differences = (some - others)[some != others]
    return float((differences.square().sum() / some.numel()).sqrt())


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, H, T, D]
    key: torch.Tensor,  # [1, G, T, D]
    value: torch.Tensor,  # [1, G, T, E]
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,  # [H]
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # [1, T, H, E]
    """Compute transformers' attention call by packed attention, and write K/V to the cache. Raises
    UnsupportedModelError for an argument that packed attention does not support."""
    step, index = getattr(module, STEP, None), getattr(module, "layer_idx", None)
    _check_arguments(module, attention_mask, kwargs)
    if not isinstance(step, _Step) or not isinstance(index, int):
        raise _unsupported(module, "its attention does not say its layer")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    widest, num_values = max(q.shape[-1], v.shape[-1]), v.shape[-1]
    # Heads of keys and values of two sizes: zeros fill the smaller, and change no score.
    q, k, v = (x if x.shape[-1] == widest else F.pad(x, (0, widest - x.shape[-1])) for x in (q, k, v))
    inputs, shape = step.inputs, (k.shape[1], widest)
    if inputs is None:
        if index in step.kv_shapes:
            raise _unsupported(module, f"layer {index} attends twice in one pass")
        step.kv_shapes[index] = shape
        layout, cache = layout_of((Span(start=0, end=len(q)),), Staging(q.device)), None
    else:
        if step.kv_shapes.get(index) != shape:
            raise _unsupported(module, f"layer {index} has keys and values of changing shapes")
        if step.cache is not None and inputs.kv_rows is not None and inputs.kv_slots is not None:
            step.cache.write(index, inputs.kv_slots, k[inputs.kv_rows], v[inputs.kv_rows])
        layout, cache = inputs.layout, None if step.cache is None else step.cache.layer(index)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    attended = packed_attention(
        q, k, v, layout, cache=cache, scaling=scaling, window=sliding_window, softcap=softcap, sinks=s_aux
    )
    return attended[None, ..., :num_values], None


def _check_arguments(module: nn.Module, mask: torch.Tensor | None, given: dict[str, Any]) -> None:
    if mask is not None:
        raise _unsupported(module, "its attention has a mask of its own")
    is_causal = given.pop("is_causal", None)
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise _unsupported(module, "it attends to later tokens too: it is an encoder")
    for name, value in given.items():
        if name not in _INERT and not (value is None or value is False or (name == "dropout" and value == 0)):
            raise _unsupported(module, f"its attention uses {name!r}, which is not supported")


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
