"""Keep loading quiet: at most one progress bar, and no notice about packages that are not needed.

with quiet_loading(transformers.utils.logging):          # the bar of diffusers, if any, stays
    DiffusionPipeline.from_pretrained(...)

The hub's download bars stay.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

_NOTICES = "transformers.utils.import_utils"  # the logger of the notice that torchvision is missing


@contextmanager
def quiet_loading(*silenced: ModuleType) -> Iterator[None]:
    """Turn off, in a block, progress bars and the notice that an image processor works without torchvision.

    Args:
        silenced: The logging modules of the libraries whose bars are turned off: `diffusers.utils.logging`,
            `transformers.utils.logging`.
    """
    # Not disable_progress_bar(), which in transformers also hides the bars of downloads.
    before = [module._tqdm_active for module in silenced]
    logger = logging.getLogger(_NOTICES)
    logger.addFilter(_is_needed)
    for module in silenced:
        module._tqdm_active = False
    try:
        yield
    finally:
        for module, value in zip(silenced, before):
            module._tqdm_active = value
        logger.removeFilter(_is_needed)


def _is_needed(record: logging.LogRecord) -> bool:
    return "requires torchvision" not in record.getMessage()
