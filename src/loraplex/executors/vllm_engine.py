"""vLLM as a computation: its client, on a thread with an event loop of its own.

Each sequence is sent with its `LoRARequest`. Targets are asked by token id, so that vLLM returns their log
probabilities over the whole vocabulary, however unlikely they are.
"""

import asyncio
import contextlib
import logging
import tempfile
import threading
import time
from collections.abc import Coroutine, Mapping
from collections.abc import Sequence as Seq
from concurrent.futures import CancelledError as FutureCancelledError
from concurrent.futures import Future
from itertools import count
from typing import Any, TypeVar

from loraplex.adapters.slots import NO_ADAPTER
from loraplex.engine.engine import Steps
from loraplex.engine.outcomes import checked
from loraplex.engine.sequence import EngineRequest, Outcome, Sequence, SequenceOutput, Token, lone_sequence
from loraplex.errors import CancelledError, EngineError, LoraplexError, NotReadyError, UnsupportedModelError
from loraplex.executors.turns import Turns
from loraplex.executors.vllm_client import (
    DEVICE_TYPE,
    AsyncLLM,
    EngineDeadError,
    Gauge,
    LoRARequest,
    RequestOutputKind,
    SamplingParams,
    reason,
    start_llm,
)
from loraplex.executors.watcher import watch

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

MAX_POSITIONS = 16  # targets behind more tokens than this are asked as vLLM's `prompt_logprobs`
MAX_TARGETS = 128  # the most `logprob_token_ids` of one request
POLL_S = 0.2  # between two checks whether vLLM died
CLOSE_S = 3.0  # for vLLM's processes to end; then they are killed


