"""Runs the benchmark: starts the systems, and gives them slices in turn, in an order that is drawn anew each round."""

import asyncio
import math
import random
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from loraplex.bench.figures import Slice, saturation
from loraplex.bench.in_process import InProcess
from loraplex.bench.llamacpp import LlamaCpp
from loraplex.bench.load import Load
from loraplex.bench.measured import FEWEST, LoadPlan, Measured, closed_load, open_load
from loraplex.bench.served import Served
from loraplex.bench.settings import LLAMACPP, Prepared
from loraplex.bench.supply import Supply
from loraplex.bench.system import System, SystemEnded
from loraplex.bench.work import work_of
from loraplex.config import EngineConfig, resolve
from loraplex.errors import ConfigurationError, LoraplexError
from loraplex.machine import choose_threads, give_back
from loraplex.measuring.about import about
from loraplex.measuring.cores import BusyCores
from loraplex.measuring.limits import bandwidth, gemm_rate
from loraplex.measuring.memory import PeakMemory, used_device_bytes
from loraplex.model.loader import resolve_device, resolve_dtype

ALONE = LoadPlan(kind="closed", concurrency=1)
FEWEST_CLIENTS, MOST_CLIENTS = 8, 1024  # of the closed loops that look for a system's capacity
GROWTH = 1.05  # twice the clients must be answered so many times faster, or there is no more to find
SHARES = (0.25, 0.5, 0.75, 0.9, 1.0, 1.25, 1.5, 3.0, 6.0)  # of the capacity, until the system is saturated
OVERLOAD = LoadPlan(kind="open", share=2.0)
FEW = 4  # conversations that a system is asked first

Progress = Callable[[str, float, float], None]  # what runs; slices that are done, and slices in all


def open_system(prepared: Prepared, name: str) -> System:
    """Return a system that is not started yet."""
    settings = prepared.settings
    python, versions = settings.python.get(name, sys.executable), prepared.versions.get(name, {})
    log = settings.out / f"{name}.log"
    if name == LLAMACPP:
        return LlamaCpp(
            prepared.bundle,
            log=log,
            url=settings.urls.get(name),
            server=settings.llamacpp_server,
            model=settings.llamacpp_model,
            arguments=settings.llamacpp_arguments,
            slots=settings.concurrency or FEWEST_CLIENTS,
        )
    if settings.transport == "in-process":
        return InProcess(name, settings.bundle, prepared.engine[name], python=python, versions=versions, log=log)
    return Served(
        name,
        settings.bundle,
        prepared.engine[name],
        python=python,
        versions=versions,
        log=log,
        url=settings.urls.get(name),
    )


