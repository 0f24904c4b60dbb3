"""Tokens as text in which every character is visible."""


def marked(text: str) -> str:
    """Return a token with a mark for a leading space, for line breaks, and for characters that cannot be printed."""
    text = text.replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
    text = "␣" + text[1:] if text.startswith(" ") else text
    return "".join(character if character.isprintable() else "□" for character in text) or "∅"