class VllmEngine:
    """A Computation with vLLM. vLLM's client has a thread of its own, with an event loop; any thread may submit."""

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        """Starts vLLM. Raises ConfigurationError or UnsupportedModelError where vLLM does not start or compute."""
        self._slots: dict[int, LoRARequest] = {}
        self._turns = Turns()
        self._request_ids = count()
        self._tasks: set[asyncio.Task[None]] = set()
        self._lock = threading.Lock()  # guards the five fields below
        self._is_closing = False
        self._num_open = 0  # sequences that were accepted and have no outcome yet
        self._num_open_tokens = 0
        self._busy_since = 0.0
        self._steps = Steps()
        self._gauge = Gauge()
        self._sockets = tempfile.TemporaryDirectory(prefix="loraplex-")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._main, name="loraplex-vllm", daemon=True)
        self._thread.start()
        try:
            self._llm: AsyncLLM = self._call(start_llm(arguments, self._gauge, self._sockets.name))
        except BaseException:
            self._end()
            raise
        self.lora_config: Any = self._llm.vllm_config.lora_config  # vLLM's own LoRA settings
        self.max_step_tokens: int = self._llm.vllm_config.scheduler_config.max_num_batched_tokens
        # vLLM 0.32's CPU kernels apply the last slot's adapter to a base's row in a batch with adapters' rows.
        self._base_is_apart = DEVICE_TYPE == "cpu"
        # If our process is killed, vLLM's processes would live on and keep the device's memory.
        processes = getattr(self._llm.engine_core.resources.engine_manager, "processes", ())
        self.pids = tuple(process.pid for process in processes)
        self._watcher = watch(self.pids)
        self._probe(arguments["model"])

    def _probe(self, base: str) -> None:
        """Check that the base computes: some bases load and do not. Eight tokens, because vLLM 0.32's int8 products on
        CPUs crash on fewer. Raises UnsupportedModelError where the base does not compute."""
        num_tokens = min(8, self._llm.model_config.max_model_len - 1)
        request = lone_sequence([0] * num_tokens).request
        self.submit(request)
        [outcome] = request.future.result()
        if isinstance(outcome, LoraplexError):
            self.close()
            raise UnsupportedModelError(
                base,
                f"vLLM does not compute with it: {outcome.message}",
                remedy="see vLLM's log above, or use --backend native",
            )

    # ------------------------------------------------------------------------------------------- figures

    @property
    def alive(self) -> bool:
        return not self._is_closing and not self._llm.errored

    @property
    def num_waiting(self) -> int:
        return self._num_open - self.num_running

    @property
    def num_waiting_tokens(self) -> int:
        return self._num_open_tokens  # includes running sequences: vLLM does not say which run

    @property
    def num_running(self) -> int:
        return min(self._num_open, self._gauge.num_running)

    @property
    def num_blocks(self) -> tuple[int, int]:
        total = int(self._llm.vllm_config.cache_config.num_gpu_blocks or 0)
        return total, round(total * (1 - self._gauge.kv_cache_usage))

    @property
    def wait_s(self) -> float:
        steps = self.steps
        return self._num_open_tokens * steps.seconds / steps.num_tokens if steps.num_tokens else 1.0

    @property
    def steps(self) -> Steps:
        """Totals: a step is a forward pass of vLLM; the seconds count the time with unfinished sequences."""
        with self._lock:
            busy_s = time.monotonic() - self._busy_since if self._num_open else 0.0
            return self._steps._replace(num_steps=self._gauge.num_steps, seconds=self._steps.seconds + busy_s)

    # ------------------------------------------------------------------------------------------- adapters

    def set_slot(self, slot: int, key: int, folder: str) -> None:
        """Let vLLM read the adapter in `folder`, which may be deleted after this call. key: an id that no other adapter
        ever has. Raises vLLM's own error where vLLM refuses the adapter, and EngineError where vLLM died."""
        request = LoRARequest(lora_name=str(key), lora_int_id=key, lora_path=folder)
        try:
            self._call(self._or_death(self._llm.add_lora(request)))
        except EngineDeadError:
            raise _died() from None
        self._slots[slot] = request

    def clear_slot(self, slot: int) -> None:
        request = self._slots.pop(slot, None)
        if request is not None:
            with contextlib.suppress(EngineDeadError):  # its adapters are gone, too
                self._call(self._or_death(self._llm.remove_lora(request.lora_int_id)))

    # ------------------------------------------------------------------------------------------- sequences

    def cost(self, request: EngineRequest) -> int:
        return sum(sequence.num_tokens for sequence in request.sequences)

    def submit(self, request: EngineRequest) -> None:
        num_tokens = self.cost(request)
        with self._lock:
            if not self.alive:
                raise NotReadyError("the engine is not running", remedy="send the request to another server, or later")
            now = time.monotonic()
            if not self._num_open:
                self._busy_since = now
            self._num_open += len(request.sequences)
            self._num_open_tokens += num_tokens
            for sequence in request.sequences:
                sequence.arrived_s = now
            self._loop.call_soon_threadsafe(self._begin, request)

    def close(self) -> None:
        with self._lock:
            if self._is_closing:
                return
            self._is_closing = True
        self._call(self._finish())
        self._llm.shutdown(timeout=CLOSE_S)
        self._watcher.kill()
        self._watcher.communicate()
        self._end()

    def _begin(self, request: EngineRequest) -> None:
        tasks = [self._loop.create_task(self._resolve(sequence)) for sequence in request.sequences]
        self._tasks.update(tasks)
        for task in tasks:
            task.add_done_callback(self._tasks.discard)

        def cancel_all() -> None:
            for task in tasks:
                task.cancel()

        def cancel_if_nobody_waits(future: Future[list[Outcome]]) -> None:
            if future.cancelled():
                with contextlib.suppress(RuntimeError):  # the loop is closed: nothing is left to cancel
                    self._loop.call_soon_threadsafe(cancel_all)

        request.future.add_done_callback(cancel_if_nobody_waits)

    async def _resolve(self, sequence: Sequence) -> None:
        num_tokens = sequence.num_tokens
        # vLLM 0.32 gives one batch either top-k log probabilities or those of chosen tokens, not both.
        kind = (sequence.sampling.num_top > 0, self._base_is_apart and sequence.slot == NO_ADAPTER)
        outcome: Outcome = CancelledError("the caller no longer waits", remedy="none is needed")
        try:
            async with self._turns.turn(kind):
                outcome = checked(await self.compute(sequence))
        except asyncio.CancelledError:
            pass
        except LoraplexError as exc:
            outcome = exc
        except EngineDeadError:
            outcome = _died()
        except Exception as exc:
            logger.exception("vLLM failed at a sequence of %d tokens", num_tokens)
            outcome = EngineError(
                f"vLLM failed: {reason(exc)}", remedy="send it again; the server's log has the details"
            )
        with self._lock:
            self._num_open -= 1
            self._num_open_tokens -= num_tokens
            self._steps = self._steps._replace(
                num_tokens=self._steps.num_tokens + sequence.num_computed_tokens,
                num_sequences=self._steps.num_sequences + 1,
                seconds=self._steps.seconds + (0.0 if self._num_open else time.monotonic() - self._busy_since),
            )
        sequence.request.resolve(sequence, outcome)

    async def compute(self, sequence: Sequence) -> SequenceOutput:
        """Compute a sequence. vLLM gives log probabilities only at a prompt's end, so a label of several tokens takes
        several prompts. All but the longest are in vLLM's prefix cache."""
        sequence.started_s = time.monotonic()
        asked: dict[int, list[int]] = {-1: []}  # position -> token ids
        for target in sequence.targets:
            asked.setdefault(target.position, []).append(target.token_id)
        if sequence.num_target_top or len(asked) > MAX_POSITIONS:
            return await self._score_text(sequence)
        found: dict[tuple[int, int], float] = {}
        first, *rest = [
            (position, ids[start : start + MAX_TARGETS])
            for position, ids in asked.items()
            for start in range(0, max(1, len(ids)), MAX_TARGETS)
        ]
        work = [self._generate(sequence, first[1], found), *(self._score(sequence, *one, found) for one in rest)]
        for failure in await asyncio.gather(*work, return_exceptions=True):  # all end before another kind's turn
            if failure is not None:
                raise failure
        log_probs = [found[target.position, target.token_id] for target in sequence.targets]
        return _output(sequence, log_probs, sequence.tokens)

    async def _generate(self, sequence: Sequence, ids: Seq[int], found: dict[tuple[int, int], float]) -> None:
        """Generate the tokens that follow. Put the log probabilities of `ids` as the first token into `found`."""
        wanted = sequence.sampling
        params = SamplingParams(
            max_tokens=wanted.max_tokens,
            temperature=wanted.temperature,
            top_p=wanted.top_p,
            seed=wanted.seed,
            stop_token_ids=sorted(wanted.stop_ids),
            min_tokens=wanted.min_tokens,
            ignore_eos=True,
            logit_bias=dict(wanted.biases) or None,
            allowed_token_ids=list(wanted.allowed_ids) or None,
            logprobs=None if ids else wanted.num_top,
            logprob_token_ids=list(ids) or None,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        num_computed = sequence.num_tokens  # tokens computed for the next token
        async with contextlib.aclosing(self._ask(sequence, sequence.token_ids, params)) as outputs:
            async for output in outputs:
                [completion] = output.outputs
                for token_id, log_probs in zip(completion.token_ids, completion.logprobs or (), strict=True):
                    if not sequence.tokens:
                        num_computed -= output.num_cached_tokens or 0
                        found.update({(-1, one): log_probs[one].logprob for one in ids})
                    sequence.num_computed_tokens += num_computed
                    num_computed = 1
                    if not sequence.append(_token(token_id, log_probs, wanted.num_top)):
                        return
        raise EngineError(
            f"vLLM ended after {len(sequence.tokens)} tokens", remedy="send it again; the server's log has the details"
        )

    async def _score(
        self, sequence: Sequence, position: int, ids: Seq[int], found: dict[tuple[int, int], float]
    ) -> None:
        """Put the log probabilities of `ids` as the token after `position` into `found`."""
        prompt = sequence.token_ids[: sequence.num_tokens + position + 1]
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            ignore_eos=True,
            logprob_token_ids=list(ids),
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        async with contextlib.aclosing(self._ask(sequence, prompt, params)) as outputs:
            async for output in outputs:
                [completion] = output.outputs
                [log_probs] = completion.logprobs
                found.update({(position, one): log_probs[one].logprob for one in ids})
                sequence.num_computed_tokens += len(prompt) - (output.num_cached_tokens or 0)

    async def _score_text(self, sequence: Sequence) -> SequenceOutput:
        """Compute a sequence whose targets are its own text's tokens and one more, as `scoring_sequences` makes it.
        vLLM computes such a prompt whole, whatever its prefix cache holds."""
        text = (*sequence.token_ids, sequence.targets[-1].token_id)
        params = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            ignore_eos=True,
            prompt_logprobs=sequence.num_target_top,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        async with contextlib.aclosing(self._ask(sequence, text, params)) as outputs:
            [rows] = [output.prompt_logprobs async for output in outputs]
        sequence.num_computed_tokens += len(sequence.token_ids)
        num_top, end = sequence.num_target_top, len(text)
        found = [_token(one.token_id, rows[end + one.position], num_top) for one in sequence.targets]
        return _output(sequence, [one.log_prob for one in found], found[-1:], tuple(one.top for one in found))

    def _ask(self, sequence: Sequence, token_ids: Seq[int], params: SamplingParams) -> Any:
        lora = None
        if sequence.slot != NO_ADAPTER:
            lora = self._slots[sequence.slot]  # raises KeyError rather than ask the base
        request_id = str(next(self._request_ids))
        return self._llm.generate({"prompt_token_ids": list(token_ids)}, params, request_id, lora_request=lora)

    # ------------------------------------------------------------------------------------------- its thread

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            self._loop.run_until_complete(_cancel_rest())
        finally:
            self._loop.close()

    def _call(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine on the client's loop and return its result. Raises EngineDeadError if the loop has ended."""
        try:
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError as exc:
            coroutine.close()
            raise EngineDeadError() from exc
        try:
            return future.result()
        except FutureCancelledError as exc:
            raise EngineDeadError() from exc

    async def _or_death(self, coroutine: Coroutine[Any, Any, Result]) -> Result:
        """Return the coroutine's result. Raises EngineDeadError where vLLM dies meanwhile; vLLM's own calls would wait
        for ever."""
        work = asyncio.ensure_future(coroutine)
        while not (await asyncio.wait({work}, timeout=POLL_S))[0]:
            if self._llm.errored:
                work.cancel()
                raise EngineDeadError()
        return work.result()

    async def _finish(self) -> None:
        while self._tasks:
            await asyncio.wait(self._tasks)
        if self._llm.output_handler is not None:
            self._llm.output_handler.cancel()  # it would report the end of vLLM's processes as a failure

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._sockets.cleanup()


async def _cancel_rest() -> None:
    rest = asyncio.all_tasks() - {asyncio.current_task()}
    for task in rest:
        task.cancel()
    await asyncio.gather(*rest, return_exceptions=True)


def _died() -> EngineError:
    return EngineError("vLLM died", remedy="start the server again; its log above has the details")


def _output(sequence: Sequence, log_probs: Seq[float], tokens: Seq[Token], tops: Any = ()) -> SequenceOutput:
    assert sequence.started_s is not None
    return SequenceOutput(
        log_probs=tuple(log_probs),
        tokens=tuple(tokens),
        tops=tops,
        queued_s=sequence.started_s - sequence.arrived_s,
        computed_s=time.monotonic() - sequence.started_s,
    )


def _token(token_id: int, log_probs: Mapping[int, Any], num_top: int) -> Token:
    ranked = sorted(log_probs.items(), key=lambda item: -item[1].logprob) if num_top else []
    top = tuple((one, found.logprob) for one, found in ranked[:num_top])
    return Token(token_id, log_probs[token_id].logprob, top)
