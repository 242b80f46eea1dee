# SPDX-License-Identifier: Apache-2.0
"""From a command's options to its model: dtype, identity, placement, answering engine, reward."""

import argparse
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path, PurePath
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..evaluation.engine import Engine
from ..evaluation.forms import GAIN, Form
from ..evaluation.generation import vllm_engine
from ..frozen.cpu_dtype import faster_dtype
from ..frozen.names import load_config, load_tokenizer
from ..frozen.own_copy import resolve_device, resolve_dtype
from ..frozen.placement import place
from ..frozen.served import ServedModel, is_url
from ..rendering.messages import Prompt
from ..reporting import say
from ..rewards.endogenous import EndogenousReward
from ..rewards.residuals import split_name
from ..rewards.sentence import SentenceReward
from ..rewards.settings import SETTINGS
from ..runs.processes import processes
from ..runs.record import model_digest
from ..score_file.rows import Reward
from ..scoring.scorer import Placement
from ..sentence.configuration import SentenceRewardConfig


# Hidden size below which a model takes negligible time in any dtype, so that the CPU's speed is not measured.
NARROW = 512
LOADING = ("dtype", "device", "trust_remote_code")  # settings with which explicit reward models are loaded, too
# Settings that sentence reward models have as well.
COMMON = {"max_tokens_per_batch", "dtype", "device", "trust_remote_code", "overlong_prompt", "chat_template_kwargs"}
ENDOGENOUS = [name for name, setting in SETTINGS.items() if "score" not in setting.absent and name not in COMMON]
LATER = ("images", "model_init_kwargs", "correction")  # added after the first files of scores, which lack them


def choose_dtype(args: argparse.Namespace, *recorded: str | PurePath) -> None:
    """
    Replaces `"auto"` by a dtype for a model on a CPU: that of the run that is resumed, from the `recorded` JSON files,
    or else the faster one on this CPU. `ValueError` if `--device` cannot be used.
    """
    if args.device is not None:
        try:
            torch.empty(0, device=args.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}") from error
    state, given = processes(), args.model_init_kwargs or {}
    device = state.device if args.device is None else torch.device(args.device)
    told = args.dtype != "auto" or {"dtype", "torch_dtype", "quantization_config"} & set(given)
    if told or device.type != "cpu" or is_url(args.model):
        return
    for path in () if args.overwrite else map(Path, recorded):
        with suppress(OSError, ValueError):  # missing, or damaged, which the run reports
            settings = json.loads(path.read_bytes())
            args.dtype = settings.get("settings", settings).get("dtype", "auto")
            return
    config = load_config(args.model, args.trust_remote_code, given.get("revision"))
    if config.get_text_config().hidden_size < NARROW:
        return
    args.dtype, reason = faster_dtype()
    if state.is_main_process and not args.quiet:
        say(f"Using {args.dtype} on this CPU, as {reason}. Set --dtype to override this.")


def identity(args: argparse.Namespace, model: Placement | ServedModel | Reward) -> dict[str, Any]:
    """Settings that identify the model of `--model`: its name, version and, unless it is on a server, dtype."""
    if isinstance(model, ServedModel):
        return {"model": args.model, "model_version": model.version}
    # The current meaning of the name and of "auto", which can differ after training or on another machine.
    version = model_digest(model.config._name_or_path) or model.config._commit_hash
    dtype = str(resolve_dtype(args.dtype, resolve_device(args.device))).removeprefix("torch.")
    return {"model": args.model, "model_version": version, "dtype": dtype}


def open_model(args: argparse.Namespace, *recorded: str) -> tuple[Placement | ServedModel, dict[str, Any]]:
    """
    Places the frozen model without loading it (a served model is connected to); returns it with the settings that
    identify it. The dtype of an earlier run, in `recorded` settings, is kept.
    """
    choose_dtype(args, *recorded)
    placement = place(args.model, args.dtype, args.device, args.trust_remote_code, False, args.model_init_kwargs)
    assert placement is not None
    if isinstance(placement, ServedModel):
        placement.connect(load_tokenizer(args.tokenizer or placement.tokenizer_name, args.trust_remote_code))
    kwargs = {"model_init_kwargs": args.model_init_kwargs} if args.model_init_kwargs else {}
    return placement, identity(args, placement) | kwargs


