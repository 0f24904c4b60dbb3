"""Runs of pipelines on a server return what the same lines return on the pipeline itself, bit for bit."""

import pytest
import torch

from diffsight import DiffusionModel
from diffsight.errors import InputError
from diffsight.remote import ProtocolError, RemoteError
from helpers import refusal, same, same_image

PROMPT, OTHER = "a red circle above a blue square", "a green square"
CLIP = "diffsight/shapes-clip"


def steps(model):
    with model.generate(PROMPT, seed=3, num_inference_steps=4) as run:
        hidden = run.text_encoder.layers[1].output
        run.text_encoder.ln_final.input = hidden
        run.unet.conv_in.output[:, :2] *= 0.5
        found = [hidden]
        for step in run.steps[:3]:
            found += [step.index, step.timestep, run.unet.mid_block.output, run.scheduler.step.input]
        found.append(run.vae.decode.input)
    return found, run.images[0]


def branches(model):
    with model.generate([PROMPT, OTHER], seed=3, num_inference_steps=2) as run:
        for _ in run.steps[:2]:
            run.uncond.unet.mid_block.output = run.cond.unet.mid_block.output * 0.9
            found = [row.unet.up_blocks[0].output for row in run.cond.rows]
        first = run.rows[0].vae.decode.input
    return found, first, [run.rows[1].images[0], *run.images]


def attention(model):
    with model.generate(PROMPT, seed=3, num_inference_steps=2) as run:
        attn = run.unet.mid_block.attentions[0].transformer_blocks[0].attn2
        found = [attn.attention_probs, attn.heads_output]
        run.stop()
    return found


def record(model):
    with model.generate(PROMPT, seed=3, num_inference_steps=3) as run:
        kept = run.record(["text_encoder.layers[*]", "unet.mid_block.output", "vae.decode.input"])
        for _ in run.steps:
            pass
    return dict(kept)


def parts(model):
    with model.generate(PROMPT, seed=3, num_inference_steps=2) as run:
        latents = run.vae.decode.input
        decoded = model.vae.decode(latents * 0.5).sample
        inputs = run.vae.decode.inputs
    return decoded, inputs[0][0], run.images[0]


def two_at_once(model):
    return [model.generate(prompt, seed=1, num_inference_steps=2).images[0] for prompt in (PROMPT, OTHER)]


def compare(expected, found):
    if hasattr(expected, "tobytes"):
        return same_image(expected, found)
    if isinstance(expected, (list, tuple)):
        return len(expected) == len(found) and all(map(compare, expected, found))
    return same(expected, found)


@pytest.mark.parametrize("body", [steps, branches, attention, record, parts, two_at_once], ids=lambda one: one.__name__)
def test_the_same_values(body, pipelines, remote_pipelines):
    assert compare(body(pipelines[CLIP]), body(remote_pipelines[CLIP]))


def test_the_same_values_of_other_pipelines(pipelines, remote_pipelines):
    def flux(model):
        with model.generate(PROMPT, seed=3, num_inference_steps=2) as run:
            found = [run.text_encoder_2.layers[1].output]
            for step in run.steps:
                found += [step.timestep, run.transformer.transformer_blocks[0].output[0]]
        return found, run.images[0]

    def t5(model):
        with model.generate(PROMPT, seed=3, num_inference_steps=2) as run:
            run.text_encoder.ln_final.input = run.text_encoder.layers_output[1] * 2
            found = [(step.timestep, run.cond.unet.conv_in.input, run.unet.mid_block.output) for step in run.steps]
        return found, run.images[0]

    for name, body in (("diffsight/shapes-flux", flux), ("diffsight/shapes-t5", t5)):
        assert compare(body(pipelines[name]), body(remote_pipelines[name]))


def test_what_is_known_of_the_encoders(pipelines, remote_pipelines):
    model = remote_pipelines[CLIP]
    assert repr(model.encoders) == repr(pipelines[CLIP].encoders)
    listed = model.server.description["encoders"]
    assert listed == {name: str(encoder) for name, encoder in pipelines[CLIP].encoders.items()}
    assert repr(model) == repr(pipelines[CLIP])


