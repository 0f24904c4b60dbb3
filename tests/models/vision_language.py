"""Small vision-language models with random weights and their processors, built without a model hub.

    net, processor = MODELS["llava"]()
    net(**processor(images=[IMAGE], text="<image> a red circle", return_tensors="pt"))

The weights are the same each time.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from models import diffusion
from models.building import build

# transformers has other image processors if torchvision is installed. These (PIL) work without it.

_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


def _tokenizer(*special: str) -> Any:
    tokenizer = diffusion.gemma_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


def llava(strategy: str = "default") -> tuple[Any, Any]:
    """16 tokens per image, 4 x 4. With strategy "full" the class token comes first."""
    tokenizer = _tokenizer("<image>")
    processor = transformers.LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=1,
    )
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_VISION, projection_dim=32),
        text_config=transformers.LlamaConfig(vocab_size=len(tokenizer), **_TEXT),
        image_token_index=processor.image_token_id,
        vision_feature_select_strategy=strategy,
    )
    return build(transformers.LlavaForConditionalGeneration, config), processor


def llava_next() -> tuple[Any, Any]:
    """The whole image, 4 x 4 tokens, then two or four tiles of 4 x 4 without padding; a token follows each line."""
    tokenizer = _tokenizer("<image>")
    tiles = [[32, 64], [64, 32], [64, 64]]
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=tiles
    )
    processor = transformers.LlavaNextProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**_VISION, projection_dim=32),
        text_config=transformers.LlamaConfig(vocab_size=len(tokenizer), **_TEXT),
        image_token_index=processor.image_token_id,
        image_grid_pinpoints=tiles,
        vision_feature_select_strategy="default",
    )
    return build(transformers.LlavaNextForConditionalGeneration, config), processor


class _WithoutVideos(transformers.Qwen2VLProcessor):
    """Its video processor needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)


def qwen2_vl_processor(tokenizer: Any) -> transformers.Qwen2VLProcessor:
    sizes = {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}
    return _WithoutVideos(Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, size=sizes), tokenizer, None)


def qwen2_vl() -> tuple[Any, Any]:
    """One token per 16 x 16 pixels of the image."""
    tokenizer = _tokenizer("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    processor = qwen2_vl_processor(tokenizer)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 8}
    config = transformers.Qwen2VLConfig(
        vision_config=vision | {"spatial_merge_size": 2, "temporal_patch_size": 2},
        text_config={"vocab_size": len(tokenizer), **_TEXT, "rope_parameters": rope},
        image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id,
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    return build(transformers.Qwen2VLForConditionalGeneration, config), processor


def idefics2() -> tuple[Any, Any]:
    """4 tokens per image, mixed by a resampler."""
    tokenizer = _tokenizer()
    images = Idefics2ImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 32}, do_image_splitting=False)
    processor = transformers.Idefics2Processor(images, tokenizer, image_seq_len=4)
    resampler = {"hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 4}
    config = transformers.Idefics2Config(
        vision_config=_VISION,
        perceiver_config=resampler | {"resampler_head_dim": 8, "num_key_value_heads": 2},
        text_config={"model_type": "mistral", "vocab_size": len(tokenizer), **_TEXT},
        image_token_id=processor.image_token_id,
    )
    return build(transformers.Idefics2ForConditionalGeneration, config), processor


def idefics3(splits: bool = True) -> tuple[Any, Any]:
    """4 tokens per tile, 2 x 2. Images are read in tiles of 32 pixels and as a whole."""
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokenizer = _tokenizer("<global-img>", *tiles)
    edges = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    processor = transformers.Idefics3Processor(
        Idefics3ImageProcessorPil(**edges, do_image_splitting=splits), tokenizer, image_seq_len=4
    )
    config = transformers.Idefics3Config(
        vision_config=_VISION,
        scale_factor=2,
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), **_TEXT},
        image_token_id=processor.image_token_id,
    )
    return build(transformers.Idefics3ForConditionalGeneration, config), processor


def paligemma() -> tuple[Any, Any]:
    """16 tokens per image, 4 x 4, before the text."""
    tokenizer = _tokenizer("<image>")
    images = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    images.image_seq_length = 16
    processor = transformers.PaliGemmaProcessor(images, tokenizer)
    config = transformers.PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", **_VISION, "projection_dim": 32, "vision_use_head": False},
        text_config={"model_type": "gemma", "vocab_size": len(tokenizer), **_TEXT, "head_dim": 8},
        projection_dim=32,
        image_token_index=processor.image_token_id,
    )
    return build(transformers.PaliGemmaForConditionalGeneration, config), processor


def gemma3() -> tuple[Any, Any]:
    """4 tokens per image, 2 x 2, of 4 patches each. The text has another token in their place."""
    tokenizer = _tokenizer("<start_of_image>", "<end_of_image>", "<image_soft_token>")
    for name, token in (("image", "<image_soft_token>"), ("boi", "<start_of_image>"), ("eoi", "<end_of_image>")):
        setattr(tokenizer, f"{name}_token", token)
        setattr(tokenizer, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
    images = Gemma3ImageProcessorPil(size={"height": 32, "width": 32}, image_seq_length=4)
    config = transformers.Gemma3Config(
        vision_config={"model_type": "siglip_vision_model", **_VISION, "vision_use_head": False},
        text_config={"vocab_size": len(tokenizer), **_TEXT, "head_dim": 8, "sliding_window": 64},
        mm_tokens_per_image=4,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
    )
    processor = transformers.Gemma3Processor(images, tokenizer, image_seq_length=4)
    net = build(transformers.Gemma3ForConditionalGeneration, config)
    projection = net.model.multi_modal_projector.mm_input_projection_weight  # made of zeros
    torch.nn.init.normal_(projection, generator=torch.Generator().manual_seed(0))
    return net, processor


MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llava": llava,
    "llava_next": llava_next,
    "qwen2_vl": qwen2_vl,
    "idefics2": idefics2,
    "idefics3": idefics3,
    "paligemma": paligemma,
    "gemma3": gemma3,
}
