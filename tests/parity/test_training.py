"""N adapters trained in one pass have the gradients of PEFT's own training step, one adapter and one text at a time."""

import random
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig

import tiny
from families import DENSE, MIXTURES, VISION_LANGUAGE, config_of
from loraplex.adapters.weights import BaseLayers
from loraplex.model.loader import read_config, read_layers
from loraplex.training import stacked_lora
from loraplex.training.batch import Answer, Conversation, Question
from loraplex.training.trainee import Trainee

RANK, ALPHA, NUM_ADAPTERS = 4, 8, 3
INVOCATION = 3  # <|ask|>
FAMILIES = ("llama", "mistral-window", "qwen3", "gemma2", "gemma3", "phi3")  # with windows, caps and fused layers


def conversations(is_shared: bool, seed: int = 0) -> list[Conversation]:
    """Some lack the questions of some adapters; one has none at all. Those of the last are of one length."""
    draw = random.Random(seed)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.randrange(4, tiny.VOCAB_SIZE) for _ in range(draw.randint(low, high)))

    found = []
    for adapters in ((0, 1, 2), (1,), (), (0, 2), (2, 1, 0)):
        text = tokens(5, 30)
        questions = []
        for adapter in adapters:
            suffix = (INVOCATION, *(tokens(4, 4) if adapters == (2, 1, 0) else tokens(1, 6)))
            answers = tuple(
                Answer(position=position, token_id=draw.randrange(tiny.VOCAB_SIZE), weight=weight)
                for position, weight in ((len(suffix) - 2, 1.0), (len(suffix) - 1, 0.7), (len(suffix) - 1, 0.3))
            )
            past = 0 if is_shared else len(text)
            questions.append(
                Question(
                    adapter=adapter,
                    token_ids=suffix if is_shared else text + suffix,
                    answers=tuple(
                        Answer(position=past + one.position, token_id=one.token_id, weight=one.weight)
                        for one in answers
                    ),
                )
            )
        found.append(Conversation(token_ids=text if is_shared else (), questions=tuple(questions)))
    return found


