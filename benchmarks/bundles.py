"""Random adapters for any base, to measure speed with: as many as wanted, plain or activated, of any rank.

    python -m benchmarks.bundles BASE --adapters 16 --kind alora --rank 16 --out DIR

BASE is a folder with config.json, weights and a tokenizer; its files are linked, not copied. `loraplex serve DIR` and
`loraplex bench DIR` then run. The two kinds ask the same tokens, so their speeds compare. Their answers mean nothing.
"""

import argparse
import json
from collections.abc import Collection, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from benchmarks.shapes import SHAPES, random_adapter, save_base
from loraplex.adapters.checkpoint import write_lora
from loraplex.adapters.weights import BaseLayers
from loraplex.bundle import open_bundle
from loraplex.model.loader import base_layers, build_skeleton, read_config

ALL_LINEAR = "all-linear"
QUESTIONS = (
    "Is the customer's issue solved?",
    "Is the customer angry?",
    "Does the customer ask for a refund?",
    "Is this about a delivery?",
    "Is this about a payment?",
    "Does the customer want to cancel?",
    "Did the agent ask for an address?",
    "Is the agent polite?",
)


def save_adapters(
    folder: Path,
    layers: BaseLayers,
    names: Seq[str],
    *,
    rank: int,
    targets: Collection[str] = (),
    invocation_tokens: Seq[int] = (),
    contracts: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write a random adapter for each name into a folder of its own, as PEFT does.

    targets:            last parts of the paths of the linear layers that it changes; empty for all of them.
    invocation_tokens:  makes it an activated one.
    contracts:          name -> contract. Without one, an adapter answers with its top token.
    """
    for index, name in enumerate(names):
        place = folder / name
        place.mkdir(parents=True)
        write_lora(place, random_adapter(layers, rank, index + 1, targets))
        path = place / "adapter_config.json"
        more = {"task_type": "CAUSAL_LM", "alora_invocation_tokens": list(invocation_tokens) or None}
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
        if contracts is not None:
            (place / "classifier.yaml").write_text(yaml.safe_dump(dict(contracts[name]), sort_keys=False))


def save_words_base(shape: str, folder: Path) -> BaseLayers:
    """Save a random base of a shape in float32, whose tokenizer knows the words w0, w1, …; return its layers."""
    save_base(shape, folder, torch.float32)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(SHAPES[shape]["vocab_size"])}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    return layers_of(folder)


def layers_of(base: Path) -> BaseLayers:
    return base_layers(build_skeleton(read_config(base), base))


def link_base(base: Path, folder: Path) -> None:
    """Link the files of a base, without adapters and settings that lie beside them."""
    for path in base.resolve().iterdir():
        if path.is_file() and path.name != "loraplex.yaml":
            (folder / path.name).symlink_to(path.resolve())


def invocation_of(tokenizer: Any) -> tuple[str, int] | None:
    """Return a special token that begins, ends and pads no text, and its id; None where the tokenizer has none."""
    used = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token}
    for token_id, token in sorted(tokenizer.added_tokens_decoder.items()):
        if token.special and token.content not in used:
            return token.content, token_id
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="folder with config.json, weights and a tokenizer")
    parser.add_argument("--adapters", type=int, default=16)
    parser.add_argument("--kind", choices=["lora", "alora"], default="lora")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", default=ALL_LINEAR, help="all-linear, or names of layers with commas")
    parser.add_argument("--names-from", type=Path, metavar="BUNDLE", help="name them as this bundle's, for its data")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"--out {args.out}: is there already")
    layers, names = layers_of(args.base), [f"task{index:02}" for index in range(args.adapters)]
    if args.names_from is not None:
        names = [one.name for one in open_bundle(args.names_from).adapters][: args.adapters]
    targets = () if args.targets == ALL_LINEAR else args.targets.split(",")
    known = {path.rpartition(".")[2] for path in layers.linear}
    if unknown := set(targets) - known:
        parser.error(f"--targets: the base has no {', '.join(sorted(unknown))}, but {', '.join(sorted(known))}")
    invocation = invocation_of(AutoTokenizer.from_pretrained(args.base))
    if invocation is None and args.kind == "alora":
        parser.error("--kind alora: the base's tokenizer has no special token that could activate an adapter")
    begins, token_id = invocation or ("\n\n", 0)
    contracts = {
        name: {
            "template": "{conversation}" + begins + "{question} Answer yes or no:",
            "question": QUESTIONS[index % len(QUESTIONS)],
            "labels": [" yes", " no"],
        }
        for index, name in enumerate(names)
    }
    args.out.mkdir(parents=True)
    link_base(args.base, args.out)
    save_adapters(
        args.out,
        layers,
        names,
        rank=args.rank,
        targets=targets,
        invocation_tokens=[token_id] if args.kind == "alora" else [],
        contracts=contracts,
    )
    print(f"{len(names)} adapters of rank {args.rank} ({args.kind}): loraplex serve {args.out}")


if __name__ == "__main__":
    main()
