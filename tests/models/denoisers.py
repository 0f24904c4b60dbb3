"""Small pipelines with random weights for denoisers that `models.diffusion` and `models.text_encoders` do not have.

small = DENOISERS["chroma"]
small.build()(**small.inputs(), generator=torch.Generator().manual_seed(0))
"""

from typing import Any

import diffusers
import torch
import transformers

from models import diffusion
from models.diffusion import SIDE, TOKENS, WIDTH
from models.text_encoders import TextPipeline

_SQUARE = {"height": SIDE, "width": SIDE}


def _plain_vae() -> diffusers.AutoencoderKL:
    return diffusion.vae(shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False, seed=1)


def chroma() -> diffusers.ChromaPipeline:
    """FLUX without CLIP, whose modulations come from a network of their own."""
    sizes = {"joint_attention_dim": WIDTH, "num_single_layers": 1, "in_channels": 16, "out_channels": 16}
    sizes |= {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1}
    return diffusion.quiet_pipeline(
        diffusers.ChromaPipeline,
        **diffusion.text_parts(diffusion.t5_encoder, diffusion.t5_tokenizer()),
        vae=_plain_vae(),
        transformer=diffusion.dit(
            diffusers.ChromaTransformer2DModel, **sizes, num_layers=1, axes_dims_rope=(4, 4, 8), seed=2
        ),
        scheduler=diffusion.flow_scheduler(use_dynamic_shifting=True),
    )


