"""Keyword arguments of the wrappers that nothing takes are errors, before anything is loaded."""

import functools
import inspect

import diffusers
import pytest
import torch
import transformers

from diffsight import DiffusionModel, HFPipeline, LanguageModel, VisionLanguageModel
from diffsight.compat import DiffusionModel as CompatDiffusionModel
from diffsight.pipelines.loading_arguments import check_model_arguments, check_modular_arguments
from helpers import refusal

CLIP = "diffsight/shapes-clip"


@pytest.fixture
def nothing_loads(monkeypatch):
    def load(*args, **kwargs):
        raise AssertionError("something was loaded")

    kinds = (diffusers.DiffusionPipeline, transformers.PreTrainedModel, transformers.AutoTokenizer)
    for kind in (*kinds, transformers.AutoProcessor):
        original = inspect.unwrap(kind.from_pretrained.__func__)  # its source is read
        monkeypatch.setattr(kind, "from_pretrained", classmethod(functools.wraps(original)(load)))
    monkeypatch.setattr(transformers, "pipeline", functools.wraps(transformers.pipeline)(load))


@pytest.mark.parametrize(
    "name, near",
    [("bananas", ""), ("torch_type", "'torch_dtype'"), ("text_encodr", "'text_encoder'"), ("dispach", "'dispatch'")],
)
@pytest.mark.parametrize("dispatch", [False, True])
def test_pipelines_of_diffusers(name, near, dispatch, nothing_loads):
    message = refusal(DiffusionModel, CLIP, dispatch=dispatch, **{name: 3})
    assert f"has no argument {name!r}" in message and near in message


@pytest.mark.parametrize("wrapper", [LanguageModel, VisionLanguageModel])
@pytest.mark.parametrize(
    "name, near",
    [("bananas", ""), ("torch_type", "'torch_dtype'"), ("n_layers", "'n_layer'"), ("dispach", "'dispatch'")],
)
def test_models_of_transformers(saved_gpt2, wrapper, name, near, nothing_loads):
    message = refusal(wrapper, saved_gpt2, **{name: 3})
    assert f"has no argument {name!r}" in message and near in message


@pytest.mark.parametrize(
    "task, name, near",
    [
        ("text-generation", "bananas", ""),
        ("text-generation", "max_new_token", "'max_new_tokens'"),
        ("text-classification", "topk", "'top_k'"),
        ("feature-extraction", "model_kwarg", "'model_kwargs'"),
    ],
)
def test_pipelines_of_transformers(saved_gpt2, task, name, near, nothing_loads):
    message = refusal(HFPipeline, task, model=str(saved_gpt2), **{name: 3})
    assert f"has no argument {name!r}" in message and near in message


def test_an_option_of_another_pipeline(saved_gpt2):
    message = refusal(HFPipeline, "feature-extraction", model=str(saved_gpt2), return_offsets_mapping=True)
    assert "FeatureExtractionPipeline has no argument 'return_offsets_mapping'" in message


def test_what_is_taken(saved_gpt2):
    given = {"torch_dtype": torch.float64, "low_cpu_mem_usage": True, "use_safetensors": True}
    model = DiffusionModel(CLIP, safety_checker=None, requires_safety_checker=False, **given)
    assert model.pipeline.unet.dtype == torch.float64 and not model.pipeline.config.requires_safety_checker
    model = LanguageModel(saved_gpt2, output_attentions=True, attn_implementation="eager", use_cache=False, **given)
    assert model.module.dtype == torch.float64 and model.module.config.output_attentions
    config = transformers.AutoConfig.from_pretrained(saved_gpt2)
    assert (
        LanguageModel(saved_gpt2, config=config, attn_implementation="eager").module.config._attn_implementation
        == "eager"
    )
    options = {"max_new_tokens": 2, "do_sample": False, "return_full_text": False, "attention_mask": None}
    writer = HFPipeline("text-generation", model=str(saved_gpt2), batch_size=2, dtype=torch.float64, **options)
    assert writer.pipeline.model.dtype == torch.float64


