"""Values that a scan knows, such as masks and lengths, and the error for those that it does not know."""

import copy
import inspect
import io
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import is_fake

from diffsight import DiffsightError, Model
from diffsight.errors import ScanError
from models.nets import WIDTH, Calling, linear

pytestmark = pytest.mark.usefixtures("no_mode_is_left")


ASKING = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "if": lambda x: 1 if (x > 0).all() else 0,
    "list": lambda x: x.tolist(),
    "numpy": lambda x: x.detach().numpy(),
    "format": lambda x: f"{x.sum():.2f}",
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "unique": lambda x: x.unique(),
    "index": lambda x: range(4)[x.sum().long()],
    "equal": lambda x: torch.equal(x, x + 1),
}


@pytest.mark.parametrize("ask", ASKING.values(), ids=ASKING)
def test_the_model_asks_for_values(x, ask):
    class Asking(nn.Module):
        def forward(self, x):
            ask(x)
            return x

    net = nn.Sequential(OrderedDict(first=linear(), inner=nn.Sequential(linear(), Asking())))
    with pytest.raises(ScanError, match=r"inner\[1\] asks for the values of a tensor") as caught:
        Model(net).scan(x).result
    assert f"{__file__}:{ask.__code__.co_firstlineno}" in str(caught.value)
    assert "cannot go past this line" in str(caught.value)
    net(x)


@pytest.mark.parametrize("ask", ASKING.values(), ids=ASKING)
def test_the_body_asks_for_values(some, x, ask):
    with pytest.raises(DiffsightError, match="the body asks for the values"):
        with Model(some).scan(x) as run:
            ask(run.layers[0].output)


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPYING = {"deepcopy": copy.deepcopy, "pickle": lambda net: pickle.loads(pickle.dumps(net)), "save": saved}


@pytest.mark.parametrize("copied", COPYING.values(), ids=COPYING)
def test_copies_that_the_body_makes_of_a_model_have_weights(x, copied):
    net = nn.Sequential(linear(), nn.BatchNorm1d(WIDTH), linear())
    net[2].weight = net[0].weight
    right = net.state_dict(keep_vars=True)
    with Model(net).scan(x) as run:
        assert run[0].output.shape == (2, WIDTH)
        other = copied(net)
        buffer = copied(net[1].running_var)
        assert not is_fake(other.eval()(x))
    assert torch.equal(buffer, right["1.running_var"])
    found = other.state_dict(keep_vars=True)
    assert other[2].weight is other[0].weight and found.keys() == right.keys()
    for name, value in found.items():
        assert type(value) is type(right[name]) and value is not right[name]
        assert torch.equal(value, right[name])


@pytest.mark.parametrize("save", [pickle.dumps, saved])
def test_tensors_without_values_are_not_saved(some, x, save):
    with pytest.raises(ScanError, match="the body asks for the values"), Model(some).scan(x) as run:
        save(run.layers[0].output)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("is_inside", [False, True])
def test_a_function_that_has_no_version_for_shapes(x, is_inside):
    net = torch.ao.quantization.quantize_dynamic(nn.Sequential(linear(), nn.ReLU()), {nn.Linear})
    if is_inside:
        net = Calling(lambda self, x: self.part[0](x), part=net)
    with pytest.raises(ScanError, match=r"a function .*that PyTorch cannot compute on shapes alone") as caught:
        Model(net).scan(x).result
    line = inspect.getsourcelines(test_a_function_that_has_no_version_for_shapes)[1] + 5
    place = f"{__file__}:{line}" if is_inside else "quantized/dynamic/modules/linear.py"
    assert "(linear_dynamic, at " in str(caught.value) and place in str(caught.value)
    assert ("run.part[0].skip" if is_inside else "run[0].skip") in str(caught.value)


def test_other_errors_of_the_model_are_its_own(x, caplog):
    net = Calling(lambda self, x: self.part(x[:, :2]), part=linear())
    with pytest.raises(RuntimeError, match="reduction dim") as caught:
        Model(net).scan(x).result
    assert not isinstance(caught.value, ScanError)
    assert not caplog.records, "PyTorch logs errors of fake tensors, with a traceback"


