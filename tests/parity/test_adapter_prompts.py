"""An adapter's own tokenizer and chat template make its prompts, and the answers equal PEFT's on those prompts.
Adapters share the tokens of a conversation exactly where they tokenize it alike."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

import tiny
from loraplex import Loraplex
from loraplex.errors import AdapterError, ConfigurationError, ContractError
from loraplex.generation import GenerateRequest
from loraplex.text.adapter_prompt import AdapterPrompts
from loraplex.text.chat_template import ChatTemplate
from loraplex.text.tokenizer import Tokenizer
from loraplex.types import ClassifyRequest, Message

NUM_EMBEDDINGS, JUDGE, VERDICT = 336, 320, 321  # the tokenizer has 320 tokens; the new ones follow
TEXT = "Customer: hello, is my table for two done?"
LABELS = ("yes", "no")
OWN_CHAT = "{% for m in messages %}[{{m.role}}] {{m.content}}<|judge|>{% endfor %}[answer]"
BASE_CHAT = "{% for m in messages %}{{m.role}}: {{m.content}}\n{% endfor %}assistant:\n"


def config() -> PreTrainedConfig:
    values = tiny.FAMILIES["llama"].to_dict() | {"vocab_size": NUM_EMBEDDINGS}
    return type(tiny.FAMILIES["llama"])(**values)


def save_base(folder: Path, chat_template: str | None = None) -> Path:
    tokenizer = tiny.byte_level_tokenizer()
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    tiny.save_base(folder, config(), tokenizer)
    return folder


def save_tokenizer(
    base: Path, folder: Path, *special: str, words: tuple[str, ...] = (), chat_template: str | None = None
) -> Any:
    """Save the base's tokenizer with new tokens into an adapter's folder, as trainers do. Return it."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|ask|>", *special]})
    tokenizer.add_tokens(list(words))
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def expected(base: Path, adapter: Path, tokenizer: Any, prompt: str, labels: tuple[str, ...] = LABELS) -> list[float]:
    """Return PEFT's scores of the labels behind `prompt`: softmax over their log probabilities."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft = PeftModel.from_pretrained(model, adapter).eval()
    ids, log_probs = tokenizer(prompt, add_special_tokens=False)["input_ids"], []
    for label in labels:
        label_ids = tokenizer(prompt + label, add_special_tokens=False)["input_ids"][len(ids) :]
        whole = torch.tensor([ids + label_ids])
        with torch.inference_mode():
            logits = peft(input_ids=whole).logits[0].log_softmax(-1)
        log_probs.append(sum(logits[len(ids) - 1 + i, token].item() for i, token in enumerate(label_ids)))
    return torch.tensor(log_probs).softmax(-1).tolist()


def scores(loraplex: Loraplex, name: str, given: Any = TEXT) -> list[float]:
    [verdict] = loraplex.classify(given, name).verdicts
    assert verdict.scores is not None, verdict.error
    return list(verdict.scores.values())


def shown(loraplex: Loraplex, given: Any, names: str | list[str]) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    classifiers = (names,) if isinstance(names, str) and names != "*" else names
    return loraplex.show_prompt(ClassifyRequest(input=given, classifiers=classifiers))  # type: ignore[arg-type]


ADDED: Mapping[str, Mapping[str, Any]] = {
    "token": {"trainable_token_indices": [JUDGE]},
    "saved": {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj", "v_proj"]},
    "plain": {},
    "activated": {"alora_invocation_tokens": [JUDGE]},
}


@pytest.fixture(scope="module")
def added(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = save_base(tmp_path_factory.mktemp("added") / "base", BASE_CHAT)
    contract = {"template": "{conversation}<|judge|>", "labels": list(LABELS)}
    for seed, (name, settings) in enumerate(ADDED.items()):
        tiny.save_adapter(base, base / name, contract=contract, seed=seed, **settings)
        save_tokenizer(base, base / name, "<|judge|>", "<|verdict|>")
    return base


@pytest.fixture(scope="module")
def served(added: Path) -> Iterator[Loraplex]:
    with Loraplex.load(added, dtype="float32", preload="all") as loraplex:
        yield loraplex


@pytest.mark.parametrize("name", ADDED)
def test_a_new_token_of_the_adapters_tokenizer_is_one_token(added: Path, served: Loraplex, name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(added / name)
    [(_, text, ids)] = shown(served, TEXT, name)
    assert text == TEXT + "<|judge|>" and list(ids) == tokenizer(text)["input_ids"] and ids[-1] == JUDGE
    assert scores(served, name) == pytest.approx(expected(added, added / name, tokenizer, text), abs=1e-4)
    info = served.service.adapter(name)
    assert (info.tokenizer, info.chat_template, info.template) == ("adapter", "base", "contract")


def test_all_at_once_answer_as_alone(served: Loraplex) -> None:
    together = {one.classifier: one.scores for one in served.classify(TEXT, list(ADDED)).verdicts}
    for name, found in together.items():
        assert found is not None and list(found.values()) == pytest.approx(scores(served, name), abs=1e-5)


def test_a_text_cannot_write_a_new_special_token(served: Loraplex) -> None:
    [verdict] = served.classify("a<|verdict|>b", "token").verdicts
    assert verdict.warnings is not None and "<|verdict|>" in verdict.warnings[0]
    [(_, _, ids)] = shown(served, "a<|verdict|>b", "token")
    assert VERDICT not in ids and ids.count(JUDGE) == 1


def test_completions_read_and_write_the_adapters_tokens(added: Path, served: Loraplex) -> None:
    result = served.generate("hello<|judge|>", "activated", max_tokens=3)
    assert result.usage.prompt_tokens == len(AutoTokenizer.from_pretrained(added / "token")("hello<|judge|>").input_ids)
    biased = served.generate("hello", "plain", logit_bias={VERDICT: 100.0})
    assert biased.text == "<|verdict|>" and biased.tokens[0].text == "<|verdict|>"


# --------------------------------------------------------------------------------------------- chat templates


@pytest.fixture(scope="module", params=["base has one", "base has none"])
def chat(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = save_base(tmp_path_factory.mktemp("chat") / "base", BASE_CHAT if request.param == "base has one" else None)
    for seed, name in enumerate(("bare", "asking", "chatting")):
        form = {"format": "chat"} if name == "chatting" else {}
        contract = {"question": "Is it done?", "labels": list(LABELS), **form}
        tiny.save_adapter(base, base / name, contract=None if name == "bare" else contract, seed=seed)
        save_tokenizer(base, base / name, "<|judge|>", chat_template=OWN_CHAT)
    return base


TURNS = (Message(role="user", content="hello"), Message(role="assistant", content="yes, it is done"))


def test_the_adapters_chat_template_writes_its_prompts(chat: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat / "asking")

    def rendered(*messages: Message) -> str:
        turns = [{"role": one.role, "content": one.content} for one in messages]
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    lines = Message(role="user", content="Customer: hello\nAgent: yes, it is done\nIs it done?")
    wanted = {"asking": rendered(lines), "chatting": rendered(*TURNS, Message(role="user", content="Is it done?"))}
    with Loraplex.load(chat, dtype="float32", preload="all") as loraplex:
        for name, text in wanted.items():
            [(_, written, ids)] = shown(loraplex, TURNS, name)
            assert written == text and list(ids) == tokenizer(text, add_special_tokens=False)["input_ids"]
            assert scores(loraplex, name, TURNS) == pytest.approx(
                expected(chat, chat / name, tokenizer, text), abs=1e-4
            )
            info = loraplex.service.adapter(name)
            assert (info.template, info.chat_template, info.tokenizer) == ("chat_template", "adapter", "adapter")
        # Chat completions of an adapter without a contract.
        token = loraplex.generate(TURNS, "bare", num_top=20).tokens[0]
        tops = {one.id: one.log_prob for one in token.top}
        model = AutoModelForCausalLM.from_pretrained(chat, dtype=torch.float32)
        peft = PeftModel.from_pretrained(model, chat / "bare").eval()
        inputs = torch.tensor([tokenizer(rendered(*TURNS), add_special_tokens=False)["input_ids"]])
        with torch.inference_mode():
            oracle = peft(input_ids=inputs).logits[0, -1].log_softmax(-1)
        best = oracle.topk(5)
        for log_prob, token_id in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            assert tops[token_id] == pytest.approx(log_prob, abs=1e-4)


@pytest.mark.parametrize("as_file", [True, False])
def test_a_chat_template_alone_goes_with_the_bases_tokenizer(tmp_path: Path, as_file: bool) -> None:
    base = save_base(tmp_path / "base", BASE_CHAT)
    tiny.save_adapter(base, base / "one", contract={"labels": list(LABELS)})
    tiny.save_adapter(base, base / "two", contract={"labels": list(LABELS)}, seed=2)
    text = OWN_CHAT.replace("<|judge|>", "<|ask|>")
    if as_file:
        (base / "one" / "chat_template.jinja").write_text(text)
    else:
        (base / "one" / "tokenizer_config.json").write_text(json.dumps({"chat_template": text}))
    with Loraplex.load(base, dtype="float32") as loraplex:
        texts = {name: text for name, text, _ in shown(loraplex, "hi", ["one", "two"])}
        assert texts == {"one": "[user] hi<|ask|>[answer]", "two": "user: hi\nassistant:"}
        infos = [loraplex.service.adapter(name) for name in ("one", "two")]
        assert [(one.chat_template, one.tokenizer) for one in infos] == [("adapter", "base"), ("base", "base")]


# ------------------------------------------------------------------------------------------------- sharing


def test_adapters_share_a_conversation_only_where_they_tokenize_it_alike(tmp_path: Path) -> None:
    """`own` has the word "hello" as one token. It shares the tokens before the word, and not those behind."""
    base = save_base(tmp_path / "base")
    contract = {"template": "{conversation}<|ask|>{question}\n", "labels": list(LABELS)}
    for seed, name in enumerate(("one", "two", "resaved", "own")):
        ask: dict[str, Any] = {"alora_invocation_tokens": [tiny.SPECIAL_TOKENS.index("<|ask|>")]}
        tiny.save_adapter(base, base / name, contract={**contract, "question": f"Is it {name}?"}, seed=seed, **ask)
    save_tokenizer(base, base / "resaved")  # the base's own, as many trainers save it
    own = save_tokenizer(base, base / "own", words=("hello",))
    text = "Customer: I would like to book a table for two\nAgent: hello\nCustomer: is it done? yes or no, thanks" * 2
    with Loraplex.load(base, dtype="float32", preload="all") as loraplex:
        assert loraplex.service.adapter("resaved").tokenizer == "base"
        assert loraplex.service.adapter("own").tokenizer == "adapter"
        prompts = {name: list(ids) for name, _, ids in shown(loraplex, text, "*")}
        result = loraplex.classify(text)
        for verdict in result.verdicts:
            tokenizer = own if verdict.classifier == "own" else AutoTokenizer.from_pretrained(base)
            prompt = f"{text}<|ask|>Is it {verdict.classifier}?\n"
            assert prompts[verdict.classifier] == tokenizer(prompt)["input_ids"]
            assert verdict.scores is not None
            assert list(verdict.scores.values()) == pytest.approx(
                expected(base, base / verdict.classifier, tokenizer, prompt), abs=1e-4
            )
    # Computed tokens: distinct prefixes of all prompts. Labels of one token add none.
    alike = [prompts[name] for name in ("one", "two", "resaved")]
    num_conversation = alike[0].index(tiny.SPECIAL_TOKENS.index("<|ask|>"))
    at = next(i for i, pair in enumerate(zip(alike[0], prompts["own"], strict=False)) if pair[0] != pair[1])
    assert 0 < at < num_conversation, "the case shows nothing"
    suffixes = sum(len(ids) - num_conversation for ids in alike)
    assert result.usage.computed_tokens == num_conversation + suffixes + len(prompts["own"]) - at


def test_adapters_with_the_same_tokenizer_share_one_object(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    for seed, name in enumerate(("one", "two")):
        tiny.save_adapter(
            base, base / name, contract={"template": "{conversation}<|judge|>", "labels": list(LABELS)}, seed=seed
        )
        save_tokenizer(base, base / name, "<|judge|>")
    (base / "two" / "chat_template.jinja").write_text(OWN_CHAT)
    with Loraplex.load(base, dtype="float32") as loraplex:
        versions = [loraplex.run(loraplex.service.version_of(name)) for name in ("one", "two")]
        assert versions[0].tokenizer is versions[1].tokenizer
        assert loraplex.classify("hello").usage.computed_tokens < loraplex.classify("hello").usage.prompt_tokens * 2


def test_threads_that_read_the_same_files_at_once_share_one_object(tmp_path: Path) -> None:
    base, folder = save_base(tmp_path / "base"), tmp_path / "adapter"
    save_tokenizer(base, folder, "<|judge|>")
    prompts = AdapterPrompts(ChatTemplate.of(Tokenizer(base, NUM_EMBEDDINGS)))
    with ThreadPoolExecutor(4) as threads:
        read = list(threads.map(prompts.read, [folder] * 8))
    assert len(set(map(id, read))) == 1


def test_adapters_that_peft_saved_into_anothers_folder_have_its_tokenizer(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    contract = {"template": "{conversation}<|judge|>", "labels": list(LABELS)}
    tiny.save_adapter(base, base / "run", contract=contract)
    tokenizer = save_tokenizer(base, base / "run", "<|judge|>")
    tiny.save_adapter(base, base / "run" / "isFraud", contract=contract, seed=2)
    with Loraplex.load(base, dtype="float32") as loraplex:
        assert loraplex.service.adapter("isFraud").tokenizer == "adapter"
        found = scores(loraplex, "isFraud")
    prompt = f"{TEXT}<|judge|>"
    assert found == pytest.approx(expected(base, base / "run" / "isFraud", tokenizer, prompt), abs=1e-4)


def test_the_adapters_end_of_text_ends_its_texts(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    tiny.save_adapter(base, base / "one")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.save_pretrained(base / "one")
    sampling: dict[str, Any] = {"max_tokens": 5, "logit_bias": {JUDGE: 100.0}}
    with Loraplex.load(base, dtype="float32") as loraplex:
        ended = loraplex.generate("hello", "one", **sampling)
        assert (ended.finish_reason, ended.text, len(ended.tokens)) == ("stop", "", 1)
        assert len(loraplex.generate("hello", "one", **sampling, ignore_eos=True).tokens) == 5
        assert len(loraplex.generate("hello", **sampling).tokens) == 5, "the base has no such token"


# ------------------------------------------------------------------------------------------------- refused


def broken(path: Path, text: str) -> None:
    path.write_text(text)


def renumbered(folder: Path) -> None:
    """Give two tokens of the base each other's id: a tokenizer of another base."""
    saved = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = saved["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(saved))


def swapped(folder: Path) -> None:
    """Two special tokens of the base have each other's id."""
    text = (folder / "tokenizer.json").read_text()
    text = text.replace('"<s>"', '"<swap>"').replace('"</s>"', '"<s>"').replace('"<swap>"', '"</s>"')
    (folder / "tokenizer.json").write_text(text)


def named_only(file: str, content: Any) -> Callable[[Path], None]:
    """Leave nothing of a tokenizer but `file`."""

    def change(folder: Path) -> None:
        for saved in folder.glob("*token*"):
            saved.unlink()
        broken(folder / file, json.dumps(content))

    return change


def beyond(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"word{i}" for i in range(NUM_EMBEDDINGS - 320 + 1)])
    tokenizer.save_pretrained(folder)


