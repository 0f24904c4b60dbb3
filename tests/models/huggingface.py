"""Small transformers pipelines with random weights, one per task, built from configurations without a model hub.

    case = PIPELINES["image-classification"]
    case.build()(*case.args, **case.kwargs)

The weights are the same each time.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.dpt.image_processing_pil_dpt import DPTImageProcessorPil
from transformers.models.owlvit.image_processing_pil_owlvit import OwlViTImageProcessorPil
from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil

from models import diffusion, vision_language

IMAGE, TEXT = diffusion.IMAGE, "a red circle above a blue square"
SOUND = {"raw": np.sin(np.linspace(0, 300, 1600)).astype(np.float32), "sampling_rate": 16000}

_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
_VISION = {**_SIZES, "image_size": 32, "patch_size": 8}
_SPEECH = {**_SIZES, "conv_dim": (16, 16), "conv_stride": (8, 4), "conv_kernel": (16, 8), "num_feat_extract_layers": 2}
_SPEECH |= {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0}


@dataclass(frozen=True)
class TaskPipeline:
    """How to build and call a pipeline."""

    build: Callable[[], transformers.Pipeline]
    layer: str  # of its model, the path of one whose output shapes the result
    given: tuple = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    generates: bool = False

    @property
    def args(self) -> tuple:
        """Return new positional arguments for a call, since some pipelines change a dictionary that they receive."""
        return tuple(dict(value) if isinstance(value, dict) else value for value in self.given)


PIPELINES: dict[str, TaskPipeline] = {}


def _enter(task: str, layer: str, *args: Any, generates: bool = False, **kwargs: Any) -> Callable:
    """Register a function that builds the parts of a pipeline: its model, and the rest by name."""

    def enter(parts: Callable) -> Callable:
        def build() -> transformers.Pipeline:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)
                model, rest = parts()
            return transformers.pipeline(task.split("/")[0], model=model.eval(), device="cpu", **rest)

        PIPELINES[task] = TaskPipeline(build, layer, args, kwargs, generates)
        return parts

    return enter


def _tokenizer() -> Any:
    return diffusion.gemma_tokenizer()


def _bert(kind: str, **more: Any) -> Any:
    config = transformers.BertConfig(vocab_size=len(_tokenizer()), **_SIZES, max_position_embeddings=96, **more)
    return getattr(transformers, f"Bert{kind}")(config)


def _vit(kind: str, **more: Any) -> Any:
    return getattr(transformers, f"ViT{kind}")(transformers.ViTConfig(**_VISION, **more))


def _of_side(cls: type, **more: Any) -> Any:
    return cls(size={"height": 32, "width": 32}, **more)


@_enter("text-classification", "layers[1]", TEXT, top_k=None)
def text_classification():
    return _bert("ForSequenceClassification", num_labels=3), {"tokenizer": _tokenizer()}


@_enter("token-classification", "layers[1]", TEXT)
def token_classification():
    return _bert("ForTokenClassification", num_labels=3), {"tokenizer": _tokenizer()}


@_enter("fill-mask", "layers[1]", "a red <mask>")
def fill_mask():
    return _bert("ForMaskedLM"), {"tokenizer": _tokenizer()}


@_enter("feature-extraction", "layers[1]", TEXT)
def feature_extraction():
    return _bert("Model"), {"tokenizer": _tokenizer()}


@_enter("zero-shot-classification", "layers[1]", TEXT, candidate_labels=["circle", "square"])
def zero_shot_classification():
    labels = {"label2id": {"entailment": 0, "other": 1}, "id2label": {0: "entailment", 1: "other"}}
    return _bert("ForSequenceClassification", **labels), {"tokenizer": _tokenizer()}


@_enter("text-generation", "layers[1]", TEXT, generates=True, max_new_tokens=4, do_sample=False)
def text_generation():
    sizes = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 96, "bos_token_id": 2, "eos_token_id": 1}
    config = transformers.GPT2Config(vocab_size=len(_tokenizer()), pad_token_id=0, **sizes)
    return transformers.GPT2LMHeadModel(config), {"tokenizer": _tokenizer()}


@_enter("image-classification", "layers[1]", IMAGE)
def image_classification():
    return _vit("ForImageClassification", num_labels=3), {"image_processor": _of_side(ViTImageProcessorPil)}


@_enter("image-feature-extraction", "layers[1]", IMAGE)
def image_feature_extraction():
    return _vit("Model"), {"image_processor": _of_side(ViTImageProcessorPil)}


@_enter("image-segmentation", "segformer.stages[0].blocks[0]", IMAGE)
def image_segmentation():
    sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_attention_heads": [1, 2], "num_encoder_blocks": 2}
    sizes |= {"sr_ratios": [2, 1], "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2]}
    config = transformers.SegformerConfig(**sizes, decoder_hidden_size=16, num_labels=3)
    model = transformers.SegformerForSemanticSegmentation(config)
    return model, {"image_processor": _of_side(SegformerImageProcessorPil)}


@_enter("object-detection", "layers[1]", IMAGE, threshold=0.0)
def object_detection():
    sizes = {**_VISION, "image_size": [32, 32], "num_detection_tokens": 4, "num_labels": 3}
    model = transformers.YolosForObjectDetection(transformers.YolosConfig(**sizes))
    size = {"shortest_edge": 32, "longest_edge": 32}
    return model, {"image_processor": YolosImageProcessorPil(size=size)}


@_enter(
    "zero-shot-object-detection", "owlvit.vision_model.layers[1]", IMAGE, candidate_labels=["a", "the"], threshold=0.0
)
def zero_shot_object_detection():
    tokenizer = diffusion.clip_tokenizer()
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    text = {**_SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": 16, **ends}
    config = transformers.OwlViTConfig(text_config=text, vision_config=_VISION, projection_dim=32)
    model = transformers.OwlViTForObjectDetection(config)
    return model, {"tokenizer": tokenizer, "image_processor": _of_side(OwlViTImageProcessorPil)}


@_enter("zero-shot-image-classification", "vision_model.layers[1]", IMAGE, candidate_labels=["circle", "square"])
def zero_shot_image_classification():
    tokenizer = diffusion.clip_tokenizer()
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    text = {**_SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": 77, **ends}
    config = transformers.CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=16)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return transformers.CLIPModel(config), {"tokenizer": tokenizer, "image_processor": images}


@_enter("depth-estimation", "layers[1]", IMAGE)
def depth_estimation():
    sizes = {**_VISION, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "fusion_hidden_size": 16}
    sizes |= {"neck_hidden_sizes": [8, 8, 8, 8], "reassemble_factors": [2, 1, 1, 0.5], "is_hybrid": False}
    model = transformers.DPTForDepthEstimation(transformers.DPTConfig(**sizes))
    return model, {"image_processor": _of_side(DPTImageProcessorPil)}


def _letters() -> Any:
    names = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghijklmnopqrstuvwxyz"]
    with TemporaryDirectory() as folder:
        file = Path(folder, "vocab.json")
        file.write_text(json.dumps({name: number for number, name in enumerate(names)}))
        return transformers.Wav2Vec2CTCTokenizer(file)


@_enter("automatic-speech-recognition", "layers[1]", SOUND)
def speech_recognition():
    tokenizer = _letters()
    config = transformers.Wav2Vec2Config(**_SPEECH, vocab_size=len(tokenizer), pad_token_id=0)
    features = transformers.Wav2Vec2FeatureExtractor()
    return transformers.Wav2Vec2ForCTC(config), {"tokenizer": tokenizer, "feature_extractor": features}


@_enter("automatic-speech-recognition/whisper", "decoder.layers[1]", SOUND, generate_kwargs={"max_new_tokens": 4})
def whisper():
    names = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|startoftranscript|>"]
    tokenizer = transformers.WhisperTokenizer({name: number for number, name in enumerate(names)}, [])
    features = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    sizes = {"d_model": 32, "num_mel_bins": 8, "max_source_positions": 50, "max_target_positions": 32}
    for half in ("encoder", "decoder"):
        sizes |= {f"{half}_layers": 2, f"{half}_ffn_dim": 64, f"{half}_attention_heads": 4}
    end, start = tokenizer.convert_tokens_to_ids(names[-2:])
    ends = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "decoder_start_token_id": start}
    config = transformers.WhisperConfig(vocab_size=len(names), **sizes, **ends, begin_suppress_tokens=None)
    model = transformers.WhisperForConditionalGeneration(config)
    return model, {"tokenizer": tokenizer, "feature_extractor": features}


@_enter("audio-classification", "layers[1]", SOUND)
def audio_classification():
    config = transformers.Wav2Vec2Config(**_SPEECH, num_labels=3, classifier_proj_size=16)
    features = transformers.Wav2Vec2FeatureExtractor()
    return transformers.Wav2Vec2ForSequenceClassification(config), {"feature_extractor": features}


@_enter("text-to-audio", "text_encoder.encoder.layers[1]", TEXT)
def text_to_audio():
    tokenizer = _tokenizer()
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 64, "flow_size": 32, "spectrogram_bins": 9}
    sizes |= {"upsample_initial_channel": 16, "upsample_rates": [4, 2], "upsample_kernel_sizes": [8, 4]}
    sizes |= {"resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1]], "prior_encoder_num_flows": 1}
    sizes |= {"duration_predictor_num_flows": 1, "depth_separable_num_layers": 1, "prior_encoder_num_wavenet_layers": 1}
    config = transformers.VitsConfig(vocab_size=len(tokenizer), noise_scale=0.0, noise_scale_duration=0.0, **sizes)
    return transformers.VitsModel(config), {"tokenizer": tokenizer}


@_enter("image-text-to-text", "layers[1]", generates=True, images=IMAGE, text="<image> a red circle", max_new_tokens=4)
def image_text_to_text():
    model, processor = vision_language.llava()
    return model, {"processor": processor}
