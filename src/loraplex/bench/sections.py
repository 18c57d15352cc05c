"""What a report says, in sentences and tables, from report.json: what report.md and report.html show."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from loraplex.amounts import usd
from loraplex.bench.cells import latency, number, percent, spread_text
from loraplex.bench.thousand import costs_of, rents
from loraplex.measuring.section import Section

GB = 1e9
BUSY_CLIENT = 0.8  # of a core
BUSY_OTHERS = 0.05  # of all cores
FEW_ARRIVALS = 100  # of an open loop, over all its slices: their number varies by a fifth
# The article's table: "Hot-Swappable LoRA: Serving 16 Fine-Tuned Models on a Single GPU".
ARTICLE = {
    "P50 latency": ("45 ms", "18 ms"),
    "P99 latency": ("120 ms", "42 ms"),
    "Requests": ("15/s", "45/s"),
    "Verdicts": ("15/s", "45/s"),
    "Memory": ("18.2 GB", "15.8 GB"),
    "Accuracy": ("97.2 %", "97.2 %"),
}
NAMES = {
    "native": "Loraplex",
    "peft": "PEFT",
    "peft-mixed": "PEFT, mixed batch",
    "vllm": "vLLM",
    "llamacpp": "llama.cpp",
}


def sections(report: Mapping[str, Any]) -> list[Section]:
    """Return the parts of a report that it has figures for, in their order."""
    measured = measured_of(report)
    found = [_head(report), *_summary(measured)]
    if measured:
        found += [
            _article(measured),
            _loads(measured, report["about"]["cores"]),
            *_saturation(measured),
            *_costs(report, measured),
        ]
        found += [*_turns(measured)]
        found += [*_quality(measured), *_agreement(measured), _memory(measured), *_limit(report, measured)]
    return [*found, _left_out(report), _repeat(report)]


def measured_of(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the systems that have figures."""
    return {name: one for name, one in report["systems"].items() if one.get("loads")}