REFUSED = {
    "another base's": (renumbered, r"tokenizer\.json: the token \d+ is '[ab]', and '[ab]' in the base's tokenizer"),
    "no embedding": (
        beyond,
        r"tokenizer\.json: the token 'word16' \(336\) has no embedding in the base",
    ),
    "broken": (lambda folder: broken(folder / "tokenizer.json", "{"), r"tokenizer\.json: the tokenizer does not load"),
    "pointer": (
        lambda folder: broken(folder / "tokenizer.json", "version https://git-lfs.github.com/spec/v1\noid x"),
        r"tokenizer\.json: is a Git LFS pointer",
    ),
    "swapped": (swapped, r"tokenizer\.json: the token \d is '</?s>', and '</?s>' in the base's tokenizer"),
    "added only": (
        named_only("added_tokens.json", {"<|judge|>": 320}),
        r"has the token '<\|judge\|>' \('?320'?\), which",
    ),
    **{
        f"named only, {key}": (
            named_only(file, {key: value}),
            r"has the token '<\|judge\|>' \('new'\), which the base's",
        )
        for file, key, value in (
            ("tokenizer_config.json", "extra_special_tokens", ["<|ask|>", "<|judge|>"]),
            ("tokenizer_config.json", "additional_special_tokens", [{"content": "<|judge|>"}]),
            ("tokenizer_config.json", "eos_token", "<|judge|>"),
            ("special_tokens_map.json", "cls_token", {"content": "<|judge|>", "lstrip": False}),
        )
    },
    "config": (
        lambda folder: broken(folder / "tokenizer_config.json", "{"),
        r"tokenizer_config\.json: not readable as JSON",
    ),
    "template in Latin-1": (
        lambda folder: (folder / "chat_template.jinja").write_bytes(b"\xe9"),
        r"chat_template\.jinja: is not UTF-8",
    ),
    "template fails": (
        lambda folder: broken(folder / "chat_template.jinja", "{{ raise_exception('no') }}"),
        "the adapter's chat template refuses the messages: no",
    ),
    "template is no template": (
        lambda folder: broken(folder / "chat_template.jinja", "{% for m in messages %}"),
        "the adapter's chat template refuses the messages",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_the_base_is_refused_by_name(tmp_path: Path, case: str) -> None:
    base = save_base(tmp_path / "base")
    tiny.save_adapter(base, base / "one", contract={"labels": list(LABELS)})
    save_tokenizer(base, base / "one")
    change, message = REFUSED[case]
    change(base / "one")
    with pytest.raises(ConfigurationError, match=message) as caught:
        Loraplex.load(base, dtype="float32")
    assert isinstance(caught.value, AdapterError | ContractError) and caught.value.remedy


def test_a_padding_token_beyond_the_embedding_and_renamed_reserves_are_served(tmp_path: Path) -> None:
    """Trainers add a padding token that no prompt holds, and rename special tokens that the base has in reserve."""
    values = config().to_dict() | {"vocab_size": 320}
    tiny.save_base(tmp_path / "base", type(config())(**values), tiny.byte_level_tokenizer())
    base = tmp_path / "base"
    tiny.save_adapter(base, base / "one", contract={"template": "{conversation}<|new|>", "labels": list(LABELS)})
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(base / "one")
    for file in (base / "one").glob("*.json"):
        file.write_text(file.read_text().replace("<|ask|>", "<|new|>"))
    tiny.save_adapter(base, base / "slow", contract={"template": "{conversation}<|ask|>", "labels": list(LABELS)})
    (base / "slow" / "added_tokens.json").write_text('{"[PAD]": 320}')
    (base / "slow" / "special_tokens_map.json").write_text('{"pad_token": "[PAD]"}')
    with Loraplex.load(base, dtype="float32") as loraplex:
        assert loraplex.service.adapter("slow").tokenizer == "base"
        [(_, _, ids)] = shown(loraplex, "hello", "one")
        assert ids[-1] == tiny.SPECIAL_TOKENS.index("<|ask|>")
        [verdict] = loraplex.classify("a [PAD] b", "one").verdicts
        assert verdict.error is None and verdict.warnings is not None and "[PAD]" in verdict.warnings[0]


def test_another_tokenizer_or_template_is_another_version(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", BASE_CHAT)
    tiny.save_adapter(base, base / "one", contract={"labels": list(LABELS)})
    versions = []
    with Loraplex.load(base, dtype="float32", adapter_root=[str(tmp_path)]) as loraplex:
        for text in (None, OWN_CHAT.replace("<|judge|>", ""), "{% for m in messages %}{{ m.content }}{% endfor %}"):
            if text is not None:
                (base / "one" / "chat_template.jinja").write_text(text)
            versions.append(loraplex.load_adapter("one", "base/one").version)
        shutil.copy(base / "tokenizer.json", base / "one")
        versions.append(loraplex.load_adapter("one", "base/one").version)
    assert len(set(versions[:3])) == 3, "each chat template is a version"
    assert versions[3] == versions[2], "the base's own tokenizer changes nothing"


def test_tokens_are_those_of_the_adapter_that_is_asked(added: Path, served: Loraplex) -> None:
    asked = GenerateRequest(prompt="hello<|judge|>", adapter="token")
    ids, pieces = served.run(served.service.prompts.tokenize(asked))
    assert list(ids) == AutoTokenizer.from_pretrained(added / "token")("hello<|judge|>")["input_ids"]
    assert pieces[-1] == "<|judge|>"
    assert served.run(served.service.prompts.detokenize(ids, "token")) == "hello<|judge|>"
    assert served.run(served.service.prompts.tokenize(replace(asked, adapter=None)))[1] != pieces
    result = served.generate("hello<|judge|>", "activated", max_tokens=1, echo=True, num_top=1)
    assert result.prompt_text == "hello<|judge|>"
