"""Lists the tensors that a config requires in an adapter's file for a given base, and assembles the adapter from them.
Knows PEFT's tensor names; reads no files."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from loraplex.adapters.peft_config import QA_HEAD, SCORE_HEADS, PeftConfig, refused, token_targets
from loraplex.adapters.weights import AdapterWeights, BaseLayers, LoRAWeights, SavedModule
from loraplex.bundle import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from loraplex.errors import AdapterError, quoted

Shape = tuple[int, ...]
Tensors = Mapping[str, torch.Tensor]  # by name in the file, without PEFT's prefix

WRONG_BASE = "serve the adapter on the base it was trained on, with the config that was saved with it"
SAVE_AGAIN = "save the adapter again, config and weights together"
TRAIN_PLAINER = "train the adapter without it"

LORA_PARTS = ("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B")
MAGNITUDE, ROWS = "lora_magnitude_vector", "token_adapter.trainable_tokens_delta"
# Tensors that VeLoRA and MonteCLoRA use in training. PEFT ignores them at inference.
TRAINING_STATE = {
    "velora_config": ("lora_velora_embed",),
    "monteclora_config": tuple(
        f"lora_monteclora_sampler.{name}"
        for name in ("expert_weights", "expert_weights_prior", "gaussian_var_prior", "std_prior")
    ),
}


class Required(NamedTuple):
    shape: Shape
    reason: str


@dataclass(slots=True, kw_only=True)
class Plan:
    """The tensors that a file must hold, those that it may hold, and those that are ignored (`unused`)."""

    folder: Path
    config: PeftConfig
    layers: BaseLayers
    is_classifier: bool
    required: dict[str, Required] = field(default_factory=dict)
    optional: dict[str, Shape] = field(default_factory=dict)
    unused: set[str] = field(default_factory=set)
    scaling: dict[str, float] = field(default_factory=dict)  # path of a layer with LoRA -> its scaling
    saved: set[str] = field(default_factory=set)
    token_ids: dict[str, tuple[int, ...]] = field(default_factory=dict)
    score_head: str | None = None

    @property
    def output(self) -> str | None:
        """Path of the output head; None for a classifier, which has its own head in place of the base's."""
        return None if self.is_classifier else self.layers.output

    @property
    def embedding(self) -> str | None:
        return self.layers.token_embedding

    @property
    def is_tied(self) -> bool:
        return self.layers.tied and self.output is not None and self.embedding is not None

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Path -> shape of the weight, as PEFT saves it, for the embeddings and the output head."""
        heads = {} if self.output is None else {self.output: self.layers.output_shape}
        return {**self.layers.embeddings, **heads}

    @property
    def shares_rows(self) -> bool:
        """Whether the tied head uses the embedding's token rows."""
        rows = self.token_ids.get(self.embedding or "")
        return self.is_tied and rows is not None and self.token_ids.get(self.output or "") == rows

    def copy_name(self, path: str) -> str:
        """Return the name under which PEFT stores the base's own weight. It depends on how PEFT wrapped the layer."""
        if path in self.scaling:
            return f"{path}.base_layer.weight"
        if path in self.saved:
            return f"{path}.original_module.weight"
        return f"{path}.token_adapter.base_layer.weight" if path in self.token_ids else f"{path}.weight"

    def bias_name(self, path: str) -> str:
        return f"{path}.base_layer.bias" if path in self.scaling else f"{path}.bias"

    def refuse(self, key: str, message: str, remedy: str = TRAIN_PLAINER) -> AdapterError:
        return refused(self.folder, key, message, remedy)

    def require(self, name: str, shape: Shape, reason: str) -> None:
        self.required[name] = Required(shape, reason)


def make_plan(folder: Path, config: PeftConfig, layers: BaseLayers, found: Mapping[str, Shape]) -> Plan:
    """Return the plan for a file that holds the tensors `found` (name -> shape).

    Raises AdapterError where PEFT would not load the config onto this base, or where the config is not supported."""
    heads = [head for head in SCORE_HEADS if f"{head}.weight" in found]
    is_classifier = config.task_type == "SEQ_CLS" or (
        config.task_type is None and any(config.saves(head) for head in heads)
    )
    plan = Plan(folder=folder, config=config, layers=layers, is_classifier=is_classifier)
    for num_embeddings, _ in list(layers.embeddings.values())[:1]:
        for token in config.invocation_tokens or ():
            if token >= num_embeddings:
                raise plan.refuse("alora_invocation_tokens", f"the base has no token {token}", WRONG_BASE)
    _plan_saved(plan)
    _plan_lora(plan)
    _plan_biases(plan)
    _plan_token_rows(plan)
    _plan_base_copies(plan)
    if is_classifier:
        _plan_score(plan, heads, found)
    return plan


