"""Which of its values a function changes in place, as its bytecode shows.

    changed_in_place(hook.__code__)     # {"output"} for `output[:, 0] = 0`, {"self"} for `self.seen[name] = output`

The bytecode is followed from top to bottom with a stack that holds, for each value, the variables it may be a part of.
A method whose name ends in an underscore changes a tensor in place, by PyTorch's convention. What the functions that
are called do is not looked at.
"""

import dis
import re
from functools import cache
from types import CodeType

UNKNOWN = ""  # stands for a value that belongs to no variable by name
_NONE: frozenset[str] = frozenset()
_PUSH_NOTHING = re.compile(r"(STORE|POP|DELETE|RETURN|RAISE|RERAISE|END|LIST|SET|DICT|MAP|JUMP)_")
_CHANGED = {"STORE_ATTR": -1, "STORE_SUBSCR": -2, "STORE_SLICE": -3, "DELETE_SUBSCR": -2}  # where on the stack
_NEW = {"clone", "item", "mean", "norm", "sum", "shape", "len", "int", "float"}  # return values of their own
_DEPTH = 16  # values on the stack; no instruction reaches deeper
_KEYWORDS = {"inplace", "out"}  # with these, PyTorch's functions change a tensor in place


@cache
def changed_in_place(code: CodeType) -> frozenset[str]:
    """Return the variables of a function whose values, or parts of them, it changes in place."""
    found: set[str] = set()
    stack: list[frozenset[str]] = []
    variables: dict[str, frozenset[str]] = {}
    jumps: dict[int, list[frozenset[str]]] = {}  # where a jump leads to, and the stack there
    goes_on = True
    for step in dis.get_instructions(code):
        name, argument = step.opname, step.argval
        if (other := jumps.pop(step.offset, None)) is not None:
            stack = _merged(stack, other) if goes_on else other
        effect = dis.stack_effect(step.opcode, step.arg)
        stack = [_NONE] * max(0, _DEPTH + abs(effect) - len(stack)) + stack  # after a jump it may hold too little
        if fast := re.findall("(LOAD|STORE)_(?:FAST|DEREF|GLOBAL|NAME)", name):
            for kind, variable in zip(fast, argument if isinstance(argument, tuple) else (argument,)):
                if kind == "STORE":
                    variables[variable] = variables.get(variable, _NONE) | stack.pop()
                    continue
                if is_in_place(variable) and "GLOBAL" in name:
                    found.add(variable)
                stack += [variables.get(variable, frozenset({variable}))] * (effect if len(fast) == 1 else 1)
        elif name in ("LOAD_ATTR", "LOAD_METHOD"):
            value = stack.pop()
            found |= value if is_in_place(argument) else _NONE
            stack += [_NONE if argument in _NEW else value] * (effect + 1)
        elif name in _CHANGED:
            found |= stack[_CHANGED[name]]
            del stack[effect:]
        elif name in ("BINARY_SUBSCR", "BINARY_SLICE", "BINARY_OP"):
            value = stack[effect - 1]
            is_part = name != "BINARY_OP" or step.argrepr == "[]"
            if step.argrepr.endswith("="):
                found |= value
            stack[effect - 1 :] = [value if is_part or step.argrepr.endswith("=") else _NONE]
        elif name == "COPY":
            stack.append(stack[-argument])
        elif name == "SWAP":
            stack[-1], stack[-argument] = stack[-argument], stack[-1]
        elif name.startswith("UNPACK"):
            stack += [stack.pop()] * (effect + 1)
        elif name == "FOR_ITER":
            stack.append(stack[-1])
            jumps[argument] = stack[:-2]
        elif _PUSH_NOTHING.match(name):
            del stack[len(stack) + min(effect, 0) :]
        elif effect > 0:
            stack += [_NONE] * effect
        else:
            value = _NONE.union(*stack[effect - 1 :])
            stack[effect - 1 :] = [value if _NEW.isdisjoint(value) else _NONE]
        constant = code.co_consts[step.arg] if name == "KW_NAMES" else argument if name == "LOAD_CONST" else None
        if isinstance(constant, tuple) and not _KEYWORDS.isdisjoint(constant):
            found.add(UNKNOWN)
        if step.opcode in dis.hasjrel and name != "FOR_ITER" and "BACKWARD" not in name:
            jumps[argument] = _merged(stack, jumps.get(argument, stack))
        goes_on = not name.startswith(("JUMP_FORWARD", "JUMP_BACKWARD", "RETURN", "RAISE", "RERAISE"))
        if isinstance(argument, CodeType):
            inner = changed_in_place(argument)
            found |= {UNKNOWN if variable in argument.co_varnames else variable for variable in inner}
    return frozenset(found)


def _merged(stack: list[frozenset[str]], other: list[frozenset[str]]) -> list[frozenset[str]]:
    """Return the stack of a place that two ways lead to. The top of a stack is its end."""
    return [a | b for a, b in zip(stack[::-1], other[::-1])][::-1]


def is_in_place(name: str) -> bool:
    """Whether a function or method of this name changes a tensor in place, by PyTorch's convention."""
    return name.endswith("_") and not name.endswith("__") and name != "_"
