"""Tries whether an artifact would load: does what a start does with its files, short of computing with the base."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from loraplex.adapters.base_name import ServedBase
from loraplex.bundle import Bundle, open_bundle
from loraplex.config import EngineConfig, resolve
from loraplex.errors import BundleError, ConfigurationError
from loraplex.executors.capabilities import NATIVE, PEFT, PEFT_MIXED, VLLM, Capabilities
from loraplex.inprocess import Loraplex
from loraplex.model.base_weights import BaseWeights
from loraplex.model.loader import check_weights, max_positions, read_config, read_layers
from loraplex.sagemaker.artifact.interrupts import held
from loraplex.sagemaker.artifact.layout import CODE, Layout
from loraplex.sagemaker.artifact.manifest import AdapterEntry
from loraplex.service.classifiers import ClassifierChecker, ClassifierReader
from loraplex.service.preparation import prepare
from loraplex.text.chat_template import ChatTemplate
from loraplex.text.tokenizer import Tokenizer

NAME = "model"  # the folder's name in SageMaker's containers, /opt/ml/model, which names the base there


def try_layout(layout: Layout, bundle: Bundle, tell: Callable[[str], object], *, computes: bool) -> list[AdapterEntry]:
    """Return the artifact's adapters, as they load. Raises ConfigurationError where the artifact would not load.

    bundle:    what was laid out.
    tell:      is called with each warning.
    computes:  load the base, too, and ask each adapter's golden examples."""
    with _view(layout, bundle) as root:
        found = open_bundle(root)
        assert {one.name for one in found.adapters} == {one.name for one in bundle.adapters}, (
            "the layout loses adapters"
        )
        config = resolve(EngineConfig, found.settings.engine, {})
        # The backend's library need not be installed here.
        prepare(found, config.model_copy(update={"backend": "native"}))
        capabilities = _capabilities(config)
        packs = not capabilities.other_bases
        model_config = read_config(root, packs=packs)
        layers, num_embeddings = read_layers(model_config, root, packs=packs)
        check_weights(model_config, root, packs=packs)
        chat = ChatTemplate.of(Tokenizer(root, num_embeddings))
        if chat.version != ChatTemplate.of(Tokenizer(bundle.base, num_embeddings)).version:
            raise BundleError(
                bundle.base,
                "its tokenizer reads a file that is not one of a base's usual files, so it would work differently",
                remedy="save the tokenizer there: AutoTokenizer.from_pretrained(…).save_pretrained(…)",
            )
        base = ServedBase(bundle.base)
        checker = ClassifierChecker(layers, chat, max_positions(model_config), capabilities, base)
        reader = ClassifierReader(checker, BaseWeights(root).find, 0)
        adapters = []
        for source in found.adapters:
            version, weights = reader.read(source)
            for warning in version.warnings:
                tell(f"{source.name}: {warning}")
            adapters.append(
                AdapterEntry(
                    name=source.name,
                    version=version.id,
                    kinds=tuple(sorted(weights.kinds)),
                    labels=version.labels,
                    rank=version.rank,
                )
            )
        if computes:
            with Loraplex.load(root, preload="all"):
                pass
    return adapters


def _capabilities(config: EngineConfig) -> Capabilities:
    if config.backend == "peft":
        return PEFT_MIXED if config.peft_batching == "mixed" else PEFT
    return VLLM if config.backend == "vllm" else NATIVE


@contextmanager
def _view(layout: Layout, bundle: Bundle) -> Iterator[Path]:
    """Make a folder of links that looks as the artifact will, without its code. Errors name the files behind the
    links."""
    work: TemporaryDirectory[str] | None = None
    try:
        with held():
            work = TemporaryDirectory(prefix="loraplex-pack-")
        root = Path(work.name, NAME)
        root.mkdir()
        behind = {str(root): str(bundle.root or bundle.base)}
        behind |= {str(root / one.name): str(one.path) for one in bundle.adapters}
        for member in layout.members:
            if member.name.startswith(f"{CODE}/"):
                continue
            path = root / member.name
            path.parent.mkdir(exist_ok=True)
            if isinstance(member.content, bytes):
                path.write_bytes(member.content)
            else:
                path.symlink_to(member.content.resolve())
                behind[str(path)] = str(member.content)
        try:
            yield root
        except ConfigurationError as exc:
            views = re.compile("|".join(map(re.escape, sorted(behind, key=len, reverse=True))))
            message = views.sub(lambda match: behind[match[0]], exc.message)
            source = views.sub(lambda match: behind[match[0]], exc.source)
            exc.message, exc.source = message, source
            exc.remedy = views.sub(lambda match: behind[match[0]], exc.remedy)
            raise
    finally:
        with held():
            if work is not None:
                work.cleanup()
