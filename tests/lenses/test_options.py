"""Options of lenses that are mistyped, of a wrong type or out of range: each is an error before the model runs."""

import numpy as np
import pytest
import torch

from diffsight import lenses
from diffsight.lenses.results.record import as_json
from helpers import not_called, refusal
from models import diffusion, lens_results

PROMPT = lens_results.PROMPT
OTHER = PROMPT.replace("blue", "green")
STEPS = {"num_inference_steps": 4}


@pytest.fixture(scope="module")
def model():
    return lens_results.load_packaged()


@pytest.fixture(scope="module")
def sae():
    return lenses.SAE.load("diffsight/shapes-clip-unet")


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda m: lenses.trajectory_lens(m, PROMPT, steps=9, **STEPS), "there is no step 9: the run has 4 steps"),
        (lambda m: lenses.attention_maps(m, PROMPT, steps=[0, 9], **STEPS), "there is no step 9: the run has 4 steps"),
        (lambda m: lenses.attention_maps(m, PROMPT, steps=2.5), "steps are integers or slices, not 2.5"),
        (lambda m: lenses.attention_maps(m, PROMPT, words=3), "words must be Sequence[str] | str | None, not 3"),
        (lambda m: lenses.attention_maps(m, PROMPT, words=[]), "words is empty"),
        (lambda m: lenses.attention_maps(m, PROMPT, heads=2.5), "heads must be Iterable[int] | None, not 2.5"),
        (lambda m: lenses.attention_maps(m, PROMPT, encoder=2), "encoder must be str | None, not 2"),
        (lambda m: lenses.attention_maps(m, PROMPT, word="red"), "no argument 'word' (did you mean 'words'"),
        (lambda m: lenses.attention_from(m, PROMPT, 2.5), "position is (x, y)"),
        (lambda m: lenses.prompt_to_prompt(m, PROMPT, OTHER, local=3), "local must be str | Sequence[str] | None"),
        (lambda m: lenses.prompt_to_prompt(m, PROMPT, OTHER, reweight={"red": "x"}), "reweight must be Mapping"),
        (
            lambda m: lenses.invert(m, diffusion.IMAGE, PROMPT, guidance_scale="x"),
            "guidance_scale must be float, not 'x'",
        ),
        (lambda m: lenses.trajectory_lens(m, PROMPT, progress="yes"), "progress must be bool, not 'yes'"),
        (lambda m: lenses.diffusion_lens(m, PROMPT, isolate="x"), "diffusion_lens: isolate must be bool, not 'x'"),
        (lambda m: lenses.diffusion_lens(m, PROMPT, norm=1), "diffusion_lens: norm must be bool, not 1"),
        (lambda m: lenses.encoder_patching(m, PROMPT, OTHER, isolate="x"), "isolate must be bool, not 'x'"),
        (lambda m: lenses.layer_fidelity(m, [None]), "a scene must be a Scene, not None"),
        (lambda m: lenses.invert(m, diffusion.IMAGE, guidance_scale=None), "guidance_scale must be float, not None"),
    ],
)
def test_a_lens_of_pipelines(model, call, told):
    with not_called(model.pipeline.unet, model.pipeline.text_encoder):
        assert told in refusal(call, model)


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda m, sae: lenses.attach_sae("model", sae), "takes a DiffusionModel or a LanguageModel, not str"),
        (lambda m, sae: lenses.train_sae(m, sae.point, [PROMPT], features=0), "features is a number of features"),
        (lambda m, sae: lenses.train_sae(m, sae.point, [PROMPT], features=8, k=9), "k must be from 1 to 8"),
        (lambda m, sae: lenses.train_sae(m, sae.point, [PROMPT], features=8, k=2, settings={}), "settings must be"),
        (lambda m, sae: lenses.train_sae(m, sae.point, [PROMPT], features=8, k=2, buffer=0), "buffer must be"),
        (lambda m, sae: lenses.train_sae(m, sae.point, [PROMPT], features=8, k=2, step=3), "no argument 'step'"),
        (lambda m, sae: lenses.train_sae(m, sae.point, [3], features=8, k=2), "data must be a list of prompts"),
        (lambda m, sae: lenses.evaluate_sae(m, sae, PROMPT), "prompts must be Sequence[str]"),
        (lambda m, sae: lenses.evaluate_sae(m, sae, [PROMPT], batch_size=0), "batch_size must be a positive integer"),
        (lambda m, sae: lenses.evaluate_sae(m, sae, [PROMPT], steps=9, **STEPS), "there is no step 9"),
        (lambda m, sae: lenses.top_examples(m, sae, [PROMPT], 1, count="x"), "count must be a positive integer"),
        (lambda m, sae: lenses.top_examples(m, sae, [PROMPT], 1, steps=9, **STEPS), "there is no step 9"),
        (lambda m, sae: lenses.concept_features(m, sae, [PROMPT], "red"), "others must be Sequence[str], not 'red'"),
        (lambda m, sae: lenses.concept_features(m, sae, [PROMPT], []), "pass two lists of strings"),
        (lambda m, sae: lenses.feature_effect(m, sae, PROMPT, 1, amounts=["x"]), "amounts must be Sequence[float]"),
        (lambda m, sae: lenses.feature_effect(m, sae, PROMPT, 1, steps=9, **STEPS), "there is no step 9"),
    ],
)
def test_a_lens_of_features(model, sae, call, told):
    with not_called(model.pipeline.unet, model.pipeline.text_encoder):
        assert told in refusal(call, model, sae)


