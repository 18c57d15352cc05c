"""Make a decision model of a base's GGUF file, so that llama.cpp's server answers typed questions with it.

    python -m benchmarks.decision_gguf IN.gguf OUT.gguf

llama.cpp serves `/v1/systemone` only from a file that says how: here as its type `openjev`, one letter for each option,
in ChatML, with the state first. The base has not been trained for it: this measures time. IN.gguf is what llama.cpp's
`convert_hf_to_gguf.py` makes; the package gguf copies it.
"""

import argparse
from pathlib import Path

from gguf import GGUFReader, GGUFValueType, GGUFWriter

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
TEMPLATE = (
    "{% set letters = '" + LETTERS + "' %}"
    "<|im_start|>user\n{{ state }}<|im_end|>\n<|im_start|>user\nQuestion about the text above: {{ instructions }}\n"
    "{% for o in options %}{{ letters[loop.index0] }}. {{ o.key }}"
    "{% if o.description %}: {{ o.description }}{% endif %}{{ '\\n' }}{% endfor %}"
    "Answer with the letter of one option.<|im_end|>\n<|im_start|>assistant\n"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    reader = GGUFReader(options.source)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(options.target, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "tokenizer.chat_template"):
            continue
        kind, *of = field.types
        writer.add_key_value(name, field.contents(), kind, of[-1] if kind == GGUFValueType.ARRAY else None)
    writer.add_string(f"{architecture}.decision.type", "openjev")
    writer.add_chat_template([{"name": "systemone", "template": TEMPLATE}])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
