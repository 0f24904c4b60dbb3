"""Read prompts from text files or the tables of benchmarks, and pairs of a question and an answer.

read_prompts(Path("PartiPrompts.tsv"))      # a column called "Prompt"
read_prompts(Path("geneval.jsonl"))         # an object in each line, with a key "prompt"
read_prompts(Path("color_val.txt"))         # T2I-CompBench: a prompt in each line
read_pairs(Path("antonyms.tsv"))            # [("hot", "cold"), ...]
"""

import csv
import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

from diffsight.errors import InputError

_NAMES = ("prompt", "text", "caption")  # of a column or a key, ignoring case


def read_prompts(path: Path) -> list[str]:
    """Return the prompts in a file. Empty lines are skipped.

    Raises:
        InputError: The file cannot be read, is not UTF-8 text, has no prompts, or has a row without one.
    """
    text = _text_of(path)
    lines = [line for line in StringIO(text, newline=None) if line.strip()]  # other separators are part of a prompt
    kinds = {".tsv": _of_table, ".csv": _of_table, ".jsonl": _of_objects, ".ndjson": _of_objects}
    found = [prompt.strip() for prompt in kinds.get(path.suffix.lower(), iter)(lines)]
    if not any(found):
        raise InputError(f"{path} has no prompts")
    if not all(found):
        raise InputError(f"row {found.index('') + 1} of {path} has no prompt: write one, or remove the row")
    return found


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """Return the pairs in a file. Each line contains a question, a tab and an answer.

    Raises:
        InputError: The file cannot be read, is not UTF-8 text, or contains a line that is not a pair.
    """
    found = []
    for number, line in enumerate(StringIO(_text_of(path), newline=None), 1):
        if line.strip():
            pair = tuple(part.strip() for part in line.split("\t"))
            if len(pair) != 2 or not all(pair):
                raise InputError(
                    f"line {number} of {path} is not a question, a tab and an answer: {line.strip()[:50]!r}"
                )
            found.append(pair)
    if not found:
        raise InputError(f"{path} has no pairs")
    return found


def _text_of(path: Path) -> str:
    try:
        return path.expanduser().read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text, from byte {error.start} on: convert it first") from None
    except (OSError, ValueError, RuntimeError) as error:  # such as a null byte, or an unknown home directory
        reason = getattr(error, "strerror", None) or error
        hint = ". A prompt itself is written without an option" if isinstance(error, FileNotFoundError) else ""
        raise InputError(f"the prompts cannot be read: {path}: {reason}{hint}") from None


def _of_table(lines: list[str]) -> Iterator[str]:
    if not lines:
        return iter(())
    has_tabs = "\t" in lines[0]
    try:
        return iter(_column_of(csv.DictReader(lines, dialect="excel-tab" if has_tabs else "excel", strict=True)))
    except csv.Error as error:
        if not has_tabs:
            raise InputError(
                f"the table of prompts is damaged: {error}. A quote inside a quoted text must be doubled"
            ) from None
    return iter(_column_of(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)))  # the quotes are text


def _column_of(rows: csv.DictReader) -> list[str]:
    names = {name.strip('"'): name for name in rows.fieldnames or []}
    column = names[_known(names, "there is no column")]
    return [row[column] or "" for row in rows]


def _of_objects(lines: list[str]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            raise InputError(f"object {number} of the prompts is not JSON: {line[:60]!r}") from None
        if isinstance(found, dict):
            found = found[_known(found, f"object {number} has no key")]
        if not isinstance(found, str):
            raise InputError(f"the prompt of object {number} is not a text: {line.strip()[:60]}")
        yield found


def _known(names: object, missing: str) -> str:
    """Return the first name that identifies prompts."""
    found = next((name for wanted in _NAMES for name in names if str(name).lower() == wanted), None)
    if found is None:
        raise InputError(f"{missing} `prompt`, only {', '.join(map(str, names))}")
    return found
