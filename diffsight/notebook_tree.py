"""The tree of a model as HTML for notebooks, in which every module with children can be folded."""

import html
import re

_STYLE = "font:13px/1.5 ui-monospace,monospace;white-space:pre;overflow-x:auto"


def folded(text: str) -> str:
    """Return the printed tree of a module as HTML. The first level is open.

    Args:
        text: Lines as PyTorch prints modules: a line that ends with "(" opens a part, and a line ")" ends it.
    """
    lines, depth = [], 0
    for line in text.splitlines():
        if line.endswith("("):
            lines.append(f"<details{' open' if not depth else ''}><summary>{html.escape(line.strip()[:-1])}</summary>")
            lines.append('<div style="padding-left:1.5em">')
            depth += 1
        elif re.fullmatch(r" *\)", line) and depth:
            lines.append("</div></details>")
            depth -= 1
        else:
            lines.append(f"<div>{html.escape(line.strip())}</div>")
    return f'<div style="{_STYLE}">{"".join(lines)}{"</div></details>" * depth}</div>'