def _plan_saved(plan: Plan) -> None:
    config, layers = plan.config, plan.layers
    known = [path for path in (*layers.embeddings, layers.output, *SCORE_HEADS) if path is not None]
    for name in config.modules_to_save or ():
        if config.task_type == "QUESTION_ANS" and name == QA_HEAD:
            continue  # PEFT adds the name, also where the model has no such head
        if not any(path.endswith(name) for path in known):
            raise plan.refuse(
                "modules_to_save", f"{quoted(name)} may not be trained in full; only {', '.join(known)} may"
            )
    for path in layers.linear:
        if config.saves(path):
            raise plan.refuse("modules_to_save", f"names {path}; only {', '.join(known)} may be trained in full")
    plan.saved |= {path for path in plan.shapes if config.saves(path)}
    if plan.is_tied and config.ties_saved:
        plan.saved |= {path for path in (plan.embedding, plan.output) if path is not None}
        if plan.output in layers.biases:
            raise plan.refuse("ensure_weight_tying", "PEFT drops the head's bias where it ties the saved embedding")
    for path in sorted(plan.saved):
        reason = f"{ADAPTER_CONFIG} names {path} in modules_to_save"
        plan.require(f"{path}.weight", plan.shapes[path], reason)
        # With save_embedding_layers PEFT writes these as well, and never reads them.
        unused: dict[str, Shape] = {f"{path}.modules_to_save.weight": plan.shapes[path]}
        if path in layers.biases:
            shape = plan.shapes[path][:1]
            plan.require(f"{path}.bias", shape, reason)
            unused |= {f"{path}.modules_to_save.bias": shape, f"{path}.original_module.bias": shape}
        plan.optional |= unused
        plan.unused |= set(unused)


def _plan_lora(plan: Plan) -> None:
    config, layers = plan.config, plan.layers
    linear = dict(layers.linear)
    if plan.output is not None:
        linear[plan.output] = layers.output_shape
    targeted = {path for path in layers.linear if config.targets(path, is_linear=True)}
    targeted |= {path for path in plan.shapes if config.targets(path, is_linear=False)}
    is_tied = plan.is_tied and config.ties_lora
    if is_tied:
        targeted |= {path for path in (plan.embedding, plan.output) if path is not None}
    if not targeted:
        raise plan.refuse("target_modules", f"{quoted(config.target_modules)} names no layer of the base", WRONG_BASE)
    for path in sorted(targeted):
        reason = f"{ADAPTER_CONFIG} targets {path}"
        rank, plan.scaling[path] = config.rank_and_scaling(path)
        if path in layers.embeddings:
            _check_embedding(plan, path)
            num_embeddings, dim = layers.embeddings[path]
            plan.require(f"{path}.lora_embedding_A", (rank, num_embeddings), reason)
            plan.require(f"{path}.lora_embedding_B", (dim, rank), reason)
            num_magnitudes = dim
        else:
            if is_tied and path == plan.output:
                rank, _ = config.rank_and_scaling(plan.embedding or "")  # the tied head has the embedding's matrices
            num_magnitudes, in_features = linear[path]
            plan.require(f"{path}.lora_A.weight", (rank, in_features), reason)
            plan.require(f"{path}.lora_B.weight", (num_magnitudes, rank), reason)
            if config.lora_bias:
                plan.require(f"{path}.lora_B.bias", (num_magnitudes,), reason)
        if config.use_dora:
            plan.require(f"{path}.{MAGNITUDE}", (num_magnitudes,), reason)
        for key, names in TRAINING_STATE.items():
            if getattr(config, key):
                plan.unused |= {f"{path}.{name}" for name in names}


def _check_embedding(plan: Plan, path: str) -> None:
    config = plan.config
    for key in config.variants:
        if key not in ("use_dora", "init_lora_weights"):
            raise plan.refuse(key, f"PEFT does not combine it with LoRA on an embedding ({path})")
    if config.lora_bias:
        raise plan.refuse("lora_bias", f"PEFT does not combine it with LoRA on an embedding ({path})")


def _plan_biases(plan: Plan) -> None:
    config, layers = plan.config, plan.layers
    if config.bias == "all" and layers.other_biases:
        raise plan.refuse(
            "bias",
            f"'all' trains the bias of {min(layers.other_biases)} too; only those of linear layers are supported",
        )
    for path in sorted(layers.biases):
        if (path == layers.output and plan.is_classifier) or path in plan.saved:
            continue
        shape = (layers.linear[path][0] if path in layers.linear else layers.output_shape[0],)
        if config.bias == "all" or (config.bias == "lora_only" and path in plan.scaling):
            plan.require(plan.bias_name(path), shape, f"{ADAPTER_CONFIG} has bias {config.bias!r}")
        elif path == plan.output:  # PEFT stores the base's bias beside the base's weight
            plan.optional[plan.bias_name(path)] = shape


