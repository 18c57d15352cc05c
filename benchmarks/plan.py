"""The error of `loraplex plan`: bundles of several sizes, planned, then loaded and asked in a process of their own.

    python -m benchmarks.plan --bundle examples/support_desk/bundle --out build/plan

Each bundle is loaded in float32 and in bfloat16. Beside those that are given there are random ones, made on the spot:
bases of 30 M, 116 M and 350 M parameters with adapters of rank 8, 16 and 64 on all linear layers.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from benchmarks.bundles import save_adapters, save_words_base
from loraplex.cli.plan_measure import KV_CACHE, mean_text, measure_apart
from loraplex.measuring.about import about
from loraplex.measuring.files import write_report
from loraplex.planning.asked import read_asked
from loraplex.planning.report import MEASURED

MADE = (("30M", 8, 16), ("116M", 16, 16), ("350M", 64, 4))  # shape, rank, adapters


def compare(bundle: Path, dtype: str) -> dict[str, Any]:
    """Return planned and measured bytes of each part."""
    text = Tokenizer.from_file(str(bundle / "tokenizer.json")).encode(mean_text())
    asked = read_asked(bundle=str(bundle), dtype=dtype, kv_cache=KV_CACHE, conversation_tokens=len(text.ids))
    planned = {line.name: line.expected for line in asked.plan.lines}
    planned["total"] = asked.plan.total(None)
    measured = measure_apart(str(bundle), dtype)
    parts = {
        name: {"planned": sum(planned[line] for line in lines), "measured": measured[name]}
        for name, lines in MEASURED.items()
    }
    total = parts["total"]
    return {
        "base": asked.name,
        "parameters": asked.plan.base.sizes.num_weights,
        "adapters": len(asked.plan.adapters),
        "rank": max(one.rank for one in asked.plan.adapters),
        "dtype": dtype,
        "parts": parts,
        "error": total["planned"] / total["measured"] - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", action="append", type=Path, default=[], help="a bundle that is there; repeatable")
    parser.add_argument("--made", nargs="*", default=[shape for shape, _, _ in MADE], help="shapes of random bundles")
    parser.add_argument("--dtype", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--out", type=Path, help="folder for report.json")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="loraplex-plan-") as root:
        bundles = list(args.bundle)
        for shape, rank, num_adapters in MADE:
            if shape in args.made:
                bundles.append(Path(root) / shape)
                layers = save_words_base(shape, bundles[-1])
                save_adapters(bundles[-1], layers, [f"a{index:02}" for index in range(num_adapters)], rank=rank)
        for bundle in bundles:
            for dtype in args.dtype:
                rows.append(compare(bundle, dtype))
                show(rows[-1:])
    show(rows)
    if args.out is not None:
        head = about(torch.device("cpu"))
        write_report(args.out / "report.json", {"format": 1, "kind": "plan", "about": head, "bundles": rows})


def show(rows: list[dict[str, Any]]) -> None:
    """Print planned / measured MB of each part."""
    table = Table("parameters", "adapters", "dtype", *MEASURED, "error", box=None)
    for row in rows:
        parts = [f"{one['planned'] / 1e6:,.0f} / {one['measured'] / 1e6:,.0f}" for one in row["parts"].values()]
        shape = f"{row['parameters'] / 1e6:,.0f} M", f"{row['adapters']} of rank {row['rank']}"
        table.add_row(*shape, row["dtype"], *parts, f"{row['error']:+.1%}")
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
