"""Check that text can be encoded, before a tokenizer, a file or a terminal fails on it."""

from typing import Any

from diffsight.errors import InputError


def check_text(name: str, value: Any) -> None:
    """Raise InputError if a string, or any string in a list, contains a character that is not valid Unicode.

    Such a character stands for a byte that could not be decoded, or is half of a surrogate pair.

    Args:
        name: The name of the value, for the message.
        value: A string, or a list of them. Anything else is left alone.
    """
    for text in value if isinstance(value, (list, tuple)) else [value]:
        if not isinstance(text, str):
            continue
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{name} is not valid Unicode text: the character at position {error.start} is "
                f"{text[error.start]!r}, half of a surrogate pair or a byte that could not be decoded"
            ) from None
