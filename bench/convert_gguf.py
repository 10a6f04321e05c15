"""Makes a Hugging Face folder (safetensors, tokenizer, chat template) of a GGUF file.

For peers that cannot read GGUF: they then serve the same weights as the others, dequantized to float32.

    python bench/convert_gguf.py MODEL.gguf DIRECTORY

Needs torch, transformers, gguf and accelerate, which transformers asks for when it reads GGUF; the environment of the
peer usually has them. Takes about a minute for 135 million parameters.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def convert(gguf: Path, directory: Path) -> None:
    """Writes the folder; it must not exist yet, so that nothing of another model stays in it."""
    source, name = str(gguf.resolve().parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    if tokenizer.chat_template is None:
        raise SystemExit(f"{gguf} has no chat template; a chat endpoint could not serve it")
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    config = loaded.config
    # A model that was read from GGUF counts as quantized and cannot be saved; a fresh one of its weights can.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    model.load_state_dict(loaded.state_dict())
    directory.mkdir(parents=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="convert_gguf", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("gguf", type=Path, help="the GGUF file")
    parser.add_argument("directory", type=Path, help="where the folder is made; must not exist")
    arguments = parser.parse_args()
    if not arguments.gguf.is_file():
        parser.error(f"there is no file {arguments.gguf}")
    if arguments.directory.exists():
        parser.error(f"{arguments.directory} exists already")
    convert(arguments.gguf, arguments.directory)
    print(f"written to {arguments.directory}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