@pytest.mark.parametrize(("name", "value"), [("updates", 0), ("batch_size", "x"), ("learning_rate", -1.0)])
def test_the_settings_of_a_training(name, value):
    assert name in refusal(lenses.SAESettings, **{name: value})


FEW = {"num_inference_steps": 2, "progress": False}


@pytest.mark.parametrize("kind", [np.int64, torch.tensor])
@pytest.mark.parametrize(
    "call",
    [
        lambda m, kind: lenses.diffusion_lens(m, PROMPT, layers=[kind(0)], batch_size=kind(2), **FEW).images[0],
        lambda m, kind: lenses.trajectory_lens(m, PROMPT, steps=kind(1), batch_size=kind(2), **FEW).grid(),
        lambda m, kind: lenses.block_ablation(m, PROMPT, sites="unet.mid_block", steps=kind(0), **FEW).effect,
        lambda m, kind: lenses.collect_activations(m, [PROMPT], layers="unet.mid_block", steps=[kind(1)], **FEW)[
            "unet.mid_block"
        ],
        lambda m, kind: lenses.attention_maps(m, PROMPT, heads=[kind(1)], num_inference_steps=1)["circle"],
    ],
)
def test_numbers_of_any_kind(model, call, kind):
    assert np.array_equal(*(np.asarray(call(model, one)) for one in (kind, int)))


PAIRS = [("hot", "cold"), ("big", "small"), ("up", "down")]


@pytest.mark.parametrize("kind", [np.int64, torch.tensor])
@pytest.mark.parametrize(
    "record",
    [
        lambda m, kind: lenses.invert(m, diffusion.IMAGE, PROMPT, fixed_point=kind(1), gamma=kind(0), **FEW).record(),
        lambda m, kind: lenses.prompt_swap(m, PROMPT, "a", lenses.pixel_distance(), window=kind(2), **FEW).record(),
        lambda m, kind: lenses.block_ablation(m, PROMPT, sites="unet.mid_block", max_rows=kind(9), **FEW).record(),
        lambda m, kind: lenses.compare_encoders(
            {"one": m, "two": m}, [PROMPT, "a"], images=kind(0), progress=False
        ).record(),
        lambda m, kind: lenses.causal_tracing(
            m,
            PROMPT,
            "circle",
            sites="unet.mid_block",
            metric=lenses.pixel_distance(),
            samples=kind(2),
            batch_size=kind(2),
            **FEW,
        ).record(),
        lambda m, kind: {"texts": [one.text for one in lenses.few_shot_prompts(PAIRS, kind(2), kind(2))]},
    ],
)
def test_a_record_holds_numbers_of_python(model, record, kind):
    assert as_json(record(model, kind)) == as_json(record(model, int))
