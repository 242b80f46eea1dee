# SPDX-License-Identifier: Apache-2.0
"""Tiny random models that read images, of several families, with processors that need no torchvision."""

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin


TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What the template writes for an image, by family.
MARKS = {
    "llava": "<image>",
    "llava_next": "<image>",
    "idefics3": "<image>",
    "smolvlm": "<image>",
    "gemma3": "<start_of_image>",
    "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_5": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_5_moe": "<|vision_start|><|image_pad|><|vision_end|>",
}
FAMILIES = list(MARKS)
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def picture(seed: int, width: int = 16, height: int = 16) -> Image.Image:
    """A picture of random colours."""
    values = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(values.numpy())


def make_tokenizer(path: str, family: str) -> PreTrainedTokenizerBase:
    """The byte-level tokenizer of `path` with the special tokens of a family."""
    own = {
        "gemma3": ["<start_of_image>", "<end_of_image>", "<image_soft_token>"],
        "qwen": ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"],
        "idefics3": ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"],
    }
    tokens = own.get("qwen" if "qwen" in family else "idefics3" if family == "smolvlm" else family, ["<image>"])
    extra: dict[str, Any] = {"image_token": next(token for token in tokens if "image" in token)}
    if family == "gemma3":
        extra = {
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        }
    if "qwen" in family:
        extra = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    if family in ("idefics3", "smolvlm"):
        extra = {
            "image_token": "<image>",
            "fake_image_token": "<fake_token_around_image>",
            "global_image_token": "<global-img>",
            "end_of_utterance_token": "<end_of_utterance>",
        }
        # Four rows and columns at most.
        tokens = [*tokens, *(f"<row_{i}_col_{j}>" for i in range(1, 5) for j in range(1, 5))]
    tokenizer = AutoTokenizer.from_pretrained(path, extra_special_tokens=extra)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *tokens]})
    tokenizer.chat_template = None
    return tokenizer


def make_processor(tokenizer: PreTrainedTokenizerBase, family: str) -> ProcessorMixin:
    template = TEMPLATE.replace("IMAGE", MARKS[family])
    shape = {"height": 16, "width": 16}
    if family == "llava":
        images = hf.CLIPImageProcessorPil(size=shape, crop_size=shape)
        return hf.LlavaProcessor(
            images,
            tokenizer,
            patch_size=8,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=template,
        )
    if family == "llava_next":
        pins = [[16, 32], [32, 16], [32, 32]]
        images = hf.LlavaNextImageProcessorPil(size={"shortest_edge": 16}, crop_size=shape, image_grid_pinpoints=pins)
        return hf.LlavaNextProcessor(
            images,
            tokenizer,
            patch_size=8,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=template,
        )
    if family in ("idefics3", "smolvlm"):
        images = hf.Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
        return hf.Idefics3Processor(images, tokenizer, image_seq_len=1, chat_template=template)
    if family == "gemma3":
        images = hf.Gemma3ImageProcessorPil(size=shape, image_seq_length=4)
        return hf.Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=4)
    images = hf.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 1024})
    kind = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor"}.get(family, "Qwen3VLProcessor")

    class WithoutVideos(getattr(hf, kind)):  # type: ignore[misc]
        """Processors of videos need torchvision, and the check of what is one needs it too."""

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return None

    return WithoutVideos(images, tokenizer, None, chat_template=template)