def peft_gradients(
    base: Path, trainee: Trainee, adapter: int, batch: Seq[Conversation], is_shared: bool
) -> dict[str, Any]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    lora = get_peft_model(
        model,
        LoraConfig(
            r=RANK,
            lora_alpha=ALPHA,
            target_modules=sorted({path.rpartition(".")[2] for path in trainee.loras}),
            task_type="CAUSAL_LM",
            alora_invocation_tokens=[INVOCATION] if is_shared else None,
        ),
    ).eval()  # eval: tiny configs have no dropout, but Gemma's eager attention would ask for it
    parameters = {
        (path, part): lora.get_parameter(f"base_model.model.{path}.{part}.default.weight")
        for path in trainee.loras
        for part in ("lora_A", "lora_B")
    }
    with torch.no_grad():
        for (path, part), parameter in parameters.items():
            parameter.copy_(getattr(trainee.loras[path], part)[adapter])
    loss = torch.zeros(())
    for conversation in batch:
        for question in conversation.questions:
            if question.adapter == adapter:
                ids = torch.tensor([[*conversation.token_ids, *question.token_ids]])
                log_probs = lora(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
                past = len(conversation.token_ids)
                for one in question.answers:
                    loss = loss - one.weight * log_probs[past + one.position, one.token_id]
    loss.backward()
    return {"loss": loss.detach(), **{f"{path} {part}": one.grad for (path, part), one in parameters.items()}}


@pytest.fixture(scope="module", params=FAMILIES)
def family(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, PreTrainedConfig, BaseLayers]:
    folder = tmp_path_factory.mktemp(request.param)
    tiny.save_base(folder, tiny.FAMILIES[request.param])
    config = tiny.FAMILIES[request.param]
    return folder, config, read_layers(config, folder)[0]


@pytest.mark.parametrize("is_shared", [True, False], ids=["alora", "lora"])
def test_gradients_are_those_of_peft(family: tuple[Path, PreTrainedConfig, BaseLayers], is_shared: bool) -> None:
    folder, config, layers = family
    torch.manual_seed(0)
    trainee = Trainee.load(
        folder,
        config,
        layers,
        torch.float32,
        torch.device("cpu"),
        num_adapters=NUM_ADAPTERS,
        rank=RANK,
        alpha=ALPHA,
        targets={path.rpartition(".")[2] for path in layers.linear},
    )
    for lora in trainee.loras.values():
        torch.nn.init.normal_(lora.lora_B, std=0.1)
    batch = conversations(is_shared)
    losses, weights = trainee.losses(batch)
    losses.sum().backward()
    for adapter in range(NUM_ADAPTERS):
        expected = peft_gradients(folder, trainee, adapter, batch, is_shared)
        assert torch.allclose(losses[adapter], expected.pop("loss"), rtol=1e-5)
        largest = max(float(gradient.abs().max()) for gradient in expected.values())
        for name, gradient in expected.items():
            path, part = name.split()
            found = getattr(trainee.loras[path], part).grad[adapter]
            assert gradient.abs().max() > 1e-4, f"{name}: nothing to compare"
            # Rounding follows the size of what is summed, so it is measured against the adapter's largest gradient.
            assert (found - gradient).abs().max() <= 1e-5 * max(1, largest), name
    assert weights.tolist() == pytest.approx([6.0, 6.0, 6.0])


@pytest.mark.parametrize("num_labels", [(2, 2, 2), (3, 2, 4)])
def test_gradients_of_heads_are_those_of_peft(
    family: tuple[Path, PreTrainedConfig, BaseLayers], num_labels: tuple[int, ...]
) -> None:
    """`SEQ_CLS`: an answer is a label's number at the last token, and may have a part of the votes."""
    folder, config, layers = family
    torch.manual_seed(0)
    trainee = Trainee.load(
        folder,
        config,
        layers,
        torch.float32,
        torch.device("cpu"),
        num_adapters=NUM_ADAPTERS,
        rank=RANK,
        alpha=ALPHA,
        targets={path.rpartition(".")[2] for path in layers.linear},
        num_labels=num_labels,
    )
    assert trainee.score is not None
    for lora in trainee.loras.values():
        torch.nn.init.normal_(lora.lora_B, std=0.1)
    draw = random.Random(1)
    questions = [
        Question(
            adapter=adapter,
            token_ids=(ids := tuple(draw.randrange(4, tiny.VOCAB_SIZE) for _ in range(length))),
            answers=tuple(
                Answer(position=len(ids) - 1, token_id=label, weight=share)
                for label, share in zip(draw.sample(range(num_labels[adapter]), 2), (0.7, 0.3), strict=True)
            ),
        )
        for adapter, length in ((0, 9), (1, 20), (2, 5), (0, 17), (2, 12))
    ]
    losses, weights = trainee.losses([Conversation(token_ids=(), questions=(one,)) for one in questions])
    losses.sum().backward()
    assert weights.tolist() == pytest.approx([2, 1, 2])
    assert trainee.score.grad is not None
    for adapter, count in enumerate(num_labels):
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=count, pad_token_id=2, attn_implementation="eager"
        )
        targets = sorted({path.rpartition(".")[2] for path in trainee.loras})
        peft = get_peft_model(
            model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="SEQ_CLS")
        ).eval()
        head = peft.get_parameter("base_model.model.score.modules_to_save.default.weight")
        parameters = {
            (path, part): peft.get_parameter(f"base_model.model.{path}.{part}.default.weight")
            for path in trainee.loras
            for part in ("lora_A", "lora_B")
        }
        with torch.no_grad():
            head.copy_(trainee.score[adapter, :count])
            for (path, part), parameter in parameters.items():
                parameter.copy_(getattr(trainee.loras[path], part)[adapter])
        loss = torch.zeros(())
        for one in questions:
            if one.adapter == adapter:
                shares = torch.zeros(count)
                for answer in one.answers:
                    shares[answer.token_id] = answer.weight
                logits = peft(input_ids=torch.tensor([one.token_ids])).logits
                loss = loss + torch.nn.functional.cross_entropy(logits, shares[None])
        loss.backward()
        assert torch.allclose(losses[adapter], loss.detach(), rtol=1e-5)
        pairs = [(trainee.score.grad[adapter, :count], head.grad)] + [
            (getattr(trainee.loras[path], part).grad[adapter], one.grad) for (path, part), one in parameters.items()
        ]
        for found, gradient in pairs:
            assert gradient is not None and gradient.abs().max() > 1e-5
            assert (found - gradient).abs().max() <= 1e-5 * max(1, float(gradient.abs().max()))
        assert not trainee.score.grad[adapter, count:].any()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*DENSE, *MIXTURES, *VISION_LANGUAGE])
