"""The README is short, has the two commands that set diffsight up, and its links lead somewhere; the pages name all."""

import re
from pathlib import Path

import diffsight

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_is_short():
    assert len(TEXT.splitlines()) <= 150


def test_the_readme_has_the_two_commands():
    prompt = "a red circle below a blue square on a gray background"
    assert f'\npip install -c constraints.txt -e . && diffsight lens "{prompt}"\n' in TEXT
    assert '\npip install -c constraints.txt -e ".[test]" && pytest -n 2 --dist loadfile\n' in TEXT


def test_the_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert len(links) > 20
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_name_of_the_package_is_in_the_documentation():
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md"))
    assert [name for name in diffsight.__all__ if not re.search(rf"\b{name}\b", pages)] == []