def _plan_token_rows(plan: Plan) -> None:
    key, config, layers = "trainable_token_indices", plan.config, plan.layers
    if config.trainable_token_indices is not None and plan.embedding is None:
        raise plan.refuse(key, "the base has no known token embedding", WRONG_BASE)
    for name, ids in token_targets(config, plan.embedding).items():
        matched = [path for path in plan.shapes if path.endswith(name)]
        if not matched or any(path.endswith(name) for path in layers.linear):
            raise plan.refuse(key, f"{quoted(name)} is not the name of an embedding or an output head")
        for path in matched:
            if path in plan.token_ids:
                raise plan.refuse(key, f"names {path} twice")
            if max(ids) >= plan.shapes[path][0]:
                raise plan.refuse(key, f"{path} has no token {max(ids)}, only {plan.shapes[path][0]}", WRONG_BASE)
            plan.token_ids[path] = tuple(ids)
    embedding, output = plan.embedding or "", plan.output or ""
    if plan.is_tied and embedding in plan.token_ids:
        ids_of_head = plan.token_ids.setdefault(output, plan.token_ids[embedding])
        if config.ensure_weight_tying and ids_of_head != plan.token_ids[embedding]:
            raise plan.refuse(key, f"{embedding} and {output} are tied but name other tokens")
    for path, row_ids in plan.token_ids.items():
        _check_token_rows(plan, path)
        shape = (len(row_ids), plan.shapes[path][1])
        # With save_embedding_layers PEFT writes this as well, and never reads it.
        unused: dict[str, Shape] = {f"{path}.token_adapter.trainable_tokens_original": shape}
        if path == output and plan.shares_rows:
            unused[f"{path}.{ROWS}"] = shape
        else:
            plan.require(f"{path}.{ROWS}", shape, f"{ADAPTER_CONFIG} names {path} in {key}")
        plan.optional |= unused
        plan.unused |= set(unused)


def _check_token_rows(plan: Plan, path: str) -> None:
    """Raise AdapterError where PEFT cannot combine token rows with another change of the same layer.

    PEFT wraps a layer for its token rows last, and rejects or damages most layers that are wrapped already."""
    key = "trainable_token_indices"
    if path in plan.saved:
        raise plan.refuse(key, f"PEFT does not combine it with modules_to_save on {path}")
    if path == plan.output and path in plan.layers.biases:
        raise plan.refuse(key, f"PEFT drops the bias of {path}")
    if path in plan.scaling and not (path == plan.output and plan.shares_rows and not plan.config.use_dora):
        raise plan.refuse(key, f"PEFT does not combine it with {'DoRA' if plan.config.use_dora else 'LoRA'} on {path}")


def _plan_base_copies(plan: Plan) -> None:
    """Allow copies of the base's embedding and head. PEFT stores both beside LoRA on either, and with
    save_embedding_layers. When PEFT loads the adapter, the copies replace the base's weights."""
    for path in (plan.embedding, plan.output):
        if path is not None:
            plan.optional.setdefault(plan.copy_name(path), plan.shapes[path])


def _plan_score(plan: Plan, heads: list[str], found: Mapping[str, Shape]) -> None:
    if len(heads) != 1:
        raise AdapterError(
            plan.folder / ADAPTER_WEIGHTS,
            f"{ADAPTER_CONFIG} says 'SEQ_CLS', but there are {len(heads)} classification heads "
            f"({' or '.join(SCORE_HEADS)}), not one",
            remedy=SAVE_AGAIN,
        )
    plan.score_head = heads[0]
    shape = found[f"{plan.score_head}.weight"]
    num_labels = max(shape[0], 1) if shape else 1
    plan.require(
        f"{plan.score_head}.weight", (num_labels, plan.layers.hidden_size), "the classification head needs this tensor"
    )
    plan.optional[f"{plan.score_head}.bias"] = (num_labels,)