def test_numbers_and_masks_that_come_in_are_known(x):
    """They are known while they depend on nothing else: models look at masks, and count tokens."""
    seen = {}

    def forward(self, x, ids, mask):
        places = torch.arange(ids.shape[1], device=ids.device)[None] * mask
        seen.update(
            all=bool(mask.all()), top=places.max().item(), count=int((ids == 7).sum()), last=ids.argmax(-1).tolist()
        )
        ids[0, 0] = x.argmax()
        return x[:, places.max() :]

    net = Calling(forward)
    given = torch.tensor([[3, 7, 1, 7]]), torch.tensor([[1, 1, 1, 0]])
    run = Model(net).scan(x, *given)
    assert run.result.shape == (2, 2)
    assert seen == {"all": False, "top": 2, "count": 2, "last": [1]}
    assert given[0].tolist() == [[3, 7, 1, 7]]


def test_masks_that_a_model_makes_itself_are_known(x):
    """A mask is made of ones, or by writing into zeros; the inputs themselves are not written to."""
    seen = {}

    def forward(self, x, lengths):
        ones = torch.ones(x.shape[:2], device=x.device)
        ends = torch.zeros(len(lengths), x.shape[1], dtype=torch.long, device=x.device)
        ends[torch.arange(len(lengths), device=x.device), lengths - 1] = 1
        mask = ends.flip(-1).cumsum(-1).flip(-1).bool()
        lengths[0] = 9
        seen.update(all=bool(ones.bool().all()), mask=mask.tolist(), lengths=lengths.tolist())
        return x[mask]

    lengths = torch.tensor([1, 3])
    assert Model(Calling(forward)).scan(x[:, :3], lengths).result.shape == (4, *x.shape[2:])
    assert seen == {"all": True, "mask": [[True, False, False], [True, True, True]], "lengths": [9, 3]}
    assert lengths.tolist() == [1, 3]


def test_products_by_groups(x):
    """Mixtures of experts use them: tokens sorted by expert, and the end of each expert's tokens."""
    weights = torch.randn(3, 16, 8)

    def forward(self, tokens, ends):
        return nn.functional.grouped_mm(tokens, weights.to(tokens.device), offs=ends)

    for dtype in (torch.float32, torch.bfloat16):
        run = Model(Calling(forward)).scan(torch.randn(6, 16, dtype=dtype), torch.tensor([2, 4, 6], dtype=torch.int32))
        assert (run.result.shape, run.result.dtype) == ((6, 8), dtype)


def test_numbers_that_depend_on_more_are_not_known(x):
    def forward(self, x, ids):
        ids = ids.clone()
        ids += x.argmax(-1)
        return ids.max().item()

    with pytest.raises(ScanError):
        Model(Calling(forward)).scan(x, torch.tensor([3, 7])).result


def test_values_of_floats_are_never_known(x):
    """Not even of small ones, and not as zeros."""

    def forward(self, x):
        return x if torch.isnan(x).any() else x + 1

    with pytest.raises(ScanError, match="__bool__"):
        Model(Calling(forward)).scan(x).result


def test_values_that_are_written_over_are_not_known(x):
    def forward(self, x):
        counts = torch.zeros(2, dtype=torch.long, device=x.device)
        assert counts.tolist() == [0, 0]
        counts[1] = x.argmax()
        return counts.tolist()

    with pytest.raises(ScanError, match="tolist"):
        Model(Calling(forward)).scan(x).result


def test_repeats_and_masks_beside_unknown_values(x):
    def forward(self, x, repeats, mask):
        x = x.repeat_interleave(repeats, 0)
        x[:, mask] = 0
        return x[:, mask]

    given = x, torch.tensor([1, 3]), torch.tensor([True, False, True, True])
    assert Model(Calling(forward)).scan(*given).result.shape == Calling(forward)(*given).shape == (4, 3)