def test_a_configuration_that_is_passed_is_not_changed(saved_gpt2, nothing_loads):
    config = transformers.AutoConfig.from_pretrained(saved_gpt2)
    assert "has no argument 'n_layer'" in refusal(LanguageModel, saved_gpt2, config=config, n_layer=3)


def test_arguments_of_the_class_of_a_model():
    config = transformers.BertConfig()
    check_model_arguments(transformers.AutoModel, config, ["add_pooling_layer", "code_revision", "from_tf"])
    message = refusal(check_model_arguments, transformers.AutoModelForMaskedLM, config, ["add_pooling_layer"])
    assert message.startswith("BertForMaskedLM.from_pretrained has no argument 'add_pooling_layer'")


def test_modular_pipelines():
    check_modular_arguments(["torch_dtype", "names", "workflow", "variant", "components_manager", "device_map"])
    assert "has no argument 'torch_type' (did you mean 'torch_dtype'" in refusal(
        check_modular_arguments, ["torch_type"]
    )


def test_a_class_of_the_users(saved_pipeline, tmp_path, monkeypatch):
    code = """
from diffusers import DiffusionPipeline

class Shaded(DiffusionPipeline):
    def __init__(self, unet, scheduler, shade=1):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(shade=shade)
"""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    (tmp_path / "pipeline.py").write_text(code)
    given = {"custom_pipeline": str(tmp_path), "trust_remote_code": True}
    assert DiffusionModel(saved_pipeline, shade=4, **given).pipeline.config.shade == 4
    assert "Shaded.from_pretrained has no argument 'shades' (did you mean 'shade'" in refusal(
        DiffusionModel, saved_pipeline, shades=4, **given
    )


def loaded_dtype(wrapper, place, **given):
    if wrapper is HFPipeline:
        return wrapper("text-generation", model=str(place), **given).pipeline.model.dtype
    return wrapper(place, **given)["unet" if wrapper is DiffusionModel else "transformer"].dtype


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("wrapper", [DiffusionModel, LanguageModel, HFPipeline, VisionLanguageModel])
def test_dtypes(saved_gpt2, wrapper, name):
    place = CLIP if wrapper is DiffusionModel else saved_gpt2
    assert loaded_dtype(wrapper, place, **{name: "float64"}) == torch.float64
    for wrong in ("banana", "Tensor", 3, "int8", torch.int8, [torch.float16]):
        message = refusal(loaded_dtype, wrapper, place, **{name: wrong})
        assert message.startswith(f"{name} must be a floating-point dtype, such as") and repr(wrong) in message


def test_a_dtype_for_each_part():
    parts = DiffusionModel(CLIP, dtype={"default": "float64", "vae": torch.float16})
    assert (parts.unet.dtype, parts.vae.dtype) == (torch.float64, torch.float16)
    assert "the pipeline has no part 'unett' (did you mean 'unet'" in refusal(
        DiffusionModel, CLIP, dtype={"unett": torch.float16}
    )
    assert "dtype['unet'] must be" in refusal(DiffusionModel, CLIP, dtype={"unet": "banana"})


def test_a_dtype_that_a_pipeline_of_transformers_ignores(saved_gpt2):
    live = {"model": transformers.AutoModelForCausalLM.from_pretrained(saved_gpt2), "tokenizer": str(saved_gpt2)}
    message = refusal(HFPipeline, "text-generation", **live, dtype=torch.float16)
    assert message == "dtype: the pipeline's model is in torch.float32 and cannot be opened in torch.float16"


@pytest.mark.parametrize("automodel", ["StableDiffusionImg2ImgPipeline", "AutoPipelineForImage2Image"])
def test_compat_with_another_class(saved_pipeline, automodel):
    assert "has no argument 'bananas'" in refusal(
        CompatDiffusionModel, str(saved_pipeline), automodel=automodel, bananas=3
    )
    given = {"torch_dtype": torch.float64, "safety_checker": None}
    model = CompatDiffusionModel(str(saved_pipeline), automodel=automodel, **given)
    assert type(model.pipeline) is diffusers.StableDiffusionImg2ImgPipeline