def open_answering_model(args: argparse.Namespace) -> tuple[Engine, dict[str, Any]]:
    """
    Opens the engine of an answering model, for a run in a folder; returns it with the settings that identify the model
    and its prompts. Raises `ValueError` if it is on a server, or has no chat template for `--chat`.
    """
    if is_url(args.model):
        raise ValueError(f"--model {args.model} is on a server, but answers need a local model. Pass a path or id.")
    placement, settings = open_model(args, f"{args.output}/settings.json")
    tokenizer = load_tokenizer(placement.config._name_or_path, args.trust_remote_code)
    chat = tokenizer.chat_template is not None if args.chat is None else args.chat
    if chat and tokenizer.chat_template is None:
        raise ValueError(f"--chat needs a chat template, but the tokenizer of {args.model} has none. Remove --chat.")
    engine = Engine(placement, tokenizer, chat, max_tokens_per_batch=args.max_tokens_per_batch)
    return engine, {**settings, "chat": chat, "instruction": args.instruction}


def open_vllm(args: argparse.Namespace, engine: Engine) -> AbstractContextManager[Callable[[], Any] | None]:
    """vLLM's engine for an answering model, with `--backend vllm`."""
    if args.backend != "vllm":
        return nullcontext()
    settings = {"dtype": args.dtype, "trust_remote_code": args.trust_remote_code, **(args.vllm_kwargs or {})}
    return vllm_engine(engine.placement.config._name_or_path, **settings)


def check_template(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> None:
    """Raises `ValueError` for conversations if the tokenizer has no chat template."""
    if tokenizer.chat_template is None and any(not isinstance(prompt, str) for prompt in prompts):
        raise ValueError(
            f"{args.data} has conversations, but the tokenizer of {args.model} has no chat template. Use a chat model."
        )


def use_form(args: argparse.Namespace) -> str | None:
    """Sets `token_reward` and `aggregate` from `--form`; returns the residual."""
    if args.form is None:
        return None
    residual, base = split_name(args.form)
    for name in ("token_reward", "aggregate", "discount"):
        if getattr(args, name) != SETTINGS[name].default:
            raise ValueError(f"--form {args.form} cannot be combined with --{name.replace('_', '-')}. Remove one.")
    form = Form.parse(base)
    if form.token == GAIN:
        raise ValueError(f"--form {args.form} needs a second forward pass, which only `endotrl eval` makes.")
    args.token_reward, args.aggregate = form.rule.token_reward, form.rule.aggregate
    if form.rule.aggregate == "discounted":
        args.discount = form.rule.discount
    return residual


def make_reward(args: argparse.Namespace, *recorded: str) -> tuple[Any, dict[str, Any], bool]:
    """Returns the reward, the settings that determine its numbers, and whether it is a sentence reward model's."""
    choose_dtype(args, *recorded)
    by_sentence = not is_url(args.model) and isinstance(
        load_config(args.model, args.trust_remote_code), SentenceRewardConfig
    )
    # Numbers depend on these, but not on batches and device, which may change when a run is resumed.
    settings = {name: getattr(args, name) for name in ("chat_template_kwargs", "overlong_prompt", "dtype")}
    values = {name: getattr(args, name) for name in ENDOGENOUS}
    changed = {name for name, value in values.items() if value != SETTINGS[name].default}
    if by_sentence and (given := [*(["form"] if args.form else []), *sorted(changed)]):
        name = given[0].replace("_", "-")
        raise ValueError(f"--{name} applies to the endogenous reward, not to sentence reward models. Remove it.")
    if args.correction == "length":
        raise ValueError(
            "--correction length compares the completions of a training batch, but rows are scored one by one. "
            "Remove it."
        )
    if not by_sentence:
        settings = {name: v for name, v in values.items() if name in changed or name not in LATER} | settings
    reward: Any = (SentenceReward if by_sentence else EndogenousReward)(
        args.model,
        None if args.tokenizer is None else load_tokenizer(args.tokenizer, args.trust_remote_code),
        **settings,
        max_tokens_per_batch=args.max_tokens_per_batch,
        device=args.device,
        trust_remote_code=args.trust_remote_code,
    )
    model = reward.model if isinstance(reward, EndogenousReward) and reward.is_served else reward
    # The model first, as in earlier runs' files.
    return reward, {"model": None, "model_version": None, **settings} | identity(args, model), by_sentence
