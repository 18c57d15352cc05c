"""Fast paths against the reference, and the reference against a loop that anybody can read."""

import dataclasses
import math
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from loraplex.ops import attention, reference
from loraplex.ops import layout as layout_module
from loraplex.ops.layout import Layout, Span, layout_of
from loraplex.ops.staging import Staging

CPU = torch.device("cpu")
STAGING = Staging(CPU)
CACHED = torch.tensor([5, 4, 9, 10, 11])  # in any order of slots
ALONE = [(0, 1), (1, 8), (8, 28), (28, 32)]
# A tree: two children of a run that itself follows cached tokens, a grandchild, a second child of the cached tokens,
# and a text by itself.
TREE = (
    Span(start=0, end=7, position=5, cached=CACHED),
    Span(start=7, end=10),
    Span(start=10, end=14, position=12, cached=CACHED, ancestors=((0, 7),)),
    Span(start=14, end=15, position=12, cached=CACHED, ancestors=((0, 7),)),
    Span(start=15, end=21, position=16, cached=CACHED, ancestors=((0, 7), (10, 14))),
    Span(start=21, end=32, position=5, cached=CACHED),
)
LAST = tuple(dataclasses.replace(span, row=row) for row, span in enumerate(TREE))


def long(spans: tuple[Span, ...], padding: Iterable[tuple[int, int]] = ()) -> Layout:
    """As if they were too many tokens to be grouped."""
    with mock.patch.object(layout_module, "SHORT_SPAN", 0):
        return layout_of(spans, STAGING, padding)


LAYOUTS = {
    "alone": layout_of(tuple(Span(start=start, end=end) for start, end in ALONE), STAGING),
    "tree": layout_of(TREE, STAGING),
    "long tree": long(TREE),
}


def random_inputs(heads: int, kv_heads: int) -> tuple[torch.Tensor, ...]:
    """Query, key, value of 32 packed tokens, and a cache of 12 slots."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(32, heads, 8), (32, kv_heads, 8), (32, kv_heads, 8), (12, kv_heads, 8), (12, kv_heads, 8)]
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("window", [None, 1, 5, 20])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_equals_the_reference(
    heads: tuple[int, int], window: int | None, softcap: float | None, layout: str
) -> None:
    query, key, value, *cache = random_inputs(*heads)
    settings: dict[str, Any] = dict(scaling=0.3, window=window, softcap=softcap, cache=tuple(cache))
    expected = reference.packed_attention(query, key, value, LAYOUTS[layout], **settings)
    actual = attention.packed_attention(query, key, value, LAYOUTS[layout], **settings)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("layout", ["alone", "tree"])
def test_a_sink_is_a_key_that_all_see_with_that_score_and_a_value_of_zero(layout: str, window: int | None) -> None:
    query, key, value, *cache = random_inputs(4, 4)
    sinks = torch.randn(4)
    settings: dict[str, Any] = dict(scaling=0.3, window=window, cache=tuple(cache))
    actual = attention.packed_attention(query, key, value, LAYOUTS[layout], sinks=sinks, **settings)
    for span in LAYOUTS[layout].spans:
        for row in range(*span.queries):
            k, v = (reference.seen_by(span, *pair) for pair in zip((key, value), cache, strict=True))
            end = len(k) - (span.end - row) + 1
            seen = slice(max(0, end - (window or end)), end)
            scores = torch.einsum("hd,jhd->hj", query[row], k[seen]) * 0.3
            shares = torch.cat((sinks[:, None], scores), dim=1).softmax(dim=1)[:, 1:]
            torch.testing.assert_close(actual[row], torch.einsum("hj,jhd->hd", shares, v[seen]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grouped", [True, False])
def test_where_only_the_last_tokens_ask_each_sees_the_same(grouped: bool) -> None:
    query, key, value, *cache = random_inputs(4, 2)
    settings: dict[str, Any] = dict(scaling=0.3, cache=tuple(cache))
    everything = reference.packed_attention(query, key, value, LAYOUTS["tree"], **settings)
    last = [span.end - 1 for span in TREE]
    layout = layout_of(LAST, STAGING) if grouped else long(LAST)
    actual = attention.packed_attention(query[last], key, value, layout, **settings)
    torch.testing.assert_close(actual, everything[last], atol=1e-5, rtol=1e-5)


def varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What torch.nn.attention.varlen documents, on a CPU. No sequence may be longer than what is said."""
    assert enable_gqa == (query.shape[1] != key.shape[1]) and return_aux.lse
    assert [int(ends[-1]) for ends in (cu_seq_q, cu_seq_k)] == [len(query), len(key)]
    outputs, lses = [], []
    for q, k, v in zip(
        query.split(cu_seq_q.diff().tolist()),
        *(x.split(cu_seq_k.diff().tolist()) for x in (key, value)),
        strict=True,
    ):
        assert len(q) <= max_q and len(k) <= max_k
        is_causal = window_size == (-1, 0)
        output, lse = attention._attend_plain(q, k, v, is_causal=is_causal, scaling=scale)
        outputs.append(output)
        lses.append(lse)
    return torch.cat(outputs), torch.cat(lses)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("spans", ["tree", "last", "padding"])