def make_model(tokenizer: PreTrainedTokenizerBase, family: str) -> PreTrainedModel:
    def token_id(token: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(token))  # type: ignore[arg-type]

    torch.manual_seed(0)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    text = {"vocab_size": len(tokenizer), **TEXT, **ids}
    if family in ("llava", "llava_next"):
        clip = hf.CLIPVisionConfig(projection_dim=16, **VISION)
        llama = hf.LlamaConfig(**text)
        if family == "llava":
            model: Any = hf.LlavaForConditionalGeneration(
                hf.LlavaConfig(vision_config=clip, text_config=llama, image_token_index=token_id("<image>"), **ids)
            )
        else:
            model = hf.LlavaNextForConditionalGeneration(
                hf.LlavaNextConfig(
                    vision_config=clip,
                    text_config=llama,
                    image_token_index=token_id("<image>"),
                    image_grid_pinpoints=[[16, 32], [32, 16], [32, 32]],
                    **ids,
                )
            )
    elif family in ("idefics3", "smolvlm"):
        config, kind = (
            (hf.Idefics3Config, hf.Idefics3ForConditionalGeneration)
            if family == "idefics3"
            else (hf.SmolVLMConfig, hf.SmolVLMForConditionalGeneration)
        )
        model = kind(
            config(
                vision_config=VISION,
                text_config={"model_type": "llama", **text},
                image_token_id=token_id("<image>"),
                scale_factor=2,
                **ids,
            )
        )
    elif family == "gemma3":
        model = hf.Gemma3ForConditionalGeneration(
            hf.Gemma3Config(
                text_config={**text, "head_dim": 8, "sliding_window": 16},
                vision_config=VISION,
                mm_tokens_per_image=4,
                image_token_index=token_id("<image_soft_token>"),
                boi_token_index=token_id("<start_of_image>"),
                eoi_token_index=token_id("<end_of_image>"),
                **ids,
            )
        )
    else:
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
        if family.startswith("qwen3"):
            rope["mrope_interleaved"] = True
        if family.startswith("qwen3_5"):
            rope["partial_rotary_factor"] = 1.0
            text |= {
                "layer_types": ["linear_attention", "full_attention"],
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 8,
            }
        if family == "qwen3_5_moe":
            text |= {"num_experts": 4, "num_experts_per_tok": 2}
            text |= {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
        places = {
            "image_token_id": token_id("<|image_pad|>"),
            "video_token_id": token_id("<|video_pad|>"),
            "vision_start_token_id": token_id("<|vision_start|>"),
            "vision_end_token_id": token_id("<|vision_end|>"),
        }
        tower: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
        if family == "qwen2_vl":
            tower |= {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
        elif family == "qwen2_5_vl":
            tower |= {
                "hidden_size": 16,
                "out_hidden_size": 32,
                "intermediate_size": 16,
                "fullatt_block_indexes": [1],
                "window_size": 16,
            }
        else:
            tower |= {
                "hidden_size": 16,
                "out_hidden_size": 32,
                "intermediate_size": 16,
                "num_position_embeddings": 16,
            }
        if family == "qwen3_vl":
            tower["deepstack_visual_indexes"] = [0]
        names = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}
        names |= {"qwen3_5": "Qwen3_5", "qwen3_5_moe": "Qwen3_5Moe"}
        config = getattr(hf, names[family] + "Config")(
            text_config={**text, "rope_parameters": rope, "head_dim": 8}, vision_config=tower, **places, **ids
        )
        model = getattr(hf, names[family] + "ForConditionalGeneration")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15)  # as far from uniform as trained models are, and images do count
    return model.eval()


def save_vision_model(family: str, tokenizer_path: str, folder: str | Path) -> str:
    tokenizer = make_tokenizer(tokenizer_path, family)
    make_model(tokenizer, family).save_pretrained(folder)
    make_processor(tokenizer, family).save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def reference_log_prob(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    prompt: list[dict[str, Any]],
    pictures: list[Image.Image],
    completion_ids: list[int],
) -> Tensor:
    """Log-probabilities of the tokens of a completion, of shape `(T,)`: this row alone, all logits, float32."""
    text = processor.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=[pictures] if pictures else None, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([completion_ids])], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for key in ("token_type_ids", "mm_token_type_ids"):
        if key in inputs:
            inputs[key] = torch.cat([inputs[key], torch.zeros(1, len(completion_ids)).long()], dim=1)
    logits = model(**inputs, use_cache=False).logits.float()
    log_probs = logits[0, length - 1 : -1].log_softmax(-1)
    return log_probs.gather(1, torch.tensor(completion_ids)[:, None]).squeeze(1)