def main_load(system: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the load whose figures stand for the system: in a sweep the closed loop that found its capacity."""
    loads: Sequence[Mapping[str, Any]] = system["loads"]
    closed = [one for one in loads if one["kind"] == "closed"]
    clients = system["saturation"].get("clients")
    found = [one for one in closed if one["concurrency"] == clients] or closed
    return max(found, key=lambda one: one["concurrency"]) if found else loads[0]


def load_name(load: Mapping[str, Any]) -> str:
    if load["kind"] == "closed":
        return f"closed, {load['concurrency']} clients" if load["concurrency"] != 1 else "closed, 1 client"
    share = load["share_of_capacity"]
    return f"open, {load['offered_per_s']:.3g} conversations/s" + (f" ({share:g}x)" if share else "")


def _head(report: Mapping[str, Any]) -> Section:
    about, data, settings = report["about"], report["data"], report["about"]["settings"]
    way = "in process" if settings["transport"] == "in-process" else "over HTTP"
    asked = "all in one request" if settings["asking"] == "together" else "a request for each"
    texts = [
        _interrupted(report) if report["cut_short"] else "",
        f"{data['conversations']} conversations of `{data['file']}` and {len(data['classifiers'])} classifiers, "
        f"{asked}, asked {way}. {about['device']}, {about['cores']} cores, {about['threads']} threads of PyTorch, "
        f"{about['dtype']}; {about['started']}.",
        "A figure is the median over slices, and in parentheses the lowest and the highest of them. A percentile is of "
        'all slices\' requests together. "≥" marks a bound: requests that were given up took at least so long.',
    ]
    return Section(title="", texts=[text for text in texts if text])


def _interrupted(report: Mapping[str, Any]) -> str:
    if not measured_of(report):
        return "The run was interrupted before a slice was measured."
    return "The run was interrupted: these are the slices that it had measured."


def _summary(measured: Mapping[str, Any]) -> list[Section]:
    """Say how the other systems compare with ours, and how much of that is sharing."""
    ours = main_load(measured["native"]) if "native" in measured else {}
    rate, computed = ours.get("conversations_per_s"), ours.get("tokens_computed_per_s")
    if not rate or not rate["median"]:
        return []
    points = [f"Loraplex answers {spread_text(rate)} conversations a second here, with all verdicts of each."]
    for name, one in measured.items():
        theirs = main_load(one)
        other, tokens = theirs["conversations_per_s"], theirs["tokens_computed_per_s"]
        if name == "native" or not other or not other["median"]:
            continue
        times = rate["median"] / other["median"]
        text = f"{NAMES.get(name, name)} answers {spread_text(other)}: Loraplex answers {times:.3g} times as many"
        if computed and tokens and computed["median"] and tokens["median"]:
            speed = computed["median"] / tokens["median"]
            text += f" (speed {speed:.3g}, sharing {times / speed:.3g})"
        points.append(f"{text}.")
    told = "Speed is tokens computed a second. Sharing is how many fewer tokens are computed for a conversation."
    return [Section(title="In short", texts=[told] if len(points) > 1 else [], points=points)]


def _column(of: Callable[[Mapping[str, Any]], str], measured: Mapping[str, Any]) -> list[str]:
    return [of(one) for one in measured.values()]


def _article(measured: Mapping[str, Any]) -> Section:
    def accuracy(one: Mapping[str, Any]) -> str:
        return "-" if one["quality"]["mean"] is None else percent(one["quality"]["mean"]["accuracy"], 1)

    def memory(one: Mapping[str, Any]) -> str:
        taken = one["memory"]["peak_device_bytes"] or one["memory"]["peak_rss_bytes"]
        return "-" if taken is None else f"{taken / GB:.2f} GB"

    def per_load(of: Callable[[Mapping[str, Any]], str]) -> list[str]:
        return _column(lambda one: of(main_load(one)), measured)

    ours = {
        "P50 latency": per_load(lambda load: latency(load["latency_ms"], "p50", " ms")),
        "P99 latency": per_load(lambda load: latency(load["latency_ms"], "p99", " ms")),
        "Requests": per_load(lambda load: f"{spread_text(load['requests_per_s'])}/s"),
        "Verdicts": per_load(lambda load: f"{spread_text(load['verdicts_per_s'])}/s"),
        "Memory": _column(memory, measured),
        "Accuracy": _column(accuracy, measured),
    }
    head = ["Metric", "the article: PEFT", "the article: vLLM", *(NAMES.get(name, name) for name in measured)]
    first = main_load(next(iter(measured.values())))
    return Section(
        title="The article's table",
        texts=[
            "The article's figures are for a Mistral 7B on an A10G, where a request asks one classifier. Ours are for "
            f"this machine and this bundle ({load_name(first)}), so compare columns of the same origin only."
        ],
        table=(head, [[name, *ARTICLE[name], *values] for name, values in ours.items()]),
    )


def _loads(measured: Mapping[str, Any], cores: int) -> Section:
    head = "system, load|ok|refused|failed|timeout|p50 ms|p90 ms|p99 ms|all verdicts p50 ms|requests/s|conversations/s"
    head += "|verdicts/s|tokens/s asked|tokens/s computed|beside the engine ms"
    rows = []
    for name, one in measured.items():
        for load in one["loads"]:
            rates = "requests_per_s conversations_per_s verdicts_per_s tokens_asked_per_s tokens_computed_per_s".split()
            rows.append(
                [
                    f"{NAMES.get(name, name)}, {load_name(load)}",
                    *(f"{load['requests'][status]:,}" for status in ("ok", "refused", "failed", "timeout")),
                    *(latency(load["latency_ms"], name) for name in ("p50", "p90", "p99")),
                    latency(load["all_verdicts_ms"], "p50"),
                    *(spread_text(load[rate]) for rate in rates),
                    spread_text(load["http_adds_ms"]),
                ]
            )
    errors = [
        f"{NAMES.get(name, name)}, {load_name(load)}: "
        + ", ".join(f"{num} times `{code}`" for code, num in load["requests"]["errors"].items())
        for name, one in measured.items()
        for load in one["loads"]
        if load["requests"]["errors"]
    ]
    busy = [
        f"{NAMES.get(name, name)}, {load_name(load)}: {text}"
        for name, one in measured.items()
        for load in one["loads"]
        for text in _busy(load["busy_cores"], cores)
    ]
    return Section(title="All loads", table=(head.split("|"), rows), points=[*errors, *busy])


def _busy(found: Mapping[str, Any], cores: int) -> Iterator[str]:
    """Yield why a load's figures may be worse than the system is."""
    client, others = (found[name] and found[name]["median"] for name in ("client", "others"))
    if client is not None and client > BUSY_CLIENT:
        yield f"the client was busy with {client:.2f} of its one core, so the system may answer more."
    if others is not None and others > BUSY_OTHERS * cores:
        yield f"other processes were busy with {others:.2f} of the machine's cores."


def _saturation(measured: Mapping[str, Any]) -> list[Section]:
    if not any(load["kind"] == "open" for one in measured.values() for load in one["loads"]):
        return []
    rows = []
    for name, one in measured.items():
        found, goodput = one["saturation"], one["goodput_at_2x"]
        rows.append(
            [
                NAMES.get(name, name),
                spread_text(found["conversations_per_s"]),
                f"{found['at']}: {found['why']}" if found["reached"] else "not reached",
                "-" if goodput is None else percent(goodput["median"]),
            ]
        )
    head = ["system", "capacity, conversations/s", "saturated", "answered at twice the capacity"]
    few = [
        f"{NAMES.get(name, name)}, {load_name(load)}: only {load['conversations']} conversations arrived, so chance "
        "may decide what was answered in time. Give more --seconds."
        for name, one in measured.items()
        for load in one["loads"]
        if load["kind"] == "open" and load["conversations"] < FEW_ARRIVALS
    ]
    return [Section(title="Saturation", table=(head, rows), points=few)]


def _costs(report: Mapping[str, Any], measured: Mapping[str, Any]) -> list[Section]:
    at_one = costs_of(measured)
    if not at_one:
        return []
    text = (
        "At a dollar an hour: multiply by your machine's price. Each system is kept as busy as the run kept it, so a "
        "system that was not saturated may cost less than this."
    )
    head = ["system", "$1 an hour"]
    columns = [at_one]
    for name, price in rents(report["about"]["device"]):
        head.append(f"{name}, {usd(price)} an hour")
        columns.append(costs_of(measured, price))
    rows = [[NAMES.get(name, name), *(usd(column[name]) for column in columns)] for name in at_one]
    return [Section(title="Cost of 1,000 conversations", texts=[text], table=(head, rows))]


def _turns(measured: Mapping[str, Any]) -> list[Section]:
    rows = [
        [
            f"{NAMES.get(name, name)}, turn {turn['turn']}",
            str(turn["conversations"]),
            latency(turn["latency_ms"], "p50"),
            number(turn["tokens_asked"], 4),
            number(turn["tokens_computed"], 4),
            "-" if turn["cached_share"] is None else percent(turn["cached_share"]),
        ]
        for name, one in measured.items()
        for turn in one["turns"]
    ]
    if not rows:
        return []
    head = ["system, turn", "conversations", "p50 ms", "tokens asked", "tokens computed", "shared or cached"]
    return [Section(title="Turn by turn", table=(head, rows))]


def _quality(measured: Mapping[str, Any]) -> list[Section]:
    if not any(one["quality"]["mean"] for one in measured.values()):
        return []
    rows = []
    for name in (*sorted({name for one in measured.values() for name in one["quality"]["classifiers"]}), ""):
        found = [
            one["quality"]["classifiers"].get(name) if name else one["quality"]["mean"] for one in measured.values()
        ]
        cells = ["-" if one is None else _right(one) for one in found]
        rows.append([name or "mean", *cells])
    head = ["accuracy, F1, verdicts (positive)", *(NAMES.get(name, name) for name in measured)]
    return [Section(title="Right and wrong", table=(head, rows))]


def _right(one: Mapping[str, Any]) -> str:
    f1 = "-" if one["f1"] is None else f"{one['f1']:.3f}"
    return f"{one['accuracy']:.3f}, {f1}, {one['n']} ({one['positives']})"


def _agreement(measured: Mapping[str, Any]) -> list[Section]:
    rows = [
        [
            NAMES.get(name, name),
            NAMES.get(found["with"], found["with"]),
            f"{found['labels_equal']:,} of {found['verdicts']:,}",
            *("-" if found[key] is None else f"{found[key]:.1e}" for key in ("difference_mean", "difference_max")),
        ]
        for name, one in measured.items()
        if (found := one["agreement"]) is not None
    ]
    head = ["system", "against", "equal labels", "mean difference", "largest difference"]
    return [Section(title="Agreement", table=(head, rows))] if rows else []


def _memory(measured: Mapping[str, Any]) -> Section:
    def size(value: int | None) -> str:
        return "-" if value is None else f"{value / GB:.2f}"

    keys = ("starting_rss_bytes", "peak_rss_bytes", "peak_device_bytes")
    rows = [[NAMES.get(name, name), *(size(one["memory"][key]) for key in keys)] for name, one in measured.items()]
    head = ["GB", "while it started, at most", "in the whole run, at most", "on the device, at most"]
    return Section(title="Memory", table=(head, rows))


def _limit(report: Mapping[str, Any], measured: Mapping[str, Any]) -> list[Section]:
    limits = report["limits"]
    if limits["gemm_flops_per_s"] is None:
        return []
    gemm, bandwidth = limits["gemm_flops_per_s"]["median"], limits["bytes_per_s"]["median"]
    rows = []
    for name, one in measured.items():
        load = main_load(one)
        share, flop = load["share_of_gemm_rate"], load["floor"]["flop_per_conversation"]
        rows.append(
            [
                NAMES.get(name, name),
                "-" if flop is None else f"{flop / 1e9:,.2f}",
                "-" if flop is None else f"{1000 * flop / gemm:,.1f}",
                "-" if share is None else percent(share),
            ]
        )
    weights = main_load(next(iter(measured.values())))["floor"]["weights_bytes"]  # the base's, the same for all
    text = (
        f"Measured between the slices: products of this base's layers run at {gemm / 1e9:,.0f} GFLOP/s, and copies in "
        f"memory at {bandwidth / 1e9:,.1f} GB/s. Reading the base's {weights / 1e6:,.0f} MB of weights once takes "
        f"{1000 * weights / bandwidth:.2f} ms. The work of the tokens that a system computed is counted without "
        "attention, so the shares are lower bounds. A system that shares a conversation among classifiers computes "
        "fewer tokens; that shows in the second column, not in the share. PEFT computes the last layer for all tokens, "
        "of which only the last ones are counted, so its share is too low: by up to 15 % with few layers."
    )
    head = ["system", "GFLOP a conversation", "the least ms for them", "share of the products' rate"]
    return [Section(title="The machine's limit", texts=[text], table=(head, rows))]


def _left_out(report: Mapping[str, Any]) -> Section:
    lines = [
        f"{NAMES.get(name, name)}: {one['state']}"
        for name, one in report["systems"].items()
        if one["state"] != "measured"
    ]
    lines += [
        f"{NAMES.get(name, name)} ran already at {one['url']}: its memory, versions and settings are not known."
        for name, one in report["systems"].items()
        if one.get("url")
    ]
    for name, one in report["systems"].items():
        lines += [f"{NAMES.get(name, name)} {what}" for what in _facts(one.get("facts") or {})]
    lines += [
        f"{NAMES.get(name, name)} cut old turns of {one['cut_conversations']:,} conversations that were too long."
        for name, one in report["systems"].items()
        if one.get("cut_conversations")
    ]
    lines += [
        f"Labels of `{name}` ({num:,} conversations) belong to no classifier of the bundle."
        for name, num in (report["data"].get("unknown_labels") or {}).items()
    ]
    excluded = sum(
        sum(load["excluded"][status] for status in ("ok", "refused", "failed", "timeout"))
        for one in report["systems"].values()
        for load in one.get("loads", ())
    )
    lines.append(f"{excluded:,} requests of warm-ups and cool-downs ran beside the others, and are in no figure.")
    return Section(title="What is not in the tables", points=lines)


def _facts(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a reader must know of llama.cpp's figures, without its name in front."""
    if facts.get("adapters") is False:
        why = facts.get("no_adapters")
        yield f"has no adapters ({why}): its verdicts are the base's, and are not compared with anything."
    if facts.get("prompts_as") == "text":
        yield "is asked with texts, because its tokenizer makes other tokens than the base's."
    if facts.get("adapters_begin"):
        yield f"begins to adapt {facts['adapters_begin']} tokens later than PEFT, so its verdicts differ."
    if facts.get("labels_asked_again"):
        again = facts["labels_asked_again"]
        yield f"was asked {again:,} times more, for labels that were not among the likeliest tokens."


def _repeat(report: Mapping[str, Any]) -> Section:
    about, data = report["about"], report["data"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return Section(
        title="To repeat it",
        texts=[
            f"{versions}; commit {about['commit'] or 'unknown'}; seed {about['seed']}; data SHA-256 "
            f"`{data['sha256']}`. `report.json` has every option and every sample."
        ],
        code=about["command"],
    )
