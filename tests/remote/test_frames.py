"""Frames and values arrive as they were sent, and the frames with tensors are in the safetensors format."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load
from transformers import BatchEncoding, CompileConfig, DynamicCache, GenerationConfig
from transformers.modeling_outputs import BaseModelOutput

from diffsight.errors import DiffsightError, InputError
from diffsight.lenses import Prompt, TargetProbabilities
from diffsight.remote.chunks import Chunks, split
from diffsight.remote.frames import pack, unpack
from diffsight.remote.wire_values import Held, ProtocolError, ValueDecoder, ValueEncoder
from helpers import same, same_image

TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.int64, torch.uint8]


def sent(value, **options):
    encoder = ValueEncoder(**options)
    data = encoder.encode(value)
    message, tensors = unpack(pack({"value": data}, encoder.tensors))
    return ValueDecoder(tensors).decode(message["value"])


@pytest.mark.parametrize("dtype", [*TYPES, torch.bool], ids=str)
def test_tensors(dtype):
    whole = torch.arange(24).reshape(2, 3, 4).to(dtype)
    for tensor in (whole, whole.mT, whole[:, 1], whole[0, 0, 1], whole[:0]):
        found = sent(tensor)
        assert found.dtype == dtype and found.shape == tensor.shape and torch.equal(found, tensor)


def test_an_image_that_is_larger_than_its_data():
    """No memory is taken for it."""
    for mode in ("RGB", "1"):
        with pytest.raises(ProtocolError, match="has more than 4 bytes"):
            ValueDecoder({"0": torch.zeros(4, dtype=torch.uint8)}).decode({"$image": ["0", mode, 10**5, 10**5]})


def test_the_layout_in_memory_is_kept():
    image = torch.randn(2, 3, 4, 5)
    last, odd = image.to(memory_format=torch.channels_last), image[:1].as_strided((1, 3, 4), (7, 1, 3))
    for tensor in (last, last[1:], image.permute(3, 1, 0, 2), odd, image, image[1].half().mT):
        found = sent(tensor)
        assert torch.equal(found, tensor) and found.stride() == tensor.stride() and found.dtype == tensor.dtype
    for tensor in (image[..., ::2].mT, torch.ones(3, 1).expand(3, 4), image[:0].mT):  # with gaps, or several times
        assert torch.equal(sent(tensor), tensor)
    for shape, stride in ([[2, 3], [3, 2]], [[6], [2]], [[7], [1]], [[6], [-1]], [[6, 1], [1]], [["6"], [1]]):
        with pytest.raises(ProtocolError):
            ValueDecoder({"0": torch.zeros(6)}).decode({"$tensor": "0", "layout": [shape, stride]})


def test_the_format_is_that_of_safetensors():
    tensors = {"0": torch.randn(2, 3), "1": torch.arange(5)}
    assert same(load(pack({"value": 1}, tensors)), tensors)


def test_views_of_one_tensor():
    whole = torch.randn(4, 4)
    assert same(sent([whole, whole[0], whole.T]), [whole, whole[0], whole.T])


def test_plain_values():
    value = (
        1,
        2.5,
        "é\ud800",
        None,
        True,
        [(), {}],
        {"a": (1,), 3: slice(1, None), "$x": ...},
        range(3),
        torch.Size([1]),
    )
    found = sent(value)
    assert found == value and type(found[-1]) is torch.Size and type(found[4]) is bool
    assert math.isnan(sent(math.nan)) and sent([math.inf, -math.inf]) == [math.inf, -math.inf]
    assert sent(torch.float16) is torch.float16 and sent(torch.device("cpu")) == torch.device("cpu")


def test_objects():
    found = sent(BaseModelOutput(last_hidden_state=torch.ones(2)))
    assert type(found) is BaseModelOutput and torch.equal(found.last_hidden_state, torch.ones(2))
    assert torch.equal(sent(BatchEncoding({"input_ids": torch.ones(2)})).input_ids, torch.ones(2))
    array = np.arange(6, dtype=np.int16).reshape(2, 3).T
    assert np.array_equal(sent(array), array) and sent(array).dtype == np.int16
    for mode in ("L", "RGB", "RGBA", "1", "I;16", "F"):
        image = Image.new(mode, (5, 3), 1)
        assert same_image(sent(image), image)


def test_settings_of_generation():
    given = GenerationConfig(max_new_tokens=5, do_sample=True, eos_token_id=[1, 2], sequence_bias={(1, 2): 0.5})
    found = sent(given)
    assert type(found) is GenerationConfig and found == given
    given.compile_config = CompileConfig()
    with pytest.raises(InputError, match="generation_config: compile_config cannot be sent"):
        sent(given)
    for wrong in ({"compile_config": {}}, {"_commit_hash": "x"}, {"top_k": {"$held": [0, "x"]}}, {"__class__": 1}):
        with pytest.raises(ProtocolError):
            ValueDecoder({}).decode({"$generation_config": wrong})


def test_a_result_that_is_a_mapping():
    given = TargetProbabilities("m", (Prompt("a", {"it": [7]}),), (0, 1), {"it": torch.rand(1, 2)}, {"it": ("b",)})
    found = sent(given)
    assert type(found) is TargetProbabilities and found.prompts == given.prompts and found.layers == (0, 1)
    assert torch.equal(found["it"], given["it"]) and found.tokens == given.tokens


def test_what_cannot_be_sent():
    for value in (DynamicCache(), lambda: None, object(), torch.Generator()):
        with pytest.raises(InputError, match="cannot be sent to a server"):
            sent(value)
    held = []
    found = sent(DynamicCache(), hold=lambda thing: held.append(thing) or 0)
    assert isinstance(found, Held) and len(held) == 1
    for use in (lambda: found.layers, lambda: found[0], lambda: list(found), lambda: "images" in found):
        with pytest.raises(DiffsightError, match="DynamicCache stays on the server"):
            use()


@pytest.mark.parametrize("size", [10, 8 << 20, (8 << 20) + 1, 20 << 20])
def test_long_frames_are_sent_in_parts(size):
    for frame in (bytes(size), "a" * size):
        chunks = Chunks(1 << 30)
        parts = list(split(frame))
        found = [chunks.add(part) for part in parts]
        assert found[:-1] == [None] * (len(parts) - 1) and found[-1] == frame
        assert max(map(len, parts)) <= 8 << 20


def test_parts_that_do_not_fit():
    with pytest.raises(ProtocolError, match="the limit is 100"):
        Chunks(100).add('{"bytes":101,"text":false}')
    chunks = Chunks(100)
    chunks.add('{"bytes":10,"text":false}')
    with pytest.raises(ProtocolError, match="do not fit"):
        chunks.add(bytes(11))


def test_long_json_is_refused_before_it_is_parsed():
    """Its objects would take many times the memory of its text."""
    text = '{"do":[' + ",".join(["[]"] * 100) + "]}"
    for frame in (text, pack(json.loads(text), {"0": torch.zeros(2)})):
        assert len(unpack(frame, 1000)[0]["do"]) == 100
        with pytest.raises(ProtocolError, match=r"bytes of JSON: the limit is 99. Send tensors, not lists"):
            unpack(frame, 99)
    with pytest.raises(ProtocolError, match="a message with 11 bytes of JSON"):  # of 9 characters
        unpack('{"é":"é"}', 9)
