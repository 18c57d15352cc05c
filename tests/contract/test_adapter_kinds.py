"""What the PEFT backends declare is what PEFT can do: of every kind of adapter that PEFT writes two, all on one model,
in several orders of coming and going. What is served equals PEFT with that adapter alone, the rest is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import tiny
from loraplex.adapters.checkpoint import read_unidentified
from loraplex.adapters.kinds import KINDS
from loraplex.adapters.slots import NO_ADAPTER
from loraplex.adapters.weights import AdapterWeights
from loraplex.config import EngineConfig
from loraplex.engine.engine import Engine
from loraplex.engine.sequence import EngineRequest, Sequence, SequenceOutput, Target
from loraplex.errors import AdapterError
from loraplex.executors.capabilities import NATIVE, PEFT, PEFT_MIXED
from loraplex.executors.peft import PeftExecutor
from loraplex.model.loader import base_layers, build_skeleton, read_config
from loraplex.text.prompt import last_match
from peft_cases import BASES, CASES, TOKEN_IDS, Bases, Case, logits, write

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of embeddings, ties and what else it thinks unwise

TOLERANCE = 1e-4
EVERY_TOKEN = tuple(Target(position=-1, token_id=i) for i in range(tiny.VOCAB_SIZE))


def twin(folder: Path, case: Case) -> Path:
    """The same kind of adapter, with other weights; what it only copies of the base stays."""
    other = folder.with_name(f"{folder.name}-twin")
    other.mkdir()
    (other / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    tensors = load_file(folder / "adapter_model.safetensors")
    saved = case.config.get("modules_to_save", ())
    for name, tensor in tensors.items():
        if "lora_B" in name or "lora_embedding_B" in name or name.removesuffix(".weight").endswith(tuple(saved)):
            tensors[name] = 1.5 * tensor
    save_file(tensors, other / "adapter_model.safetensors", metadata={"format": "pt"})
    return other


class Model:
    """A base on the PEFT backend's executor, without what serves around it."""

    def __init__(self, folder: Path, batching: Any) -> None:
        config = read_config(folder)
        self.layers = base_layers(build_skeleton(config, folder))
        self.executor = PeftExecutor(EngineConfig(dtype="float32", device="cpu", peft_batching=batching))
        self.engine: Engine = self.executor.load(folder, config, ())
        self.slots: dict[str, tuple[int, AdapterWeights]] = {}

    def read(self, folder: Path) -> AdapterWeights:
        weights = read_unidentified(folder, self.layers).identify(self.executor.parameter)
        self.executor.capabilities.check(folder, weights.kinds)
        return weights

    def place(self, name: str, folder: Path, slot: int) -> None:
        weights = self.read(folder)
        self.executor.set_slot(slot, folder, weights)
        self.slots[name] = (slot, weights)

    def clear(self, name: str) -> None:
        self.executor.clear_slot(self.slots.pop(name)[0])

    def check(self, expected: dict[str | None, torch.Tensor]) -> None:
        """All at once."""
        sequences, names = [], [None, *self.slots, None]
        for name in names:
            slot, weights = (NO_ADAPTER, None) if name is None else self.slots[name]
            invocation = None if weights is None else weights.invocation_tokens
            activation = 0 if invocation is None else last_match(TOKEN_IDS, invocation)
            assert activation is not None
            sequences.append(
                Sequence(token_ids=tuple(TOKEN_IDS), slot=slot, activation=activation, targets=EVERY_TOKEN)
            )
        request = EngineRequest(sequences)
        self.engine.submit(request)
        for name, outcome in zip(names, request.future.result(60), strict=True):
            assert isinstance(outcome, SequenceOutput), outcome
            difference = (torch.tensor(outcome.log_probs).exp() - expected[name].exp()).abs().max().item()
            assert difference <= TOLERANCE, f"{name}: {difference}"


@pytest.mark.parametrize("batching", ["sequential", "mixed"])
@pytest.mark.parametrize("base", [base for base in BASES if base != "qwen2-tied"])  # which has a score head only
def test_what_is_declared_is_served_exactly_and_the_rest_refused(base: str, batching: str, tmp_path: Path) -> None:
    bases = Bases(tmp_path)
    model = Model(bases.folder(base), batching)
    expected: dict[str | None, torch.Tensor] = {None: logits(bases.load(base))[0, -1].log_softmax(-1)}
    folders: dict[str, Path] = {}
    for name, case in CASES.items():
        if case.base != base:
            continue
        folder = write(bases, tmp_path / name, case)
        try:
            model.read(folder)
        except AdapterError as error:
            assert "--backend native" in error.remedy
            assert not is_served(case, batching), error
            continue
        assert is_served(case, batching), f"{name} is served"
        for one in (folder, twin(folder, case)):
            folders[one.name] = one
            alone = PeftModel.from_pretrained(bases.load(base), one)
            expected[one.name] = logits(alone)[0, -1].log_softmax(-1)
    assert folders
    names = list(folders)
    try:
        for slot, name in enumerate(names):
            model.place(name, folders[name], slot)
        model.check(expected)
        for name in names[::2]:
            model.clear(name)
        model.check(expected)
        for slot, name in zip(range(0, len(names), 2), reversed(names[::2]), strict=False):
            model.place(name, folders[name], slot)
        model.check(expected)
        for name in names:
            model.clear(name)
        model.check(expected)
        model.place(names[-1], folders[names[-1]], 0)
        model.check(expected)
    finally:
        model.engine.close()


def is_served(case: Case, batching: str) -> bool:
    """As the documentation says it, from what PEFT was told."""
    config = case.config
    is_refused = (
        config.get("bias", "none") != "none"
        or "trainable_token_indices" in config
        or config.get("ensure_weight_tying")
        or "modules_to_save" in config
        or case.is_classifier
    )
    return not is_refused and not (batching == "mixed" and config.get("use_dora"))


def test_an_embedding_that_is_not_the_bases_is_refused(tmp_path: Path) -> None:
    """PEFT writes it into the base, for all."""
    bases = Bases(tmp_path)
    folder = write(bases, tmp_path / "embedding", CASES["embedding"])
    tensors = load_file(folder / "adapter_model.safetensors")
    [name] = [name for name in tensors if name.endswith("embed_tokens.base_layer.weight")]
    tensors[name] = tensors[name] + 1
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    model = Model(bases.folder("llama"), "sequential")
    try:
        with pytest.raises(AdapterError, match="saved beside LoRA"):
            model.read(folder)
    finally:
        model.engine.close()


def test_what_is_declared() -> None:
    assert NATIVE.adapters == KINDS.keys()
    assert PEFT_MIXED.adapters < PEFT.adapters < NATIVE.adapters