def test_as_cuda_computes_it_attention_equals_the_reference(spans: str, heads: tuple[int, int]) -> None:
    """The calls that are made there, with a stand-in for its kernel: `tests/gpu` has the kernel."""
    query, key, value, *cache = random_inputs(*heads)
    settings: dict[str, Any] = dict(scaling=0.3, cache=tuple(cache))
    layout, rows = {
        "tree": (long(TREE), list(range(32))),
        "last": (long(LAST), [span.end - 1 for span in TREE]),
        "padding": (long(TREE[:4] + TREE[5:], [(15, 21)]), [*range(15), *range(21, 32)]),
    }[spans]
    expected = reference.packed_attention(query, key, value, LAYOUTS["tree"], **settings)
    with (
        mock.patch.object(attention, "_takes_varlen", lambda query: True),
        mock.patch("torch.nn.attention.varlen.varlen_attn", varlen_attn),
    ):
        asked = query[rows] if spans == "last" else query
        actual = attention.packed_attention(asked, key, value, layout, **settings)
    actual = actual if spans == "last" else actual[rows]
    torch.testing.assert_close(actual, expected[rows], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "capability", "kernel"),
    [
        (torch.bfloat16, 128, (8, 0), "varlen"),
        (torch.bfloat16, 256, (9, 0), "varlen"),
        (torch.bfloat16, 264, (9, 0), "efficient"),  # FlashAttention's largest head is 256
        (torch.bfloat16, 40, (8, 0), "varlen"),
        (torch.bfloat16, 36, (8, 0), "plain"),  # its rows are no multiple of 16 bytes
        (torch.float16, 128, (7, 5), "efficient"),  # FlashAttention's kernels need Ampere
        (torch.float32, 128, (8, 0), "efficient"),
        (torch.float32, 36, (8, 0), "efficient"),
        (torch.float32, 34, (8, 0), "plain"),
    ],
)
def test_on_cuda_the_kernel_is_one_that_takes_the_query(
    dtype: torch.dtype, head_dim: int, capability: tuple[int, int], kernel: str
) -> None:
    query: Any = SimpleNamespace(is_cuda=True, shape=(3, 4, head_dim), dtype=dtype, device="cuda:0")
    chosen = {f"_attend_{name}": mock.Mock(return_value=name) for name in ("varlen", "efficient", "plain")}
    with (
        mock.patch.multiple(attention, **chosen),
        mock.patch.object(attention, "_compute_capability", lambda device: capability),
    ):
        found: Any = attention._attend(query, query, query, mock.Mock(), is_causal=False, scaling=1.0)
    assert found == kernel