class Run:
    """One run. What it has measured can be read at any time, also after `measure` was interrupted.

    about:            where and with what it runs.
    gemm, bandwidth:  the machine's limits, one figure each time that they were measured: FLOP/s, bytes/s.
    """

    def __init__(
        self,
        prepared: Prepared,
        open_system: Callable[[Prepared, str], System] = open_system,
    ) -> None:
        self.prepared, self._settings = prepared, prepared.settings
        self._progress: Progress = lambda *_: None
        choose_threads()
        engine = resolve(EngineConfig, prepared.bundle.settings.engine, dict(self._settings.engine))
        self.device = resolve_device(engine.device)
        self.dtype = resolve_dtype(engine.dtype, self.device)
        self.about = about(self.device, self.dtype)
        self.work = work_of(prepared.bundle, prepared.classifiers)
        self.gemm: list[float] = []
        self.bandwidth: list[float] = []
        self.measured = {
            name: Measured(
                system=open_system(prepared, name),
                supply=Supply(
                    prepared.rows, prepared.classifiers, asking=self._settings.asking, turns=self._settings.turns
                ),
            )
            for name in prepared.systems
        }
        self._draw = random.Random(self._settings.seed)
        self._num_done, self._num_slices = 0, 1

    async def measure(self, progress: Progress = lambda *_: None) -> None:
        """Start all systems and measure them; with one slice, start and measure one after the other. Ends their
        processes, also where it is interrupted."""
        self._progress = progress
        everything = list(self.measured.values())
        groups = [everything] if self._settings.slices > 1 else [[one] for one in everything]
        num_plans = 2 + len(SHARES) + 3 if self._settings.sweep else 1
        self._num_slices = num_plans * self._settings.slices * len(everything)
        for group in groups:
            self._measure_limits()
            try:
                for one in group:
                    self._tell(f"{one.name} starts")
                    await self._start(one)
                if self._settings.sweep:
                    await self._sweep(group)
                else:
                    await self._rounds(group, self._only_plan())
            finally:
                await asyncio.gather(*(one.system.close() for one in group))
                for one in group:
                    one.loaded_device_bytes = 0

    def drop_unfinished(self) -> None:
        """Leave out the slices of a round that not all systems have finished, so that all systems are compared on the
        same conversations. Where one has finished none, everything stays."""
        well = [one for one in self.measured.values() if one.is_well]
        for plan in {plan for one in well for plan in one.slices}:
            if num := min(len(one.slices.get(plan, ())) for one in well):
                for one in well:
                    del one.slices[plan][num:], one.offered[plan][num:]

    def _only_plan(self) -> LoadPlan:
        if self._settings.rate is not None:
            return LoadPlan(kind="open", rate=self._settings.rate)
        return LoadPlan(kind="closed", concurrency=self._settings.concurrency)

    def _measure_limits(self) -> None:
        """Measure the machine while no system computes. On a device without room for that, leave it out."""
        self._tell("the machine's own limits")
        try:
            self.gemm.append(gemm_rate(self.work.layers, self.device, self.dtype))
            self.bandwidth.append(bandwidth(self.device))
        except RuntimeError:  # out of memory, beside the systems
            pass
        give_back(self.device)  # what was multiplied and copied is not the systems'

    def _tell(self, what: str, share: float = 0.0) -> None:
        self._progress(what, self._num_done + share, self._num_slices)

    # ------------------------------------------------------------------------------------------- a system

    async def _start(self, one: Measured) -> None:
        """Start a system, and ask it a few conversations that do not count: the first ones take longer."""
        used = used_device_bytes(self.device)
        one.device_before = None if used is None else used - self._loaded_beside(one)
        starting = asyncio.ensure_future(one.system.start(self.prepared.classifiers))
        try:
            while one.system.pid is None and not starting.done() and one.name not in self._settings.urls:
                await asyncio.sleep(0.01)
            with self._memory(one):
                await starting
            one.starting_rss_bytes = one.peak_rss_bytes
            num = self._settings.concurrency or FEW
            with self._memory(one):
                found = await self._ask(one, closed_load(one.supply, 1, num, self._settings.timeout_s, counts=False))
            errors = [str(sample.reply.error) for sample in found.samples if sample.reply.status != "ok"]
            if len(errors) == len(found.samples):
                raise ConfigurationError(
                    f"system {one.name}", f"answers none of its first requests: {errors[0]}", remedy="see its log"
                )
            one.rate = found.conversations_per_s or one.rate
            one.loaded_device_bytes = (used_device_bytes(self.device) or 0) - (used or 0)
            one.state = "measured"
        except (LoraplexError, SystemEnded) as exc:
            one.state = f"failed: {exc}"
            await one.system.close()
        finally:
            starting.cancel()

    @contextmanager
    def _memory(self, one: Measured) -> Iterator[None]:
        """Watch the memory of a system that was started here."""
        if one.system.pid is None:
            yield
            return
        with PeakMemory(one.system.pid, self.device) as peak:
            yield
        one.peak_rss_bytes = max(one.peak_rss_bytes or 0, peak.rss_bytes)
        if peak.device_bytes is not None and one.device_before is not None:
            own = peak.device_bytes - one.device_before - self._loaded_beside(one)
            one.peak_device_bytes = max(one.peak_device_bytes or 0, own)

    def _loaded_beside(self, one: Measured) -> int:
        """Return the bytes on the device that the other systems took when they started."""
        return sum(other.loaded_device_bytes for other in self.measured.values() if other is not one)

    async def _ask(self, one: Measured, load: Load, what: str = "") -> Slice:
        num_ended, num = 0, sum(job.phase != "cool-down" for job in load.jobs)

        def tell() -> None:
            nonlocal num_ended
            num_ended += 1
            self._tell(f"{one.name}: {what or 'first requests'}", min(num_ended / num, 1.0) if what else 0.0)

        with BusyCores(one.system.pid) as cores:
            samples = tuple(await one.system.run(load, tell))
        return Slice(load=load, samples=samples, busy=cores.busy)

    # ------------------------------------------------------------------------------------------- slices

    async def _rounds(self, group: Sequence[Measured], plan: LoadPlan) -> None:
        """Give each system its slices of a plan, in turn."""
        for index in range(self._settings.slices):
            if index and len(self.gemm) < self._settings.slices:
                self._measure_limits()
            for one in self._draw.sample(group, len(group)):
                await self._slice(one, plan, index)
        if plan.kind == "open":
            for one in group:
                self._judge(one, plan)

    async def _slice(self, one: Measured, plan: LoadPlan, index: int) -> Slice | None:
        """Measure a slice. None where the system has failed, now or before."""
        settings, found = self._settings, None
        if one.is_well:
            capacity = one.capacity[-1:] if plan == OVERLOAD else one.capacity
            offered = plan.rate or (plan.share or 0.0) * statistics.median(capacity or [one.rate])
            if plan.concurrency is not None:
                load = closed_load(one.supply, plan.concurrency, self._num(one, plan, index), settings.timeout_s)
            else:
                seed = f"{settings.seed} {plan} {index}"
                load = open_load(one.supply, offered, settings.seconds, settings.timeout_s, seed)
            try:
                with self._memory(one):
                    found = await self._ask(one, load, f"{plan}, slice {index + 1} of {settings.slices}")
                one.keep(plan, found, offered if plan.kind == "open" else None)
            except SystemEnded as exc:
                one.state = f"failed: {exc}"
        self._num_done += 1
        return found

    def _num(self, one: Measured, plan: LoadPlan, index: int) -> int:
        """Return the conversations of a closed loop's slice: an equal part of all, or in a sweep as many as take about
        the seconds of a slice."""
        settings = self._settings
        if not settings.sweep:
            num = len(self.prepared.rows)
            return num * (index + 1) // settings.slices - num * index // settings.slices
        return max(FEWEST, plan.concurrency or 0, math.ceil(one.rate * settings.seconds))

    async def _sweep(self, group: Sequence[Measured]) -> None:
        """Find each system's capacity, then offer more and more of it, up to its saturation. At last offer twice as
        much, to see what is still answered."""
        await self._rounds(group, ALONE)
        await self._find_clients(group)
        for index in range(1, self._settings.slices):
            for one in self._draw.sample(group, len(group)):
                await self._capacity(one, index)
        for step, share in enumerate(SHARES):
            plan = LoadPlan(kind="open", share=share)
            unsaturated = [one for one in group if one.is_well and one.saturated is None]
            await self._rounds(unsaturated, plan)
            for one in unsaturated:
                self._num_slices -= self._settings.slices * (len(SHARES) - 1 - step) if one.saturated else 0
        for index in range(self._settings.slices):
            for one in self._draw.sample(group, len(group)):
                await self._overload(one, index)
        for one in group:
            self._judge(one, OVERLOAD)

    async def _find_clients(self, group: Sequence[Measured]) -> None:
        """Double the clients of each system's closed loop until it answers no more conversations a second, or refuses
        some. The best slice is the first of those that measure its capacity."""
        growing, num = [*group], FEWEST_CLIENTS
        while growing:
            plan = LoadPlan(kind="closed", concurrency=num)
            for one in self._draw.sample(growing, len(growing)):
                found = await self._slice(one, plan, 0)
                rate = (found and found.conversations_per_s) or 0.0
                refuses = found is not None and any(sample.reply.status == "refused" for sample in found.measured)
                if rate > GROWTH * max(one.capacity, default=0.0) and not (refuses and one.clients):
                    one.clients, one.capacity = plan, [rate]
                else:
                    one.clients = one.clients or plan
                    growing.remove(one)
            num *= 2
            growing = growing if num <= MOST_CLIENTS else []
            self._num_slices += len(growing)

    async def _capacity(self, one: Measured, index: int) -> float:
        assert one.clients is not None, "its clients were found"
        found = await self._slice(one, one.clients, index)
        rate = (found and found.conversations_per_s) or 0.0
        if rate:
            one.capacity.append(rate)
        return rate

    async def _overload(self, one: Measured, index: int) -> None:
        """The machine's speed changes: what is answered is compared with the capacity right before and after."""
        before = await self._capacity(one, index)
        found = await self._slice(one, OVERLOAD, index)
        after = await self._capacity(one, index)
        if found is not None and before and after:
            one.goodputs.append((found.conversations_per_s or 0.0) / statistics.mean((before, after)))

    def _judge(self, one: Measured, plan: LoadPlan) -> None:
        why = saturation(one.slices.get(plan, ()))
        if one.saturated is None and why is not None:
            one.saturated = plan, why
