# SPDX-License-Identifier: Apache-2.0
"""What can be known to go wrong before any data or weights are loaded."""

from importlib.util import find_spec

from transformers import AutoConfig, TrainingArguments
from trl import GRPOConfig, ModelConfig, RewardConfig

from ..sentence import SentenceRewardTrainerConfig


# What a tracker or a setting needs: name of the module, and what to install.
PACKAGES = {
    "wandb": "pip install 'endotrl[wandb]'",
    "tensorboard": "pip install tensorboard",
    "trackio": "pip install trackio",
    "peft": "pip install 'endotrl[peft]'",
    "vllm": "pip install 'endotrl[vllm]'",
    "deepspeed": "pip install 'endotrl[deepspeed]'",
    "wtpsplit": "pip install 'endotrl[sat]'",
    "bitsandbytes": "pip install bitsandbytes",
}


def check_packages(training_args: TrainingArguments, model_args: ModelConfig) -> None:
    """
    Raises `ImportError` if settings need a package that is not installed.

    Args:
        training_args ([`~transformers.TrainingArguments`]):
            Settings of the trainer.
        model_args ([`~trl.ModelConfig`]):
            Settings of the model.
    """
    trackers = [name for name in training_args.report_to if name in PACKAGES]
    needed = {f"report_to: {name}": name for name in trackers}
    if model_args.use_peft:
        needed["use_peft: true"] = "peft"
    if model_args.load_in_4bit or model_args.load_in_8bit:
        needed["quantization"] = "bitsandbytes"
    if isinstance(training_args, GRPOConfig) and training_args.use_vllm:
        needed["use_vllm: true"] = "vllm"
    if isinstance(training_args, SentenceRewardTrainerConfig) and training_args.segmenter != "rules":
        needed[f"segmenter: {training_args.segmenter}"] = "wtpsplit"
    for setting, package in needed.items():
        if find_spec(package) is None and not (package == "tensorboard" and find_spec("tensorboardX")):
            fallback = ", or set `report_to: none`" if package in trackers else ", or leave that setting out"
            raise ImportError(f"`{setting}` needs {package}, which is not installed: {PACKAGES[package]}{fallback}.")


def check_model(model_args: ModelConfig, training_args: GRPOConfig | RewardConfig) -> None:
    """
    Raises `ValueError` if no model is named, and `OSError` if there is none of that name.

    Args:
        model_args ([`~trl.ModelConfig`]), training_args ([`~trl.GRPOConfig`]):
            Settings.
    """
    name = model_args.model_name_or_path
    if name is None:
        raise ValueError("There is no model to train. Set `model_name_or_path`.")
    if name == "quickstart":
        return
    try:
        AutoConfig.from_pretrained(
            name, revision=model_args.model_revision, trust_remote_code=training_args.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise OSError(
            f"`model_name_or_path` is {name!r}, which is neither a folder with a model's `config.json` nor a model that the Hugging "
            f"Face hub gives. Check the name. Reason: {error}"
        ) from error
