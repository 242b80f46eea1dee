# SPDX-License-Identifier: Apache-2.0
"""Tiny random models that read images, of several families, with processors that need no torchvision."""

import io
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
KINDS = {  # by the beginning of a family's name: its special tokens by their roles, and what the template writes
    "llava": ({"image_token": "<image>"}, "<image>"),
    "gemma3": (
        {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
        "<start_of_image>",
    ),
    "qwen": (
        {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
        "<|vision_start|><|image_pad|><|vision_end|>",
    ),
    "idefics3": (
        {"image_token": "<image>", "fake_image_token": "<fake_token_around_image>"}
        | {"global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>"},
        "<image>",
    ),
}
KINDS["smolvlm"] = KINDS["idefics3"]
TEXT = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "max_position_embeddings": 512}
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION |= {"image_size": 16, "patch_size": 8}
CLASSES = {"llava": "Llava", "llava_next": "LlavaNext", "idefics3": "Idefics3", "smolvlm": "SmolVLM"}
CLASSES |= {"gemma3": "Gemma3", "qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}
CLASSES |= {"qwen3_5": "Qwen3_5", "qwen3_5_moe": "Qwen3_5Moe"}
FAMILIES = list(CLASSES)
PINS = [[16, 32], [32, 16], [32, 32]]


def picture(seed: int, width: int = 16, height: int = 16) -> Image.Image:
    """A picture of random colours."""
    values = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(values.numpy())


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return buffer.getvalue()


def kind_of(family: str) -> str:
    return next(kind for kind in KINDS if family.startswith(kind))


def make_tokenizer(path: str, family: str) -> PreTrainedTokenizerBase:
    """The byte-level tokenizer of `path` with the special tokens of a family."""
    kind = kind_of(family)
    tokens = [*KINDS[kind][0].values()]
    if kind == "qwen":
        tokens = ["<|vision_start|>", "<|vision_end|>", *tokens]
    if kind in ("idefics3", "smolvlm"):  # four rows and columns at most
        tokens += [f"<row_{i}_col_{j}>" for i in range(1, 5) for j in range(1, 5)]
    tokenizer = AutoTokenizer.from_pretrained(path, extra_special_tokens=KINDS[kind][0])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", *tokens]})
    tokenizer.chat_template = None
    return tokenizer


def make_processor(tokenizer: PreTrainedTokenizerBase, family: str) -> ProcessorMixin:
    kind = kind_of(family)
    template = TEMPLATE.replace("IMAGE", KINDS[kind][1])
    shape = {"height": 16, "width": 16}
    if kind == "llava":
        images: Any = hf.CLIPImageProcessorPil(size=shape, crop_size=shape)
        if family == "llava_next":
            images = hf.LlavaNextImageProcessorPil(
                size={"shortest_edge": 16}, crop_size=shape, image_grid_pinpoints=PINS
            )
        settings = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        make = hf.LlavaProcessor if family == "llava" else hf.LlavaNextProcessor
        return make(images, tokenizer, chat_template=template, **settings)
    if kind in ("idefics3", "smolvlm"):
        images = hf.Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
        return hf.Idefics3Processor(images, tokenizer, image_seq_len=1, chat_template=template)
    if kind == "gemma3":
        images = hf.Gemma3ImageProcessorPil(size=shape, image_seq_length=4)
        return hf.Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=4)
    images = hf.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 1024})
    name = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor"}.get(family, "Qwen3VLProcessor")

    class WithoutVideos(getattr(hf, name)):  # type: ignore[misc]
        """Processors of videos need torchvision, and the check of what is one needs it too."""

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return None

    return WithoutVideos(images, tokenizer, None, chat_template=template)


def make_model(tokenizer: PreTrainedTokenizerBase, family: str) -> PreTrainedModel:
    def token_id(token: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(token))  # type: ignore[arg-type]

    torch.manual_seed(0)
    kind = kind_of(family)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    text = {"vocab_size": len(tokenizer), **TEXT, **ids}
    places: dict[str, Any] = {**ids, "vision_config": VISION, "text_config": {"model_type": "llama", **text}}
    if kind == "llava":
        places |= {"vision_config": hf.CLIPVisionConfig(projection_dim=16, **VISION)}
        places |= {"text_config": hf.LlamaConfig(**text), "image_token_index": token_id("<image>")}
        places |= {"image_grid_pinpoints": PINS} if family == "llava_next" else {}
    elif kind in ("idefics3", "smolvlm"):
        places |= {"image_token_id": token_id("<image>"), "scale_factor": 2}
    elif kind == "gemma3":
        places |= {"text_config": {**text, "head_dim": 8, "sliding_window": 16}, "mm_tokens_per_image": 4}
        places |= {"image_token_index": token_id("<image_soft_token>")}
        places |= {f"{end}_token_index": token_id(KINDS[kind][0][f"{end}_token"]) for end in ("boi", "eoi")}
    else:
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
        if family.startswith("qwen3"):
            rope["mrope_interleaved"] = True
        if family.startswith("qwen3_5"):
            rope["partial_rotary_factor"] = 1.0
            text |= {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2}
            text |= {"linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
        if family == "qwen3_5_moe":
            text |= {"num_experts": 4, "num_experts_per_tok": 2}
            text |= {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
        for name in ("image_pad", "video_pad", "vision_start", "vision_end"):
            places[f"{name.removesuffix('_pad')}_token_id"] = token_id(f"<|{name}|>")
        tower: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
        if family == "qwen2_vl":
            tower |= {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
        else:
            tower |= {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 16}
            tower |= (
                {"fullatt_block_indexes": [1], "window_size": 16}
                if family == "qwen2_5_vl"
                else {"num_position_embeddings": 16}
            )
        if family == "qwen3_vl":
            tower["deepstack_visual_indexes"] = [0]
        places |= {"text_config": {**text, "rope_parameters": rope, "head_dim": 8}, "vision_config": tower}
    name = CLASSES[family]
    model: Any = getattr(hf, f"{name}ForConditionalGeneration")(getattr(hf, f"{name}Config")(**places))
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