def assemble(plan: Plan, tensors: Tensors) -> AdapterWeights:
    """Build the adapter from the tensors that the plan asked for. `kv_id` is left empty."""
    loras = {path: _lora(plan, path, tensors) for path in plan.scaling}
    output = loras.pop(plan.output or "", None)
    embeddings = {path: loras.pop(path) for path in plan.layers.embeddings if path in loras}
    if output is not None and plan.is_tied and plan.config.ties_lora:
        tied = embeddings[plan.embedding or ""]
        _check_equal(plan, "LoRA", ((tied.lora_A.T, output.lora_B), (tied.lora_B.T, output.lora_A)))
    biases = {
        path: tensors[plan.bias_name(path)]
        for path in sorted(plan.layers.biases)
        if path not in plan.saved and plan.bias_name(path) in tensors
    }
    return AdapterWeights(
        modules={path: lora for path, lora in loras.items() if path not in plan.layers.beside_text},
        kv_id="",
        invocation_tokens=plan.config.invocation_tokens,
        embeddings=embeddings,
        output=output,
        saved=_saved(plan, tensors),
        biases=biases,
        token_rows={
            path: (ids, tensors[f"{plan.embedding if plan.shares_rows else path}.{ROWS}"])
            for path, ids in plan.token_ids.items()
        },
        score=_module(plan.score_head, tensors) if plan.score_head is not None else None,
        output_path=plan.layers.output,
    )


def _lora(plan: Plan, path: str, tensors: Tensors) -> LoRAWeights:
    names = ("lora_embedding_A", "lora_embedding_B") if path in plan.layers.embeddings else LORA_PARTS[:2]
    return LoRAWeights(
        lora_A=tensors[f"{path}.{names[0]}"],
        lora_B=tensors[f"{path}.{names[1]}"],
        scaling=plan.scaling[path],
        lora_bias=tensors.get(f"{path}.lora_B.bias"),
        magnitude=tensors.get(f"{path}.{MAGNITUDE}"),
    )


def _saved(plan: Plan, tensors: Tensors) -> dict[str, SavedModule]:
    """Return the modules trained in full, and the file's copies of the base's embedding and head."""
    pair = [path for path in (plan.embedding, plan.output) if path is not None]
    copies = {path: tensors[name] for path in pair if (name := plan.copy_name(path)) in tensors}
    if plan.is_tied and copies:  # one parameter in PEFT: a copy of either replaces both
        _check_equal(plan, "copies", zip(list(copies.values())[:-1], list(copies.values())[1:], strict=True))
        copies = dict.fromkeys(pair, next(iter(copies.values())))
    saved = {path: SavedModule(weight=weight) for path, weight in copies.items()}
    saved |= {path: _module(path, tensors) for path in sorted(plan.saved)}
    if plan.is_tied and plan.config.ties_saved:
        embedding, output = saved[plan.embedding or ""], saved[plan.output or ""]
        _check_equal(plan, "weights", [(embedding.weight, output.weight)])
        saved[plan.output or ""] = embedding
    return saved


def _module(path: str, tensors: Tensors) -> SavedModule:
    return SavedModule(weight=tensors[f"{path}.weight"], bias=tensors.get(f"{path}.bias"))


def _check_equal(plan: Plan, what: str, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Raise AdapterError where tied tensors differ: PEFT loads both into one parameter, so the first would be lost."""
    for one, other in pairs:
        if not torch.equal(one, other):
            raise AdapterError(
                plan.folder / ADAPTER_WEIGHTS,
                f"the {what} of {plan.embedding} and {plan.output} are tied but differ",
                remedy="train the adapter without ensure_weight_tying, or on an untied base",
            )


def explain(plan: Plan, name: str) -> str:
    """Return why the plan does not expect a tensor that is in the file."""
    config, layers = plan.config, plan.layers
    for part in (*LORA_PARTS, MAGNITUDE):
        path = name.removesuffix(f".{part}")
        if path == name:
            continue
        if path not in layers.linear and path not in plan.shapes:
            return f"the base has no layer {quoted(path)} that takes LoRA"
        if path not in plan.scaling:
            return f"{ADAPTER_CONFIG} does not target that layer"
        if part == MAGNITUDE:
            return f"{ADAPTER_CONFIG} does not say use_dora"
        return (
            f"{ADAPTER_CONFIG} does not say lora_bias"
            if part == "lora_B.bias"
            else "only another kind of layer has this tensor"
        )
    path, _, part = name.rpartition(".")
    path = path.removesuffix(".base_layer")
    if part == "bias" and path in layers.other_biases:
        return "only the biases of linear layers are supported"
    if part == "bias" and (path in layers.linear or path in plan.shapes):
        return f"{ADAPTER_CONFIG} has bias {config.bias!r}" if path in layers.biases else "the base's layer has no bias"
    if name.endswith(f".{ROWS}"):
        return f"{ADAPTER_CONFIG} does not name that layer in trainable_token_indices"
    if part == "weight":
        return "only an embedding, the output head and a classification head may be trained in full"
    return "the tensor is unknown, and may change the answers"