def aura_flow() -> diffusers.AuraFlowPipeline:
    """Eight learned tokens come before those of the text."""
    sizes = {"num_mmdit_layers": 1, "num_single_dit_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}
    sizes |= {"joint_attention_dim": WIDTH, "caption_projection_dim": WIDTH, "sample_size": SIDE // 2}
    return diffusion.quiet_pipeline(
        diffusers.AuraFlowPipeline,
        **diffusion.text_parts(diffusion.t5_encoder, diffusion.t5_tokenizer(), family="UMT5"),
        vae=diffusion.vae(seed=1),
        transformer=diffusion.model(diffusers.AuraFlowTransformer2DModel, **sizes, pos_embed_max_size=64, seed=2),
        scheduler=diffusion.flow_scheduler(),
    )


def lumina2() -> diffusers.Lumina2Pipeline:
    """Text and image are refined apart, and then joined."""
    sizes = {"hidden_size": WIDTH, "num_layers": 1, "num_refiner_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_kv_heads": 1, "multiple_of": 8, "in_channels": 4, "cap_feat_dim": WIDTH}
    return diffusion.quiet_pipeline(
        diffusers.Lumina2Pipeline,
        **diffusion.text_parts(diffusion.gemma_encoder, diffusion.gemma_tokenizer()),
        vae=_plain_vae(),
        transformer=diffusion.model(
            diffusers.Lumina2Transformer2DModel, **sizes, axes_dim_rope=(4, 4, 8), axes_lens=(300, 64, 64), seed=2
        ),
        scheduler=diffusion.flow_scheduler(),
    )


@diffusion.seeded
def bert_encoder(tokenizer: Any) -> transformers.BertModel:
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.BertModel(transformers.BertConfig(vocab_size=len(tokenizer), **sizes))


def hunyuan_dit() -> diffusers.HunyuanDiTPipeline:
    """BERT and T5 side by side."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *diffusion.WORDS]
    tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=77)
    sizes = {"hidden_size": WIDTH, "cross_attention_dim": WIDTH, "cross_attention_dim_t5": WIDTH, "patch_size": 2}
    sizes |= {"pooled_projection_dim": 16, "sample_size": 8, "activation_fn": "gelu-approximate"}
    halves = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return diffusion.quiet_pipeline(
        diffusers.HunyuanDiTPipeline,
        **diffusion.text_parts(bert_encoder, tokenizer),
        **diffusion.text_parts(diffusion.t5_encoder, diffusion.t5_tokenizer(), "_2"),
        vae=diffusion.model(diffusers.AutoencoderKL, **halves, block_out_channels=(4,) * 4, norm_num_groups=2, seed=1),
        transformer=diffusion.model(
            diffusers.HunyuanDiT2DModel,
            **sizes,
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            num_layers=2,
            use_style_cond_and_image_meta_size=False,
            seed=2,
        ),
        scheduler=diffusers.DDPMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def kandinsky_decoder() -> diffusers.KandinskyV22Pipeline:
    """Draws an embedding of an image, and reads no text."""
    blocks = {"down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D")}
    blocks |= {"up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D")}
    blocks |= {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "resnet_time_scale_shift": "scale_shift"}
    added = {"addition_embed_type": "image", "encoder_hid_dim": WIDTH, "encoder_hid_dim_type": "image_proj"}
    movq = {"block_out_channels": [32, 32], "down_block_types": ["DownEncoderBlock2D"] * 2, "latent_channels": 4}
    movq |= {"up_block_types": ["UpDecoderBlock2D"] * 2, "norm_num_groups": 4, "norm_type": "spatial"}
    movq |= {"num_vq_embeddings": 12, "vq_embed_dim": 4}
    return diffusion.quiet_pipeline(
        diffusers.KandinskyV22Pipeline,
        unet=diffusion.unet(**blocks, **added, attention_head_dim=8, in_channels=4, out_channels=8, seed=2),
        scheduler=diffusers.DDPMScheduler(variance_type="learned_range"),
        movq=diffusion.model(diffusers.VQModel, **movq, seed=1),
    )


@diffusion.seeded
def llama_encoder(tokenizer: Any) -> transformers.LlamaModel:
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2}
    return transformers.LlamaModel(transformers.LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, **sizes))


def hunyuan_video() -> diffusers.HunyuanVideoPipeline:
    """A language model whose states are refined among themselves first, and CLIP, pooled."""
    blocks = {"block_out_channels": (8,) * 4, "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
    sizes = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1}
    sizes |= {"num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 1, "rope_axes_dim": (4, 4, 8)}
    sizes |= {"text_embed_dim": WIDTH, "pooled_projection_dim": WIDTH}
    return diffusion.quiet_pipeline(
        diffusers.HunyuanVideoPipeline,
        **diffusion.text_parts(llama_encoder, diffusion.gemma_tokenizer()),
        **diffusion.text_parts(diffusion.clip_encoder, diffusion.clip_tokenizer(), "_2"),
        vae=diffusion.model(diffusers.AutoencoderKLHunyuanVideo, **blocks, seed=1),
        transformer=diffusion.model(diffusers.HunyuanVideoTransformer3DModel, **sizes, seed=2),
        scheduler=diffusion.flow_scheduler(),
    )


class EmbeddingPipeline(TextPipeline):
    """A pipeline that draws an embedding."""

    def inputs(self, **changes: Any) -> dict[str, Any]:
        """Return keyword arguments of one call, without `generator`."""
        given = super().inputs(**changes)
        del given["prompt"]
        ends = torch.randn(2, 1, WIDTH, generator=torch.Generator().manual_seed(3))
        return given | {"image_embeds": ends[0], "negative_image_embeds": ends[1]}


_TEMPLATE = {"template": "a photo of {}", "crop_start": 3}

DENOISERS = {
    "chroma": TextPipeline(chroma, {**_SQUARE, "max_sequence_length": TOKENS}),
    "aura_flow": TextPipeline(aura_flow, {**_SQUARE, "max_sequence_length": TOKENS}),
    "lumina2": TextPipeline(lumina2, {**_SQUARE, "max_sequence_length": 128, "system_prompt": "a photo of"}),
    "hunyuan_dit": TextPipeline(hunyuan_dit, {"height": 64, "width": 64, "use_resolution_binning": False}),
    "kandinsky_decoder": EmbeddingPipeline(kandinsky_decoder, {"height": 64, "width": 64}),
    "hunyuan_video": TextPipeline(
        hunyuan_video,
        {**_SQUARE, "num_frames": 9, "max_sequence_length": TOKENS, "prompt_template": _TEMPLATE},
        "frames",
    ),
}
