"""llama.cpp's server as a system: the same prompts as ours, its prompt cache on, one question after the other."""

import asyncio
import json
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from loraplex.bench.call import Answer, Call, Reply
from loraplex.bench.gguf import write_adapter
from loraplex.bench.http import Http, post
from loraplex.bench.load import Load, Sample, generate
from loraplex.bench.process import Process
from loraplex.bench.prompts import Prompts, Question
from loraplex.bench.served import cannot_start, opened
from loraplex.bench.system import SystemEnded, Tell, Transport
from loraplex.bundle import Bundle
from loraplex.errors import ConfigurationError, LoraplexError, quoted
from loraplex.service.proof import activated
from loraplex.text.prompt import Prompt
from loraplex.text.tokenizer import Conversations

NUM_LIKELIEST = 20  # tokens whose probability is asked for; a label that is not among them is asked for by itself
CERTAIN = 1e4  # added to the logit of the token to sample. The probabilities that are told are those without it
START_S = 600.0
LONGEST = 4096  # tokens of a prompt; the program would make room for as many as the base takes
PROBE = "Customer: It's 12,345.67 €…  naïve? 你好 😀\n\n\tAgent: I've *no* idea_at ALL! {\"a\": [1]}\r\nBye"


class _Failed(Exception):
    """The server's answer cannot be used. reply: what to make of the call."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.error)
        self.reply = reply


@dataclass(slots=True)
class _Read:
    """Collects one classifier's answers. log_probs: (tokens behind the prompt, next token) -> its log probability."""

    log_probs: dict[tuple[tuple[int, ...], int], float] = field(default_factory=dict)
    likeliest: int = 0
    computed_tokens: int = 0
    cached_tokens: int | None = None
    engine_ms: float = 0.0


