"""`nnsight.CONFIG`, so that code that sets its options runs."""

import logging
from types import SimpleNamespace


class Config:
    """Settings, only one of which has an effect.

    While `CONFIG.APP.BLOCKS_GIVE_TUPLES` is True, the default, the output of a layer of a language model is a tuple, as
    in transformers 4. If it is False, the output is whatever the layer returns."""

    def __init__(self) -> None:
        self.APP = SimpleNamespace(DEBUG=False, REMOTE_LOGGING=False, BLOCKS_GIVE_TUPLES=True)
        self.API = SimpleNamespace(APIKEY=None)

    def set_default_api_key(self, key: str) -> None:
        """Keep a key for remote runs. It is not used."""
        self.API.APIKEY = key

    def set_default_app_debug(self, debug: bool) -> None:
        """Set `CONFIG.APP.DEBUG`. It has no effect."""
        self.APP.DEBUG = debug

    def save(self) -> None:
        """Do nothing: settings are not kept between processes."""


CONFIG = Config()
remote_logger = logging.getLogger("nnsight_remote")
