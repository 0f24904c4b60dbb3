"""The views of a language model: the logit lens, and steering."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from diffsight.gallery.explorer.shared_models import (
    Workbench,
    archive_of,
    code_of,
    job_of,
    reporting,
    whole_numbers,
)
from diffsight.lenses import logit_lens, steer
from diffsight.lenses.results.token_plots import visible
from diffsight.pipelines.language.model import LanguageModel

PROMPT = "The Eiffel Tower is in the city of"
_FULL = {"show_progress": "minimal", "concurrency_id": "model", "concurrency_limit": 1}
_STEERING = """import torch

from diffsight import LanguageModel
from diffsight.lenses import steer

model = LanguageModel({model!r})


def state(text):
    with torch.no_grad(), model.trace(text) as run:
        return run.layers_output[{layer}][0, -1].clone()


steered = steer(model, {layer}, state({towards!r}) - state({away!r}), factor={factor})
print(steered.generate({prompt!r}, max_new_tokens={tokens}, do_sample=False).text)
"""


def add_language_tabs(bench: Workbench) -> None:
    """Add the views to the app, below their shared fields."""
    with gr.Row():
        prompt = gr.Textbox(PROMPT, label="Prompt", scale=3, min_width=300)
        model = gr.Dropdown(bench.names, value=bench.names[0], label="Model", scale=2, min_width=220)
    with gr.Tabs():
        with gr.Tab("Logit lens"):
            _add_logit_lens(bench, prompt, model)
        with gr.Tab("Steering"):
            _add_steering(bench, prompt, model)


def _buttons(action: str) -> tuple[gr.Button, gr.Button]:
    with gr.Row():
        return gr.Button(action, variant="primary"), gr.Button("Stop")


def _code_and_save() -> tuple[gr.Code, gr.DownloadButton]:
    with gr.Accordion("As code", open=False):
        code = gr.Code(language="python", label="Copy as code", interactive=False)
    return code, gr.DownloadButton("Save", interactive=False)


def _add_logit_lens(bench: Workbench, prompt: gr.Textbox, model: gr.Dropdown) -> None:
    result = gr.State()
    gr.Markdown("What would the model predict if it stopped at each layer? Click a cell for its likeliest tokens.")
    read, stop = _buttons("Read")
    table = gr.Dataframe(label="Likeliest token by layer and position", interactive=False, wrap=False)
    likeliest = gr.Label(label="Likeliest tokens")
    code, save = _code_and_save()

    @reporting
    def run(
        prompt: str,
        name: str,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(track_tqdm=True),  # noqa: B008
    ) -> Any:
        model = bench.model(name)
        with bench.work(job_of(request, "Logit lens"), model):
            made = logit_lens(model, prompt)
        rows = [[str(layer), *map(visible, words)] for layer, words in zip(made.layers, made.words[0])]
        shown = gr.Dataframe(value=rows[::-1], headers=["layer", *map(visible, made.inputs[0])])
        return made, shown, code_of(made), gr.DownloadButton(value=archive_of(made), interactive=True)

    def show(made: Any, event: gr.SelectData) -> Any:
        row, column = event.index
        if made is None or column == 0:
            return gr.skip()
        layer, position = len(made.layers) - 1 - row, column - 1
        ids, shares = made.ids[0, layer, position].tolist(), made.probabilities[0, layer, position].tolist()
        return {f"{made.texts[token]!r}": share for token, share in zip(ids, shares)}

    def halt(request: gr.Request) -> None:
        bench.stop(job_of(request, "Logit lens"))

    event = read.click(run, [prompt, model], [result, table, code, save], **_FULL)
    stop.click(halt, cancels=[event], queue=False)
    table.select(show, result, likeliest, show_progress="hidden")


def _add_steering(bench: Workbench, prompt: gr.Textbox, model: gr.Dropdown) -> None:
    gr.Markdown("What does the model write if the difference of two texts is added to a layer?")
    with gr.Row():
        towards = gr.Textbox("I love this", label="Towards")
        away = gr.Textbox("I hate this", label="Away from")
        layer = gr.Number(12, label="Layer", precision=0)
        tokens = gr.Number(20, label="Tokens", precision=0, minimum=1)
    factor = gr.Slider(-4, 4, 1, step=0.25, label="Factor")
    write, stop = _buttons("Write")
    with gr.Row():
        plain, steered = (gr.Textbox(label=label, lines=3, min_width=260) for label in ("Without", "Steered"))
    code, save = _code_and_save()

    @reporting
    def run(
        prompt: str,
        name: str,
        towards: str,
        away: str,
        layer: int | None,
        tokens: int | None,
        factor: float,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(track_tqdm=True),  # noqa: B008
    ) -> Any:
        layer, tokens = whole_numbers(Layer=layer, Tokens=tokens)
        model = bench.model(name)
        with bench.work(job_of(request, "Steering"), model):
            direction = _state(model, towards, layer) - _state(model, away, layer)
            models = model, steer(model, layer, direction, factor=factor)
            texts = [one.generate(prompt, max_new_tokens=tokens, do_sample=False).text for one in models]
        settings = {"prompt": prompt, "model": name, "towards": towards, "away": away, "layer": layer}
        settings |= {"factor": factor, "tokens": tokens}
        written = _STEERING.format(**settings)
        archive = _archive({**settings, "without": texts[0], "steered": texts[1]}, written)
        return *texts, written, gr.DownloadButton(value=archive, interactive=True)

    def halt(request: gr.Request) -> None:
        bench.stop(job_of(request, "Steering"))

    asked = [prompt, model, towards, away, layer, tokens, factor]
    events = [start(run, asked, [plain, steered, code, save], **_FULL) for start in (write.click, factor.release)]
    stop.click(halt, cancels=events, queue=False)


def _state(model: LanguageModel, text: str, layer: int) -> torch.Tensor:
    """Return the output of a layer at the last token of a text, (features,)."""
    with torch.no_grad(), model.trace(text) as run:
        state = run.layers_output[layer][0, -1].clone()
        run.stop()
    return state


def _archive(record: dict[str, Any], code: str) -> str:
    """Return the path of a ZIP file with a record and the code that repeats it."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "steering.json").write_text(json.dumps(record, indent=2, ensure_ascii=False), encoding="utf-8")
        (Path(folder) / "steering.py").write_text(code, encoding="utf-8")
        return shutil.make_archive(str(Path(tempfile.mkdtemp()) / "steering"), "zip", folder)
