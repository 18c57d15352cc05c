"""Verifies an adapter before it is deployed: reads and proves it as a start does, and compares answers with PEFT's."""

import asyncio
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from loraplex.bundle import open_adapter, open_base
from loraplex.config import EngineConfig
from loraplex.errors import AdapterError
from loraplex.generation import GenerateRequest
from loraplex.service.preparation import is_installed
from loraplex.service.proof import PROBE_TEXT, activated
from loraplex.service.service import Service
from loraplex.service.start import start
from loraplex.types import AdapterInfo, ClassifyRequest

TOLERANCE = 1e-4
NAME = "adapter"  # the adapter's name here, whatever its folder is called


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """The result of `verify`.

    difference:  the largest difference of a probability between ours and PEFT's, in float32; None if not compared.
    """

    adapter: AdapterInfo
    num_golden: int
    num_compared: int = 0
    difference: float | None = None


async def verify(folder: Path, base: str, *, texts: Iterable[str] = (), with_peft: bool = True) -> Proof:
    """Verify the adapter in `folder` on a base, and return its proof. texts: further texts to compare on. Raises
    ConfigurationError where a file is wrong, a golden example fails, or PEFT differs by more than TOLERANCE."""
    opened = open_adapter(NAME, folder)
    bundle = replace(open_base(base), adapters=(opened,))
    service = await start(bundle, EngineConfig(dtype="float32", device="cpu", kv_cache="0"))
    try:
        [info] = service.adapters()
        golden = () if opened.contract is None else opened.contract.golden
        if not (with_peft and is_installed("peft")):
            return Proof(adapter=info, num_golden=len(golden))
        prompts = [one.text for one in golden] + list(texts) or [PROBE_TEXT]
        difference = await _difference(service, bundle.base, folder, info.name, prompts)
    finally:
        await service.close()
    if not difference <= TOLERANCE:
        raise AdapterError(
            folder,
            f"PEFT's probabilities differ by up to {difference:.1e} from ours, more than {TOLERANCE}",
            remedy="report this as a bug, with the adapter's config",
        )
    return Proof(adapter=info, num_golden=len(golden), num_compared=len(prompts), difference=difference)


async def _difference(service: Service, base: Path, folder: Path, name: str, texts: list[str]) -> float:
    version = await service.version_of(name)
    num_labels = len(version.labels or ()) if version.has_score else None
    from loraplex.executors.peft import PeftOracle

    oracle = await asyncio.to_thread(PeftOracle, base, folder, num_labels=num_labels)
    contract, largest = version.source.contract, 0.0
    for text in (activated(version, text) for text in texts):
        request = ClassifyRequest(input=text, classifiers=(name,))
        [(_, _, prompt)] = await service.show_prompt(request)
        if version.template is None and not version.has_score:
            [token] = (await service.generate(GenerateRequest(prompt=text, adapter=name))).tokens
            [log_prob] = oracle.label_log_probs(prompt, [[token.id]])
            largest = max(largest, abs(math.exp(log_prob) - math.exp(token.log_prob)))
            continue
        [verdict] = (await service.classify(request)).verdicts
        if version.has_score:
            log_probs = oracle.score_log_probs(prompt)
        else:
            assert version.template is not None
            log_probs = oracle.label_log_probs(prompt, list(version.template.label_ids.values()))
        assert verdict.scores is not None
        if contract is not None:
            expected = contract.decide(log_probs).scores
        else:
            expected = dict(zip(verdict.scores, map(math.exp, log_probs), strict=True))
        largest = max(largest, *(abs(expected[label] - score) for label, score in verdict.scores.items()))
    return largest
