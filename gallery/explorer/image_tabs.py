"""The views of a pipeline. Each runs a lens, and shows the images of one layer, word or step of its result."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image

from diffsight.gallery.explorer.shared_models import (
    Workbench,
    archive_of,
    code_of,
    job_of,
    reporting,
    whole_numbers,
)
from diffsight.lenses import attention_maps, diffusion_lens, encoder_patching, trajectory_lens
from diffsight.pipelines.diffusion.model import DiffusionModel

PROMPT = "a red circle above a blue square"
_SOURCE = "a green circle above a blue square"
_FULL = {"show_progress": "minimal", "concurrency_id": "model", "concurrency_limit": 1}
Pictures = list[tuple[Image.Image, str]]  # images with their captions


@dataclass(frozen=True)
class ImageView:
    """A view of a pipeline.

    Attributes:
        title: The name of its tab.
        question: The question that the view answers.
        make: Makes the result from the model, the prompt, a dictionary with seed and steps, and the values of `asks`.
        names: Returns the names of the choices in a result, such as layers.
        pictures: Returns the images of a choice, by its index.
        asks: Labels and examples of additional input fields.
        has_words: Whether the names are words to click, instead of positions on a slider.
    """

    title: str
    question: str
    make: Callable[..., Any]
    names: Callable[[Any], Sequence[str]]
    pictures: Callable[[Any, int], Pictures]
    asks: tuple[tuple[str, str], ...] = ()
    has_words: bool = False


def _layers(model: DiffusionModel, prompt: str, call: dict[str, Any]) -> Any:
    return diffusion_lens(model, prompt, **call)


def _attention(model: DiffusionModel, prompt: str, call: dict[str, Any]) -> Any:
    return attention_maps(model, prompt, **call)


def _trajectory(model: DiffusionModel, prompt: str, call: dict[str, Any]) -> Any:
    return trajectory_lens(model, prompt, **call)


def _patching(model: DiffusionModel, prompt: str, call: dict[str, Any], source: str, word: str, into: str) -> Any:
    words = {"words": [word], "into": [into]} if word and into else {"words": [word] if word else None}
    return encoder_patching(model, source, prompt, **words, **call)


def _title_of_layer(layer: int | str) -> str:
    return layer if isinstance(layer, str) else f"layer {layer}"


VIEWS = [
    ImageView(
        "Layers",
        "What does the pipeline draw from each layer of its text encoder?",
        _layers,
        lambda result: [_title_of_layer(layer) for layer in result.layers],
        lambda result, place: [(result.images[place], _title_of_layer(result.layers[place]))],
    ),
    ImageView(
        "Attention",
        "Where in the image is each word attended to? Choose a word.",
        _attention,
        lambda result: result.words,
        lambda result, place: [(result.image, "image"), (result.overlay(result.words[place]), result.words[place])],
        has_words=True,
    ),
    ImageView(
        "Trajectory",
        "What is the denoiser about to draw at each step?",
        _trajectory,
        lambda result: [f"step {step}" for step in result.steps],
        lambda result, place: [(images[place], column) for column, images in result.images.items()],
    ),
    ImageView(
        "Patching",
        "What does a word of another prompt do in this one?",
        _patching,
        lambda result: [_title_of_layer(layer) for layer in result.layers],
        lambda result, place: [
            (result.source_image, "other prompt"),
            (result.target_image, "prompt"),
            *zip(result.images[place], result.words),
        ],
        asks=(("Other prompt", _SOURCE), ("Its word", "green"), ("Put in place of", "red")),
    ),
]


def add_image_tabs(bench: Workbench) -> None:
    """Add the views to the app, below their shared fields."""
    with gr.Row():
        prompt = gr.Textbox(PROMPT, label="Prompt", scale=3, min_width=300)
        model = gr.Dropdown(bench.names, value=bench.names[0], label="Model", scale=2, min_width=220)
        seed = gr.Number(0, label="Seed", precision=0, minimum=0)
        steps = gr.Number(10, label="Steps", precision=0, minimum=1)
    with gr.Tabs():
        for view in VIEWS:
            with gr.Tab(view.title):
                _add_view(bench, view, [prompt, model, seed, steps])


def _add_view(bench: Workbench, view: ImageView, shared: list[Any]) -> None:
    result = gr.State()
    gr.Markdown(view.question)
    with gr.Row():
        asked = [gr.Textbox(example, label=label, min_width=240) for label, example in view.asks]
    with gr.Row():
        draw, stop = gr.Button("Draw", variant="primary"), gr.Button("Stop")
    if view.has_words:
        chosen: Any = gr.Radio([], label="Word", type="index")
    else:
        chosen = gr.Slider(0, 1, 0, step=1, label=view.title, interactive=True, elem_classes="places")
    pictures = gr.Gallery(
        label="Images", columns=4, fit_columns=False, format="png", height="auto", elem_classes="pictures"
    )
    with gr.Accordion("As code", open=False):
        code = gr.Code(language="python", label="Copy as code", interactive=False)
    save = gr.DownloadButton("Save", interactive=False)

    @reporting
    def run(
        request: gr.Request,
        progress: gr.Progress = gr.Progress(track_tqdm=True),  # noqa: B008
        prompt: str = "",
        name: str = "",
        seed: int | None = None,
        steps: int | None = None,
        *others: str,
    ) -> Any:
        seed, steps = whole_numbers(Seed=seed, Steps=steps)
        model = bench.model(name)
        with bench.work(job_of(request, view.title), model):
            made = view.make(model, prompt, {"seed": seed, "num_inference_steps": steps}, *others)
        names = list(view.names(made))
        if view.has_words:
            chooser = gr.Radio(names, value=names[0])
        else:
            chooser = gr.Slider(0, max(len(names) - 1, 1), len(names) - 1, label=names[-1])
        shown = view.pictures(made, 0 if view.has_words else len(names) - 1)
        return made, chooser, shown, code_of(made), gr.DownloadButton(value=archive_of(made), interactive=True)

    def show(made: Any, place: int | None) -> Any:
        if made is None or place is None:
            return gr.skip(), gr.skip()
        names = list(view.names(made))
        place = min(int(place), len(names) - 1)
        return view.pictures(made, place), gr.skip() if view.has_words else gr.Slider(label=names[place])

    def halt(request: gr.Request) -> None:
        bench.stop(job_of(request, view.title))

    event = draw.click(run, [*shared, *asked], [result, chosen, pictures, code, save], **_FULL)
    stop.click(halt, cancels=[event], queue=False)
    chosen.input(show, [result, chosen], [pictures, chosen], show_progress="hidden")
