"""The explorer: the lenses in a browser.

    explore()                                   # http://127.0.0.1:7860
    explore("my-pipeline", language_model="my-language-model", port=8000)

By default, it listens only on this machine. All visitors share the models, which serve one visitor at a time.
"""

import socket
from typing import Any

from diffsight.errors import InputError
from diffsight.pipelines.packaged import PIPELINES

try:
    import gradio as gr

    from diffsight.gallery.explorer.image_tabs import add_image_tabs
    from diffsight.gallery.explorer.language_tabs import add_language_tabs
    from diffsight.gallery.explorer.shared_models import Workbench
except ModuleNotFoundError as error:
    if error.name != "gradio":
        raise
    raise InputError(
        'the explorer needs Gradio: install the extra `app`, pip install -c constraints.txt -e ".[app]"'
    ) from None

LANGUAGE_MODEL = "diffsight/smollm2"
_STYLE = """
.places .tab-like-container, .places .min_value, .places .max_value { display: none; }
@media (max-width: 40rem) {
  .pictures .grid-container { grid-template-columns: repeat(2, minmax(100px, 1fr)); }
}
"""  # hide the slider's numbers, which are indices and not layers; show two images in each row on phones


def explore(
    model: str | None = None,
    language_model: str = LANGUAGE_MODEL,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
) -> None:
    """Serve the explorer until it is interrupted.

    Args:
        model: An additional pipeline to offer besides the packaged ones: a packaged name, a folder or a hub id.
        language_model: The language model to offer: a packaged name, a folder or a hub id.
        host: The address to listen on. The default can be reached only from this machine. With any other address,
            anybody who can reach the machine can use the models.
        port: The port to listen on.

    Raises:
        InputError: The port is in use, or the address does not belong to this machine.
    """
    _check_free(host, port)
    app = build_app(model, language_model)
    start_app(app, host, port)
    print(f"http://{host}:{port}", flush=True)
    app.block_thread()


def build_app(model: str | None = None, language_model: str = LANGUAGE_MODEL) -> Any:
    """Return the app. No model is loaded yet."""
    pipelines = list(dict.fromkeys([*([model] if model else []), *PIPELINES]))
    with gr.Blocks(analytics_enabled=False, title="diffsight", delete_cache=(3600, 3600)) as app:
        gr.Markdown("# diffsight")
        with gr.Tabs():
            with gr.Tab("Images"):
                add_image_tabs(Workbench(pipelines))
            with gr.Tab("Language"):
                add_language_tabs(Workbench([language_model]))
    return app


def start_app(app: Any, host: str, port: int | None = None) -> None:
    """Serve an app in background threads. Fonts come from the visitor's machine; nothing is loaded from other servers.

    By default, `port` is a free port."""
    app.launch(
        server_name=host,
        server_port=port,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=_STYLE,
        share=False,
        quiet=True,
        footer_links=[],
        prevent_thread_lock=True,
        _frontend=False,  # otherwise Gradio first asks itself for the page, which fails behind a proxy or under load
    )


def _check_free(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"the explorer cannot listen on port {port} of {host}: {reason}") from None