class LlamaCpp:
    """llama.cpp's server, which is started here or runs already.

    A question's label probabilities come from one request for one token, and one more for each label that is not among
    the likeliest tokens, and for each further token of a label. None is estimated."""

    name = "llamacpp"
    transport: Transport = "http"

    def __init__(
        self,
        bundle: Bundle,
        *,
        log: Path,
        url: str | None = None,
        server: Path | None = None,
        model: Path | None = None,
        arguments: Sequence[str] = (),
        slots: int = 4,
    ) -> None:
        """url: of a server that runs; else `server` (the program) and `model` (a GGUF file of the bundle's base).

        log:        for what the program prints.
        arguments:  more options of the program; they win over ours.
        slots:      conversations whose K/V it keeps at once."""
        assert url is not None or (server is not None and model is not None), "there is a server, or a program"
        self._bundle, self._url, self._log = bundle, url, log
        self._command = [str(server), "--model", str(model)]
        self._process: Process | None = None
        self._folder: TemporaryDirectory[str] | None = None
        self._arguments, self._slots = tuple(arguments), slots
        self._http = opened(self.name, "http://127.0.0.1" if url is None else url)
        self._labels: dict[str, dict[str, tuple[int, ...]]] = {}
        self._sends_ids = True
        self._adapters: dict[str, list[dict[str, float]]] | None = None  # classifier -> the request's `lora`
        self._has_adapters = False
        self._asked_again = 0
        self.shares_prefix = False
        self.versions: dict[str, str] = {}
        self.facts: dict[str, Any] = {}

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def start(self, classifiers: Sequence[str]) -> None:
        """Start the program, if it does not run, and find out how it is asked.

        Raises ConfigurationError where it does not start, serves another base, or cannot answer for a classifier."""
        self._prompts = await asyncio.to_thread(Prompts, self._bundle, classifiers)
        for one in self._prompts.questions.values():
            if one.version.has_score:
                raise ConfigurationError(
                    one.version.source.path,
                    "answers with a score head, which llama.cpp's server does not have",
                    remedy="leave out the classifier, or llamacpp",
                )
        if self._url is None:
            await self._launch()
        properties = await self._get("/props")
        [model, *_] = (await self._get("/v1/models"))["data"]
        self._check_vocabulary(model.get("meta") or {})
        self._choose_adapters(await self._get("/lora-adapters"))
        await self._compare_tokens()
        await self._check_activation()
        self.versions = {"llama.cpp": str(properties.get("build_info"))}
        self.facts |= {
            "model": Path(str(properties.get("model_path", ""))).name,
            "model_type": properties.get("model_ftype"),
            "slots": properties.get("total_slots"),
            "prompts_as": "token ids" if self._sends_ids else "text",
            "adapters": self._has_adapters,
        }

    async def run(self, load: Load, tell: Tell) -> list[Sample]:
        running = generate(self.ask, load, tell)
        samples = await (running if self._process is None else self._process.while_alive(running))
        self.facts["labels_asked_again"] = self._asked_again
        return samples

    async def close(self) -> None:
        self._http.close()
        if self._process is not None:
            await self._process.close()
        if self._folder is not None:
            self._folder.cleanup()

    async def ask(self, call: Call) -> Reply:
        """Ask all questions of a call. Never raises for what the server answers."""
        # One question after the other computes the least: each finds the K/V of the one before it.
        conversations, turn = Conversations(), asyncio.Lock()

        async def one(name: str) -> tuple[int, _Read, Answer]:
            async with turn:
                prompt = self._prompts.prompt(name, call.input, conversations)
                sent = list(prompt.token_ids) if self._sends_ids else prompt.text
                read, answer = await self._read(self._prompts.questions[name], sent)
                return len(prompt.token_ids), read, answer

        try:
            async with asyncio.TaskGroup() as group:
                tasks = {name: group.create_task(one(name)) for name in call.classifiers}
        except ExceptionGroup as group_of:
            first = group_of.exceptions[0]
            if isinstance(first, _Failed):
                return first.reply
            if isinstance(first, LoraplexError):
                return Reply(status="failed", error=first.code)
            raise
        found = {name: task.result() for name, task in tasks.items()}
        reads = [read for _, read, _ in found.values()]
        return Reply(
            status="ok",
            verdicts={name: answer for name, (_, _, answer) in found.items()},
            prompt_tokens=sum(num_tokens for num_tokens, _, _ in found.values()),
            computed_tokens=sum(read.computed_tokens for read in reads),
            cached_tokens=sum(read.cached_tokens or 0 for read in reads),
            engine_ms=sum(read.engine_ms for read in reads),
        )

    async def _read(self, question: Question, prompt: list[int] | str) -> tuple[_Read, Answer]:
        """Ask for the log probability of each token of each label, or for the likeliest token."""
        read, labels = _Read(), self._labels[question.name]
        if not labels:
            await self._request(question.name, prompt, (), self._harmless, read)
            return read, Answer(label=question.version.tokenizer.decode(read.likeliest))
        for ids in labels.values():
            for end, token_id in enumerate(ids):
                if (ids[:end], token_id) not in read.log_probs:
                    self._asked_again += any(behind == ids[:end] for behind, _ in read.log_probs)
                    await self._request(question.name, prompt, ids[:end], token_id, read)
        log_probs = {
            label: sum(read.log_probs[ids[:end], token_id] for end, token_id in enumerate(ids))
            for label, ids in labels.items()
        }
        return read, question.answer(log_probs)

    async def _request(
        self, name: str, prompt: list[int] | str, behind: tuple[int, ...], token_id: int, read: _Read
    ) -> None:
        """Ask for one token behind the prompt, which is made to be `token_id`: llama.cpp tells that token's log
        probability, however low, and tells none where half a character is sampled."""
        body: dict[str, Any] = {
            "prompt": [*prompt, *behind] if isinstance(prompt, list) else [prompt, *behind] if behind else prompt,
            "n_predict": 1,
            "n_probs": NUM_LIKELIEST,
            "logit_bias": [[token_id, CERTAIN]],
            "temperature": 0,
            "cache_prompt": True,
        }
        if self._adapters is not None:
            body["lora"] = self._adapters[name]
        content, reply = await post(self._http, "/completion", body)
        if reply is not None:
            raise _Failed(reply)
        try:
            answer = json.loads(content)
            [sampled] = answer["completion_probabilities"]
            for one in (*sampled["top_logprobs"], sampled):
                read.log_probs[behind, int(one["id"])] = min(float(one["logprob"]), 0.0)  # it may round above 0
            if (behind, token_id) not in read.log_probs:
                raise KeyError(token_id)
            timings = answer["timings"]
            if not behind:
                read.likeliest = sampled["top_logprobs"][0]["id"]
            if read.cached_tokens is None:  # a later request finds what the first one computed
                read.cached_tokens = timings["cache_n"]
            read.computed_tokens += timings["prompt_n"]
            read.engine_ms += timings["prompt_ms"] + timings["predicted_ms"]
        except (ValueError, KeyError, IndexError, TypeError) as exc:
            raise _Failed(Reply(status="failed", error="no_probabilities")) from exc

    # --------------------------------------------------------------------------------------------- start

    async def _launch(self) -> None:
        """Start the program with the adapters, and wait until it answers."""
        self._folder = TemporaryDirectory(prefix="loraplex-llamacpp-")
        adapters = await asyncio.to_thread(self._write_adapters, Path(self._folder.name))
        # From its cache in RAM it would give an activated adapter the K/V that a plain one computed.
        kinds = {one.version.shares_prefix for one in self._prompts.questions.values()}
        longest = min(LONGEST, self._prompts.base.max_model_len)
        arguments = [
            *("--parallel", str(self._slots), "--kv-unified", "--ctx-size", str(self._slots * longest)),
            *(("--lora", ",".join(map(str, adapters)), "--lora-init-without-apply") if adapters else ()),
            *(("--cache-ram", "0") if adapters and len(kinds) > 1 else ()),
            *self._arguments,
        ]
        self.facts["arguments"] = arguments
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self._process = Process([*self._command, "--host", "127.0.0.1", "--port", port, *arguments], self._log)
        self._http = Http(f"http://127.0.0.1:{port}")
        try:
            await self._process.start()
            async with asyncio.timeout(START_S):
                await self._process.while_alive(self._healthy())
        except (OSError, SystemEnded) as exc:  # TimeoutError is an OSError
            raise cannot_start(self.name, str(exc) or f"it does not answer; see {self._log}") from None

    async def _healthy(self) -> None:
        """Return when the server answers."""
        while True:
            with suppress(ConnectionError, EOFError):
                if (await self._http.request("GET", "/health"))[0] == 200:
                    return
            await asyncio.sleep(0.1)

    def _write_adapters(self, folder: Path) -> list[Path]:
        """Write the classifiers' adapters as GGUF. Returns none, and says why, where one cannot be written."""
        paths = []
        for name, one in self._prompts.questions.items():
            try:
                prompt = self._probe(name)
                behind = prompt.token_ids[prompt.activation + 1 :] if one.version.template else ()
                write_adapter(
                    folder / f"{name}.gguf",
                    one.weights,
                    one.version.source.path,
                    self._prompts.config,
                    behind or (one.version.invocation_tokens or ())[1:],
                )
            except ConfigurationError as exc:
                self.facts["no_adapters"] = exc.message
                return []
            paths.append(folder / f"{name}.gguf")
        return paths

    async def _get(self, path: str, body: Any = None) -> Any:
        """Return what the server says of itself. Raises ConfigurationError where it is not llama.cpp's."""
        try:
            status, content = await self._http.request("GET" if body is None else "POST", path, body)
            if status == 200:
                return json.loads(content)
            problem = f"answers {path} with {status}"
        except (OSError, EOFError, ValueError) as exc:
            problem = f"does not answer {path} ({type(exc).__name__})"
        raise ConfigurationError(f"system {self.name}", problem, remedy="start llama.cpp's llama-server there")

    def _check_vocabulary(self, meta: Mapping[str, Any]) -> None:
        """Compare what is known of the two bases."""
        for key, ours in (
            ("n_vocab", len(self._prompts.base.tokenizer.vocabulary)),
            ("n_embd", self._prompts.config.hidden_size),
        ):
            theirs = meta.get(key)
            if theirs is not None and (theirs < ours if key == "n_vocab" else theirs != ours):
                raise ConfigurationError(
                    f"system {self.name}",
                    f"is another base: its {key} is {quoted(theirs)}, the bundle's {ours}",
                    remedy="give a GGUF file of the bundle's base",
                )

    def _choose_adapters(self, listed: Sequence[Mapping[str, Any]]) -> None:
        """Find each classifier's adapter by its file's name. Where one lacks, the base answers for all."""
        ids = {Path(str(one.get("path", ""))).stem: one["id"] for one in listed}
        names = self._prompts.questions
        missing = [name for name in names if name not in ids]
        self._has_adapters = not missing
        # Without adapters, and with activated ones, the prompt cache holds a conversation for all classifiers.
        self.shares_prefix = bool(missing) or all(one.version.shares_prefix for one in names.values())
        if listed:  # those that a request does not name have the scale 0
            self._adapters = {
                name: [{"id": ids[name], "scale": 1.0}]
                if not missing
                else [{"id": one["id"], "scale": 0.0} for one in listed]
                for name in names
            }
        if missing:
            self.facts.setdefault("no_adapters", f"the server has none for {', '.join(missing[:5])}")

    async def _compare_tokens(self) -> None:
        """Find out whether the server makes the same tokens of a text, and how it would write the labels."""
        probes = {name: self._probe(name) for name in self._prompts.questions}
        theirs = {name: await self._tokens(prompt.text) for name, prompt in probes.items()}
        for name, prompt in probes.items():
            bare = await self._tokens(prompt.text, add_special=False)
            self._sends_ids &= prompt.token_ids in (theirs[name], bare)
        self._labels = {name: one.label_ids for name, one in self._prompts.questions.items()}
        self._harmless = probes[next(iter(probes))].token_ids[-1]
        if self._sends_ids:
            return
        for name, labels in self._labels.items():
            for label in labels:
                ids = await self._tokens(probes[name].text + label)
                if ids[: len(theirs[name])] != theirs[name] or len(ids) == len(theirs[name]):
                    raise ConfigurationError(
                        f"system {self.name}",
                        f"its tokenizer joins the label {quoted(label)} of {name!r} to the prompt",
                        remedy="give a GGUF file of the bundle's base",
                    )
                labels[label] = ids[len(theirs[name]) :]

    async def _check_activation(self) -> None:
        """Note it where an activated adapter begins at another token than PEFT's: the prompt cache ends before it."""
        for name, one in self._prompts.questions.items():
            if self._has_adapters and one.version.shares_prefix and self._sends_ids:
                prompt = self._probe(name)
                for _ in range(2):
                    read, _ = await self._read(one, list(prompt.token_ids))
                later = (read.cached_tokens or 0) - prompt.activation  # tokens later than PEFT's
                if later:
                    self.facts["adapters_begin"] = later

    def _probe(self, name: str) -> Prompt:
        version = self._prompts.questions[name].version
        return self._prompts.prompt(name, activated(version, PROBE), Conversations())

    async def _tokens(self, text: str, *, add_special: bool = True) -> tuple[int, ...]:
        body = {"content": text, "add_special": add_special, "parse_special": True}
        return tuple((await self._get("/tokenize", body))["tokens"])
