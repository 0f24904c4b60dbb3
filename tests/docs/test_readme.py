"""The README: short, with the two commands that set diffsight up, and with links that lead somewhere."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_short():
    assert len(TEXT.splitlines()) <= 150


def test_it_has_the_two_commands():
    prompt = "a red circle below a blue square on a gray background"
    assert f'\npip install -c constraints.txt -e . && diffsight lens "{prompt}"\n' in TEXT
    assert '\npip install -c constraints.txt -e ".[test]" && pytest -n 2 --dist loadfile\n' in TEXT


def test_its_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert len(links) > 20
    assert [link for link in links if not (ROOT / link).exists()] == []