def test_a_base_that_is_served_can_be_trained(name: str, tmp_path: Path) -> None:
    """`Trainee.load` compares its answers in a training pass with transformers' own."""
    tiny.save_base(tmp_path, VISION_LANGUAGE[name] if name in VISION_LANGUAGE else config_of(name))
    config = read_config(tmp_path)
    layers, _ = read_layers(config, tmp_path)
    attention = {path.rpartition(".")[2] for path in layers.linear if "att" in path and path not in layers.beside_text}
    others = {path.rpartition(".")[2] for path in layers.linear if "att" not in path}
    trainee = Trainee.load(
        tmp_path,
        config,
        layers,
        torch.float32,
        torch.device("cpu"),
        num_adapters=NUM_ADAPTERS,
        rank=2,
        alpha=4,
        targets=attention - others,
    )
    losses, _ = trainee.losses(conversations(True)[:1])
    losses.sum().backward()
    assert any(one.grad is not None and one.grad.any() for one in trainee.parameters())


def test_rows_that_are_unevenly_spread_cost_no_more_than_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """One adapter has nearly all of them, as after corrections of one classifier: filling up gives the same."""
    torch.manual_seed(0)
    counts = (40, 0, 3)
    total = sum(counts)
    layer = torch.nn.Linear(8, 6)
    x = torch.randn(1, total, 8)
    found = []
    for most in (1.5, 100.0):
        monkeypatch.setattr(stacked_lora, "MOST_FILLED", most)
        rows = stacked_lora.Rows()
        starts = [sum(counts[:one]) for one in range(3)]
        rows.of_adapters = torch.tensor(
            [
                [start + at if at < count else total for at in range(40)]
                for start, count in zip(starts, counts, strict=True)
            ]
        )
        rows.counts, rows.num_tokens = counts, total
        torch.manual_seed(1)
        lora = stacked_lora.StackedLoRA(layer, (6, 8), rows, 3, 2, 0.5)
        torch.nn.init.normal_(lora.lora_B)
        y = lora(x)
        y.square().sum().backward()
        assert lora.lora_A.grad is not None and lora.lora_B.grad is not None
        found.append((y.detach(), lora.lora_A.grad, lora.lora_B.grad))
        assert rows.is_uneven == (most == 1.5)
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_kept_keys_and_values_take_no_more_memory_than_is_counted(tmp_path: Path) -> None:
    """Phi-3 computes queries, keys and values in one product, and a view of it would keep all of it."""
    tiny.save_base(tmp_path, tiny.FAMILIES["phi3"])
    config = read_config(tmp_path)
    layers = read_layers(config, tmp_path)[0]
    trainee = Trainee.load(
        tmp_path, config, layers, torch.float32, torch.device("cpu"),
        num_adapters=1, rank=2, alpha=2, targets={"o_proj"}, kv_memory="1GiB",
    )  # fmt: skip
    for pair in trainee._prefix_kv(tuple(range(5, 25))).values():
        for part in pair:
            assert part.untyped_storage().nbytes() == part.nbytes
