"""A model in a notebook: its printed tree, with parts that fold."""

import html
import re

import torch
from torch import nn

from diffsight import Model


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU()))
        self.head = nn.Linear(2, 1)

    def forward(self, x):
        return self.head(self.body(x))

    def extra_repr(self):
        return "<b>&"


def lines_of(shown):
    """Return the texts of a folded tree, without its tags."""
    text = re.sub(r"<[^>]*>", "\n", shown)
    return [html.unescape(line) for line in text.splitlines() if line]


def test_every_line_of_the_tree_is_there():
    for part in (Model(Net()), Model(Net()).body, Model(nn.Linear(2, 2))):
        printed = [line.strip().removesuffix("(") for line in repr(part).splitlines() if line.strip() != ")"]
        assert lines_of(part._repr_html_()) == printed


def test_parts_fold_and_the_first_level_is_open():
    shown = Model(Net())._repr_html_()
    assert shown.count("<details") == shown.count("</details>") == 3
    assert shown.count("<details open>") == 1
    assert shown.count("<div") == shown.count("</div>")
    assert "<b>" not in shown


def test_a_model_is_shown_without_being_run():
    model = Model(Net())
    with model.trace(torch.ones(1, 2)) as run:
        assert "Linear" in run.body._repr_html_()
        assert run.head.output.shape == (1, 1)
