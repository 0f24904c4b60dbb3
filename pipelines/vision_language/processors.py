"""What prepares texts and pictures for a vision-language model: its processor.

    values = process(processor, ["What is this?"], "cat.png", left=True)
    values["input_ids"], values["pixel_values"]

Where a text says nothing of its pictures, the placeholder that the processor replaces by image tokens is put before it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers

from diffsight.errors import InputError
from diffsight.pipelines.vision_language.images import pictures_of

_FAILURES = (OSError, ValueError, KeyError, ImportError, AttributeError, TypeError)
_IN_MESSAGES = ("image", "url", "path", "base64")  # where a message has its picture
_ONLY_FOR_TRAINING = ("labels",)


def load_processor(place: str | Path, **of_hub: Any) -> Any:
    """The processor in a folder or hub repository.

    Raises InputError where there is none, saying why."""
    try:
        found = transformers.AutoProcessor.from_pretrained(place, **of_hub)
    except _FAILURES as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        raise InputError(f"{place} has no processor that can be loaded: {type(error).__name__}: {reason}") from error
    return checked(found, str(place))


def checked(processor: Any, place: str = "") -> Any:
    """The processor, if it is one of texts and pictures; None stays None."""
    if processor is None or all(hasattr(processor, part) for part in ("image_processor", "tokenizer")):
        return processor
    what = f"{place} has only" if place else "a processor has a tokenizer and an image processor; this is"
    raise InputError(f"{what} a {type(processor).__name__}: VisionLanguageModel((model, processor)) takes another")


def texts_in(given: Any) -> list[str] | None:
    """The texts that a user gives, if it is texts."""
    if isinstance(given, str):
        return [given]
    if isinstance(given, (list, tuple)) and given and all(isinstance(text, str) for text in given):
        return list(given)
    return None


def chats_in(given: Any) -> list[list[Mapping]] | None:
    """The conversations that a user gives, if it is conversations: a message, a list of them, a list of such lists."""
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
    """Texts and pictures as the model takes them; several texts are padded, on the left or on the right.

    Raises InputError for an empty text, and where the placeholders in a text are not as many as its pictures."""
    for text in texts:
        if not text.strip():
            raise InputError("the prompt is empty: give at least one word")
    token = getattr(processor, "image_token", None)
    counts = [text.count(token) if token else 0 for text in texts]
    pictures = pictures_of(images, len(texts), counts)
    texts = [_with_places(processor, *row) for row in zip(texts, counts, map(len, pictures))]
    if len(texts) > 1:
        if processor.tokenizer.pad_token is None:
            raise InputError(
                "texts of several lengths need a padding token, and the tokenizer has none: "
                "model.tokenizer.pad_token = model.tokenizer.eos_token"
            )
        more |= {"padding": True, "padding_side": "left" if left else "right"}
    given = {"images": pictures} if any(pictures) else {}
    try:
        values = processor(text=texts, **given, return_tensors="pt", **more)
    except (ValueError, TypeError, IndexError) as error:
        raise InputError(f"{type(processor).__name__} cannot take this input: {error}") from error
    return {name: value for name, value in values.items() if name not in _ONLY_FOR_TRAINING}


def process_chats(processor: Any, chats: Sequence[list[Mapping]], images: Any, left: bool) -> dict[str, Any]:
    """Conversations as the model takes them, by the processor's chat template. Pictures stand in the messages
    (`{"type": "image", "image": picture}`), or are `images`, for the places that the messages have for them; where they
    have none, for the first of the user's messages."""
    if getattr(processor, "chat_template", None) is None:
        raise InputError("the processor has no chat template: give a text, or a model that was taught to chat")
    inside = [_pictures_within(chat) for chat in chats]
    if images is not None:
        if any(inside):
            raise InputError("pictures stand in the messages, or are given with images=, not both")
        places = [sum(_is_picture(block) for message in chat for block in _blocks(message)) for chat in chats]
        inside = pictures_of(images, len(chats), places)
        chats = [chat if n else _with_blocks(chat, len(own)) for chat, n, own in zip(chats, places, inside)]
    chats = [[_plain(message) for message in chat] for chat in chats]
    try:
        texts = processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # templates raise errors of their own
        raise InputError(f"the chat template cannot take these messages: {error}") from error
    begin = processor.tokenizer.bos_token
    again = {"add_special_tokens": False} if begin and texts[0].startswith(begin) else {}
    return process(processor, texts, inside if any(inside) else None, left, **again)


# ---- placeholders


def _with_places(processor: Any, text: str, places: int, pictures: int) -> str:
    if not places and pictures:
        return placeholder(processor) * pictures + text
    if places != pictures:
        raise InputError(
            f"the text has {places} placeholder{'s' * (places != 1)} {processor.image_token!r}, and "
            f"{pictures or 'no'} picture{'s' * (pictures != 1)} {'were' if pictures != 1 else 'was'} given: {text!r}"
        )
    return text


def placeholder(processor: Any) -> str:
    """What stands for one picture in a text, as the processor's chat template writes it: "<image>", for Qwen2-VL
    "<|vision_start|><|image_pad|><|vision_end|>"; without a template, the image token within the marks of a picture
    that the tokenizer knows."""
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
    """What the chat template adds for a picture before a text."""
    if getattr(processor, "chat_template", None) is None:
        return ""
    text = {"type": "text", "text": "X"}
    both = [[{"role": "user", "content": content}] for content in ([text], [{"type": "image"}, text])]
    try:
        without, with_picture = processor.apply_chat_template(both, tokenize=False)
    except Exception:  # a template for conversations of another kind
        return ""
    differ = (i for i, (a, b) in enumerate(zip(without, with_picture)) if a != b)
    start = next(differ, len(without))
    return with_picture[start : start + len(with_picture) - len(without)]


# ---- messages


def _is_message(item: Any) -> bool:
    return isinstance(item, Mapping) and "role" in item and "content" in item


def _blocks(message: Mapping) -> list[Mapping]:
    content = message["content"]
    return [block for block in content if isinstance(block, Mapping)] if isinstance(content, (list, tuple)) else []


def _is_picture(block: Mapping) -> bool:
    return block.get("type") in ("image", "image_url")


def _pictures_within(chat: list[Mapping]) -> list[Any]:
    found = []
    for block in (block for message in chat for block in _blocks(message) if _is_picture(block)):
        if block["type"] == "image_url":
            url = block["image_url"]
            found.append(url["url"] if isinstance(url, Mapping) else url)
        found += [block[name] for name in _IN_MESSAGES if name in block]
    return found


def _plain(message: Mapping) -> dict[str, Any]:
    """A message that only says where its pictures are."""
    if isinstance(message["content"], str):
        return dict(message)
    content = [{"type": "image"} if isinstance(b, Mapping) and _is_picture(b) else b for b in message["content"]]
    return {**message, "content": content}


def _with_blocks(chat: list[Mapping], pictures: int) -> list[Mapping]:
    """The conversation with pictures before the first of the user's messages."""
    index = next((i for i, message in enumerate(chat) if message["role"] == "user"), 0)
    content = chat[index]["content"]
    content = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
    message = {**chat[index], "content": [{"type": "image"}] * pictures + content}
    return [*chat[:index], message, *chat[index + 1 :]]