def test_questions_in_a_run(remote_pipelines, address):
    """They are answered by the replica of the run, since there may be no other."""
    model = DiffusionModel(CLIP, remote=address)
    with model.generate(PROMPT, seed=0, num_inference_steps=1) as run:
        hidden = run.text_encoder.layers[0].output
        assert len(model.attentions) and list(model.encoders) == ["text_encoder"]
        assert torch.equal(run.text_encoder.layers[0].output, hidden)


def test_attributes_that_a_run_changes(remote_pipelines):
    """Those of the scheduler are read on the server. Outside a run, and before it has begun, they are the client's."""
    model = remote_pipelines[CLIP]
    with pytest.raises(RemoteError), model.generate(PROMPT, seed=0, num_inference_steps=3) as run:
        assert run.scheduler.num_inference_steps is None
        for step in run.steps:
            assert run.scheduler._internal_dict["num_train_timesteps"]  # private ones are the client's
            for name in ("none", "output", "step"):
                with pytest.raises(InputError, match=f"scheduler has no attribute '{name}' on the server"):
                    model.server.ask({"op": "attribute", "path": "scheduler", "name": name})
            assert run.scheduler.num_inference_steps == 3 and model.scheduler.timesteps[step.index] == step.timestep
            assert run.scheduler.config.num_train_timesteps == 1000
        with pytest.raises(ProtocolError, match="that a server sends"):
            model.server.ask({"op": "attribute", "path": "unet.conv_in", "name": "weight"})


def test_half_precision_halves_what_is_sent(remote_pipelines):
    model = remote_pipelines[CLIP]
    with model.generate(PROMPT, seed=3) as run:
        exact = run.text_encoder.layers[1].output
        run.stop()
    model.server.half_precision = True
    try:
        with model.generate(PROMPT, seed=3) as run:
            half = run.text_encoder.layers[1].output
            run.stop()
    finally:
        model.server.half_precision = False
    assert half.dtype == torch.float32 and torch.equal(half, exact.half().float()) and not torch.equal(half, exact)


def test_a_session_keeps_its_connection(pipelines, remote_pipelines):
    model = remote_pipelines[CLIP]
    with model.server.session():
        first = model.generate(PROMPT, seed=3, num_inference_steps=2).images[0]
        with model.generate(PROMPT, seed=3, num_inference_steps=2) as run:
            run.text_encoder.ln_final.input = run.text_encoder.layers[1].output
            run.stop()
        again = model.generate(PROMPT, seed=3, num_inference_steps=2).images[0]
    expected = pipelines[CLIP].generate(PROMPT, seed=3, num_inference_steps=2).images[0]
    assert same_image(first, expected) and same_image(again, expected)


def test_buffers_of_the_model_are_not_changed(pipelines, remote_pipelines):
    """Position ids are a view of a buffer: a change in place would stay in the model for all later runs."""
    before = pipelines[CLIP].pipeline.text_encoder.embeddings.position_ids.clone()
    with remote_pipelines[CLIP].generate(PROMPT, seed=3, num_inference_steps=1) as run:
        positions = run.text_encoder.embeddings.position_embedding.input
        positions -= 1
        with pytest.raises(InputError, match=r"position_embedding\.input shares its memory with a weight or buffer"):
            run.text_encoder.layers[0].output
        run.stop()
    assert torch.equal(pipelines[CLIP].pipeline.text_encoder.embeddings.position_ids, before)


def test_what_would_not_reach_the_server_is_an_error(remote_pipelines):
    model = remote_pipelines[CLIP]
    calls = [
        lambda: model.enable_freeu(s1=0.5, s2=0.2, b1=2.5, b2=2.6),
        lambda: model.load_lora_weights("x"),
        lambda: model.unet.set_attn_processor(None),
        lambda: model.unet.half(),
        lambda: model.unet.conv_in.register_forward_hook(print),
    ]
    for call in calls:
        assert "would not reach the model on the server" in refusal(call)
    with pytest.raises(InputError, match="scheduler belongs to the pipeline on the server"):
        model.scheduler = model.scheduler
    model.set_progress_bar_config(disable=True)  # these change no value
    assert (
        hasattr(model, "enable_freeu") and model.unet.eval() is not None and model.scheduler.config.num_train_timesteps
    )