def efficient_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_bias: None,
    compute_log_sumexp: bool,
    dropout_p: float,
    is_causal: bool,
    *,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The memory-efficient kernel on a CPU: [1, heads, n, D], as many key heads as query heads, and a log-sum-exp whose
    rows are padded to a multiple of 32."""
    assert query.shape[1] == key.shape[1] == value.shape[1] and compute_log_sumexp and dropout_p == 0
    assert not is_causal or query.shape[2] == key.shape[2]
    scores = query @ key.mT * scale
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[2:], dtype=torch.bool).tril(), float("-inf"))
    lse = torch.nn.functional.pad(scores.logsumexp(-1), (0, -query.shape[2] % 32), value=float("nan"))
    return scores.softmax(-1) @ value, lse, torch.empty(0), torch.empty(0)


@pytest.mark.parametrize(("num_queries", "num_keys", "is_causal"), [(5, 5, True), (5, 9, False), (32, 32, True)])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_the_memory_efficient_kernel_is_called_as_it_documents(
    heads: tuple[int, int], num_queries: int, num_keys: int, is_causal: bool
) -> None:
    torch.manual_seed(0)
    query = torch.randn(num_queries, heads[0], 8)
    key, value = torch.randn(2, num_keys, heads[1], 8)
    expected = attention._attend_plain(query, key, value, is_causal=is_causal, scaling=0.3)
    with mock.patch.object(torch.ops.aten, "_scaled_dot_product_efficient_attention", efficient_attention):
        actual = attention._attend_efficient(query, key, value, is_causal=is_causal, scaling=0.3)
    torch.testing.assert_close(actual, expected)


def test_what_long_spans_share_is_attended_to_in_one_call_each() -> None:
    contexts = LAYOUTS["long tree"].contexts
    assert [(context.start, context.end, context.cached is CACHED) for context in contexts] == [
        (0, 0, True),
        (0, 7, False),
        (10, 14, False),
    ]
    assert contexts[1].rows == slice(10, 21)
    assert isinstance(contexts[0].rows, torch.Tensor)
    assert contexts[0].rows.tolist() == [*range(0, 7), *range(10, 32)]


def test_short_spans_that_see_the_same_attend_in_one_call() -> None:
    tree = LAYOUTS["tree"]
    keys = [group.keys for group in tree.groups]
    assert keys == [((0, 7), (21, 32)), ((0, 7), (10, 15)), ((0, 7), (10, 14), (15, 21))]
    assert isinstance(tree.groups[0].rows, torch.Tensor)
    assert tree.groups[0].rows.tolist() == [*range(0, 7), *range(21, 32)]
    assert tree.groups[1].rows == slice(10, 15)
    assert [span.start for span in tree.alone] == [7]
    many = layout_of(tuple(Span(start=60 * i, end=60 * i + 60) for i in range(9)), STAGING)
    assert [group.keys for group in many.groups] == [((0, 240),), ((240, 480),)]
    assert [span.start for span in many.alone] == [480]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_reference_is_causal_attention_with_a_window_and_a_softcap(layout: str) -> None:
    query, key, value, cached_key, cached_value = random_inputs(2, 1)
    actual = reference.packed_attention(
        query, key, value, LAYOUTS[layout], cache=(cached_key, cached_value), scaling=0.3, window=3, softcap=1.5
    )
    for span in LAYOUTS[layout].spans:
        for i in range(span.start, span.end):
            seen = [] if span.cached is None else [(cached_key[j, 0], cached_value[j, 0]) for j in span.cached.tolist()]
            for start, end in (*span.ancestors, (span.start, i + 1)):
                seen += [(key[j, 0], value[j, 0]) for j in range(start, end)]
            for head in range(2):
                scores = [1.5 * math.tanh(float(query[i, head] @ k) * 0.3 / 1.5) for k, _ in seen[-3:]]
                weights = torch.tensor(scores).softmax(0)
                expected = sum(weight * v for weight, (_, v) in zip(weights, seen[-3:], strict=True))
                torch.testing.assert_close(actual[i, head], expected)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 3])
def test_padding_changes_nothing_and_comes_out_finite(window: int | None, softcap: float | None) -> None:
    query, key, value, cached_key, cached_value = random_inputs(2, 1)
    kept, padding = (0, 15), (15, 21)
    spans = (*(span for span in TREE if span.end <= kept[1]), TREE[-1])
    options: dict[str, Any] = {
        "cache": (cached_key, cached_value), "scaling": 0.3, "window": window, "softcap": softcap
    }  # fmt: skip
    expected = reference.packed_attention(query, key, value, layout_of(TREE, STAGING), **options)
    for one in (query, key, value):
        one[slice(*padding)] = 0
    layout = layout_of(spans, STAGING, [padding])
    assert layout.varlen.cu_queries.tolist() == layout.varlen.cu_keys.tolist() == [0, 7, 10, 14, 15, 21, 32]
    for attend in (attention.packed_attention, reference.packed_attention):
        actual = attend(query, key, value, layout, **options)
        torch.testing.assert_close(actual[:15], expected[:15])
        torch.testing.assert_close(actual[21:], expected[21:])
        assert not actual[slice(*padding)].any()
