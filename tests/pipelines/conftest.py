"""Fixtures that several files of these tests share."""

import diffusers
import pytest
import transformers

from models import diffusion
from models.language_kinds import TOKENIZER, gpt2


@pytest.fixture(scope="session")
def saved_gpt2(tmp_path_factory):
    """Return a folder with a small GPT-2 and its tokenizer, in the format of transformers."""
    folder = tmp_path_factory.mktemp("saved") / "gpt2"
    gpt2().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


@pytest.fixture
def loads(monkeypatch):
    """Return the list of the classes whose weights have been read so far, in order."""
    read = []
    for cls in (diffusers.ModelMixin, transformers.PreTrainedModel):
        plain = cls.from_pretrained.__func__

        def from_pretrained(cls, *args, plain=plain, **kwargs):
            read.append(cls.__name__)
            return plain(cls, *args, **kwargs)

        monkeypatch.setattr(cls, "from_pretrained", classmethod(from_pretrained))
    return read


@pytest.fixture(params=diffusion.ALL_PIPELINES)
def kind(request):
    return diffusion.ALL_PIPELINES[request.param]


@pytest.fixture
def pipe(kind):
    return kind.build()
