"""Prepare texts and images for a vision-language model with its processor.

    values = process(processor, ["What is this?"], "cat.png", left=True)
    values["input_ids"], values["pixel_values"]

If a text has no placeholders for its images, they are added at its beginning. The processor replaces each placeholder
with image tokens.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers

from diffsight.errors import InputError
from diffsight.pipelines.folder_checks import check_vocabulary
from diffsight.pipelines.hub_access import hub_access
from diffsight.pipelines.loading_arguments import UNTRUSTED
from diffsight.pipelines.loading_errors import reason_of
from diffsight.pipelines.local_paths import find_path
from diffsight.pipelines.valid_text import check_text
from diffsight.pipelines.vision_language.images import images_of

_IN_MESSAGES = ("image", "url", "path", "base64")  # the keys of an image in a message
_ONLY_FOR_TRAINING = ("labels",)


def load_processor(place: str | Path, **of_hub: Any) -> Any:
    """Load the processor in a folder or hub repository. Raise InputError, with the reason, if there is none."""
    try:
        usual = UNTRUSTED | ({} if find_path(place) else hub_access())
        found = transformers.AutoProcessor.from_pretrained(place, **usual | of_hub)
        check_vocabulary(Path(place), found)
    except Exception as error:  # a damaged file can fail anywhere in the libraries
        raise InputError(f"{place} has no processor that can be loaded: {reason_of(error)}") from error
    return checked_processor(found, str(place))


def checked_processor(processor: Any, place: str = "") -> Any:
    """Return the argument if it is None or a processor of texts and images. Raise InputError otherwise."""
    if processor is None or all(hasattr(processor, part) for part in ("image_processor", "tokenizer")):
        return processor
    what = f"{place} only has" if place else "a processor has a tokenizer and an image processor; this is"
    raise InputError(
        f"{what} a {type(processor).__name__}: pass a processor, as in VisionLanguageModel((model, processor))"
    )


def texts_in(given: Any) -> list[str] | None:
    """Return the texts that a user passes, or None for other inputs."""
    if isinstance(given, str):
        return [given]
    if isinstance(given, (list, tuple)) and given and all(isinstance(text, str) for text in given):
        return list(given)
    return None


def chats_in(given: Any) -> list[list[Mapping]] | None:
    """Return the chats in a message, a list of messages or a list of such lists, or None for other inputs."""
    if isinstance(given, Mapping):
        return [[given]] if _is_message(given) else None
    if not isinstance(given, (list, tuple)) or not given:
        return None
    if all(_is_message(item) for item in given):
        return [list(given)]
    if all(isinstance(item, (list, tuple)) and item and all(map(_is_message, item)) for item in given):
        return [list(item) for item in given]
    return None


def process(processor: Any, texts: Sequence[str], images: Any, left: bool, **more: Any) -> dict[str, Any]:
    """Return the model inputs for texts and their images. Several texts are padded, on the left or on the right.

    Raises:
        InputError: A text has no tokens, or the number of its placeholders differs from the number of its images.
    """
    check_text("the prompt", list(texts))
    token = getattr(processor, "image_token", None)
    counts = [text.count(token) if token else 0 for text in texts]
    images = images_of(images, len(texts), counts)
    texts = [_with_places(processor, *row) for row in zip(texts, counts, map(len, images))]
    if len(texts) > 1:
        if processor.tokenizer.pad_token is None:
            raise InputError(
                "texts of several lengths need a padding token, and the tokenizer has none: "
                "model.tokenizer.pad_token = model.tokenizer.eos_token"
            )
        more |= {"padding": True, "padding_side": "left" if left else "right"}
    given = {"images": images} if any(images) else {}
    try:
        values = processor(text=texts, **given, return_tensors="pt", **more)
    except (ValueError, TypeError, IndexError) as error:
        raise InputError(f"{type(processor).__name__} cannot take this input: {error}") from error
    if "attention_mask" in values and not values["attention_mask"].any(-1).all():
        raise InputError("the prompt is empty: pass at least one word, or an image")
    return {name: value for name, value in values.items() if name not in _ONLY_FOR_TRAINING}


def process_chats(processor: Any, chats: Sequence[list[Mapping]], images: Any, left: bool) -> dict[str, Any]:
    """Return the model inputs for chats, with the processor's chat template.

    Images are part of the messages (`{"type": "image", "image": image}`) or are passed as `images`. Passed images go
    to the image blocks of the messages, or else to the first user message."""
    if getattr(processor, "chat_template", None) is None:
        raise InputError("the processor has no chat template: pass text instead, or use a chat model")
    inside = [_images_within(chat) for chat in chats]
    if images is not None:
        if any(inside):
            raise InputError("images are either part of the messages or passed with images=, not both")
        places = [sum(_is_image(block) for message in chat for block in _blocks(message)) for chat in chats]
        inside = images_of(images, len(chats), places)
        chats = [chat if n else _with_blocks(chat, len(own)) for chat, n, own in zip(chats, places, inside)]
    chats = [[_plain(message) for message in chat] for chat in chats]
    try:
        texts = processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # templates raise their own errors
        raise InputError(f"the chat template cannot take these messages: {reason_of(error)}") from error
    begin = processor.tokenizer.bos_token
    again = {"add_special_tokens": False} if begin and texts[0].startswith(begin) else {}
    return process(processor, texts, inside if any(inside) else None, left, **again)


# ---- placeholders


def _with_places(processor: Any, text: str, places: int, images: int) -> str:
    if not places and images:
        return placeholder(processor) * images + text
    if places != images:
        raise InputError(
            f"the text has {places} placeholder{'s' * (places != 1)} {processor.image_token!r}, but "
            f"{images or 'no'} image{'s' * (images != 1)} {'were' if images != 1 else 'was'} passed: {text!r}"
        )
    return text


def placeholder(processor: Any) -> str:
    """Return the placeholder of an image in a text, as the processor's chat template writes it.

    For example "<image>", or "<|vision_start|><|image_pad|><|vision_end|>" for Qwen2-VL. Without a template, the
    placeholder is the image token, between start and end tokens of an image if the tokenizer has them."""
    token = getattr(processor, "image_token", None)
    if token is None:
        return ""
    written = _in_template(processor)
    if token in written:
        return written
    known = processor.tokenizer.get_added_vocab()
    marks = ("<|vision_start|>", "<|vision_end|>")
    return f"{marks[0]}{token}{marks[1]}" if all(mark in known for mark in marks) else token


def _in_template(processor: Any) -> str:
    """Return the text that the chat template inserts for an image before a text."""
    if getattr(processor, "chat_template", None) is None:
        return ""
    text = {"type": "text", "text": "X"}
    both = [[{"role": "user", "content": content}] for content in ([text], [{"type": "image"}, text])]
    try:
        without, with_image = processor.apply_chat_template(both, tokenize=False)
    except Exception:  # a template for another kind of chat
        return ""
    differ = (i for i, (a, b) in enumerate(zip(without, with_image)) if a != b)
    start = next(differ, len(without))
    return with_image[start : start + len(with_image) - len(without)]


# ---- messages


def _is_message(item: Any) -> bool:
    return isinstance(item, Mapping) and "role" in item and "content" in item


def _blocks(message: Mapping) -> list[Mapping]:
    content = message["content"]
    return [block for block in content if isinstance(block, Mapping)] if isinstance(content, (list, tuple)) else []


def _is_image(block: Mapping) -> bool:
    return block.get("type") in ("image", "image_url")


def _images_within(chat: list[Mapping]) -> list[Any]:
    found = []
    for block in (block for message in chat for block in _blocks(message) if _is_image(block)):
        if block["type"] == "image_url":
            url = block["image_url"]
            found.append(url["url"] if isinstance(url, Mapping) else url)
        found += [block[name] for name in _IN_MESSAGES if name in block]
    return found


def _plain(message: Mapping) -> dict[str, Any]:
    """Return a message whose image blocks only mark where its images are."""
    if isinstance(message["content"], str):
        return dict(message)
    content = [{"type": "image"} if isinstance(b, Mapping) and _is_image(b) else b for b in message["content"]]
    return {**message, "content": content}


def _with_blocks(chat: list[Mapping], images: int) -> list[Mapping]:
    """Return the chat with images before the first user message."""
    index = next((i for i, message in enumerate(chat) if message["role"] == "user"), 0)
    content = chat[index]["content"]
    content = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    message = {**chat[index], "content": [{"type": "image"}] * images + content}
    return [*chat[:index], message, *chat[index + 1 :]]
