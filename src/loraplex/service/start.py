"""Starts a service from a bundle and its settings. Cheap checks run before any weights are read."""

import asyncio
import logging
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from loraplex.adapters.base_name import ServedBase
from loraplex.adapters.host import HostTier
from loraplex.adapters.residence import Residence
from loraplex.adapters.slots import SlotTable
from loraplex.adapters.tasks import AdapterThreads, Tasks
from loraplex.bundle import Bundle
from loraplex.config import EngineConfig, resolve
from loraplex.discovery import lines_of
from loraplex.errors import ConfigurationError
from loraplex.executors.executor import Computation, Executor
from loraplex.machine import bound_kernel_caches, budget_bytes, choose_threads, compute_alone
from loraplex.model.loader import read_config, read_layers, resolve_device
from loraplex.planning.adapter_size import adapter_in_memory
from loraplex.planning.start_plan import StartPlan, plan_start
from loraplex.service.base import Base
from loraplex.service.classifiers import CheckedClassifier, ClassifierChecker, ClassifierReader, ClassifierVersion
from loraplex.service.computing import Computing
from loraplex.service.preparation import Preparation, prepare
from loraplex.service.proof import prove
from loraplex.service.registry import AdapterRegistry
from loraplex.service.service import Service
from loraplex.service.state import AdapterState
from loraplex.service.versions import Versions
from loraplex.text.chat_template import ChatTemplate
from loraplex.text.question import QuestionPrompts
from loraplex.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


async def start(
    bundle: Bundle,
    config: EngineConfig | None = None,
    executor: Executor | None = None,
    preparation: Preparation | None = None,
    on_plan: Callable[[StartPlan], None] | None = None,
) -> Service:
    """Load the base and the adapters, and return the service. config: by default the bundle's own. executor: by default
    the one that `config` names. preparation: what `prepare` returned; by default it is called here. on_plan: called on
    another thread with the memory that the start will take, before the base is read. Raises ConfigurationError where a
    file or a setting is wrong, the base does not fit into memory, or the backend's library is not installed."""
    config = config or resolve(EngineConfig, bundle.settings.engine, {})
    preparation = preparation or prepare(bundle, config)
    state = preparation.state
    for line in lines_of(bundle.skipped):
        logger.warning("%s", line)
    loaded: _Loaded | None = None
    try:
        executor = executor or open_executor(config)
        thread = ThreadPoolExecutor(1, "loraplex-load")
        try:
            loaded = await asyncio.get_running_loop().run_in_executor(
                thread, _load, bundle, config, executor, preparation, on_plan
            )
        finally:
            thread.shutdown(wait=False)  # ends the thread and its OpenMP threads, see `compute_alone`
        service = _assemble(bundle, config, executor, state, loaded)
    except BaseException:
        if loaded is not None:
            await asyncio.to_thread(loaded.computation.close)
        if executor is not None:
            executor.close()
        if state is not None:
            state.release()
        raise
    try:
        await service.registry.start(preparation.preload, loaded.checked)
    except BaseException:
        await service.close()
        raise
    logger.info("%s with %s, %d adapters", service.base_name, executor.name, len(bundle.adapters))
    return service


def open_executor(config: EngineConfig) -> Executor:
    """Return the executor that `config` names. Only its own library is imported; `prepare` has checked that it is
    installed. Raises ConfigurationError where it cannot be imported."""
    if config.backend == "peft":
        from loraplex.executors.peft import PeftExecutor

        return PeftExecutor(config)
    if config.backend == "vllm":
        try:
            from loraplex.executors.vllm import VllmExecutor
        except ImportError as exc:
            raise ConfigurationError(
                "--backend vllm",
                f"the installed vLLM cannot be imported: {exc}",
                remedy="install 0.32 or newer; for a CPU see docs/backends.md",
            ) from None
        return VllmExecutor(config)
    from loraplex.executors.native import NativeExecutor

    return NativeExecutor(config)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loaded:
    base: Base
    checker: ClassifierChecker
    checked: dict[str, CheckedClassifier]  # read before the base, as many as host memory holds
    computation: Computation


def _load(
    bundle: Bundle,
    config: EngineConfig,
    executor: Executor,
    preparation: Preparation,
    on_plan: Callable[[StartPlan], None] | None,
) -> _Loaded:
    """Check the adapters, then load the base. Runs on a thread of its own."""
    choose_threads()
    bound_kernel_caches()
    packs = not executor.capabilities.other_bases
    model_config = read_config(bundle.base, packs=packs)
    layers, num_embeddings = read_layers(model_config, bundle.base, packs=packs)
    chat = ChatTemplate.of(Tokenizer(bundle.base, num_embeddings))
    max_model_len = executor.max_model_len(model_config)
    questions = None
    if config.adhoc_questions:
        questions = QuestionPrompts(chat, max_model_len, in_both_orders=config.adhoc_correction == "orders")
    checker = ClassifierChecker(layers, chat, max_model_len, executor.capabilities, ServedBase(bundle.base))
    checked: dict[str, CheckedClassifier] = {}
    room = budget_bytes(config.host_memory, resolve_device("cpu"))
    for source in bundle.adapters if config.preload == "all" else ():
        if source.name in preparation.own and source.error is None:
            try:
                one = checker.check(source)
            except ConfigurationError:
                if bundle.requires(source.name):
                    raise
                continue  # the registry reads it again, and keeps the error
            room -= one.adapter.weights.num_bytes
            if room >= 0:
                checked[source.name] = one
    sizes = [adapter_in_memory(one.adapter.weights) for one in checked.values()]
    plan = plan_start(bundle.base, model_config, config, sizes, layers=layers, sources=bundle.adapters, packs=packs)
    if on_plan is not None:
        on_plan(plan)
    if plan.warning is not None:
        logger.warning("%s", plan.warning)
    computation = executor.load(bundle.base, model_config, bundle.adapters)
    base = Base(
        names=preparation.base_names,
        chat=chat,
        max_model_len=max_model_len,
        pad_token_id=getattr(model_config, "pad_token_id", None),
        stop_ids=executor.stop_ids,
        questions=questions,
    )
    return _Loaded(base=base, checker=checker, checked=checked, computation=computation)


def _assemble(
    bundle: Bundle, config: EngineConfig, executor: Executor, state: AdapterState | None, loaded: _Loaded
) -> Service:
    computing = Computing(loaded.computation, max_queue=config.max_queue, max_queue_tokens=config.max_queue_tokens)
    if executor.max_slots is None:
        memory = budget_bytes(config.adapter_memory, resolve_device(config.device))
        slots = SlotTable(budget_bytes=memory, max_slots=config.max_adapters)
    else:
        slots = SlotTable(budget_bytes=sys.maxsize, max_slots=executor.max_slots)
    host = HostTier(budget_bytes(config.host_memory, resolve_device("cpu")))
    reader = ClassifierReader(loaded.checker, executor.parameter, executor.item_bytes)
    tasks = Tasks()
    residence: Residence[ClassifierVersion] = Residence(
        reader, executor, slots, host, AdapterThreads(compute_alone), tasks
    )

    async def prove_version(version: ClassifierVersion, slot: int) -> None:
        await prove(version, slot, loaded.base, computing.compute_now)
        for warning in version.warnings:
            logger.warning("%s: %s", version.source.name, warning)

    versions = Versions(residence, prove_version, tasks)
    registry = AdapterRegistry(bundle, loaded.base.names, config, versions, reader, state)
    return Service(
        base=loaded.base,
        executor=executor,
        computing=computing,
        versions=versions,
        registry=registry,
        state=state,
    )
