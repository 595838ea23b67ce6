"""Every number of every option has limits, and they are kept on every way in."""

import inspect
import math
from dataclasses import is_dataclass
from typing import get_args, get_type_hints

import pytest

import blockdiffusion
from blockdiffusion.cli import COMMANDS
from blockdiffusion.errors import UserError
from blockdiffusion.limits import LIMITS, check_limit
from blockdiffusion.train.recipe import Recipe
from tests.command import blockdiff


def numeric(hint):
    return {int, float} & {hint, *get_args(hint)}


def options_of(command):
    """The numeric options of a command."""
    hints = get_type_hints(command)
    for name, parameter in inspect.signature(command).parameters.items():
        hint = hints.get(name, parameter.annotation)
        hint = getattr(hint, "__origin__", hint) if hasattr(hint, "__metadata__") else hint
        if numeric(hint):
            yield name


def options_of_commands():
    return (name for command in COMMANDS.values() for name in options_of(command))


def options_of_recipes(kind, prefix=""):
    for name, hint in get_type_hints(kind).items():
        if is_dataclass(hint):
            yield from options_of_recipes(hint, f"{name}.")
        elif numeric(hint):
            yield prefix + name


def test_every_number_of_a_command_is_in_the_table():
    names = set(options_of_commands())
    assert len(names) > 35 and names <= LIMITS.keys()


def test_every_number_of_a_recipe_is_in_the_table():
    names = set(options_of_recipes(Recipe))
    assert len(names) > 30
    missing = {n for n in names if not {n, n.rpartition(".")[2]} & LIMITS.keys()}
    # Lists, whose owners look into them.
    assert missing == {"optim.betas", "search.widths", "train.block_sizes"}


@pytest.mark.parametrize("name", sorted(LIMITS))
def test_what_lies_beyond_a_limit_is_refused(name):
    limit = LIMITS[name]
    check_limit(name, None)
    beyond = [True, "1", [1], "x" * 10**6, float("nan")]
    for value, is_open in ((limit.least, limit.open_least), (limit.most, limit.open_most)):
        if is_open:
            beyond.append(value)
        else:
            check_limit(name, value)
    if math.isfinite(limit.most):
        beyond += [limit.least - 1, limit.most * 2, -(10**5000), 10**5000, math.inf]
    for value in beyond:
        with pytest.raises(UserError) as told:
            check_limit(name, value)
        assert len(str(told.value)) < 300 and str(told.value).startswith(f"{name} is ")


@pytest.mark.parametrize(
    "call",
    [
        lambda model: blockdiffusion.generate(model, num_samples=2**40),
        lambda model: blockdiffusion.generate(model, max_new_tokens=2**40),
        lambda model: blockdiffusion.generate(model, sampler="ancestral", steps=2**40),
        lambda model: blockdiffusion.generate(model, temperature=float("nan")),
        lambda model: blockdiffusion.generate(model, top_k=10**5000),
        lambda model: blockdiffusion.Engine(model, max_rows=2**40),
        lambda model: blockdiffusion.likelihood(model, [[1, 2, 3, 4]], mc_samples=2**40),
        lambda model: blockdiffusion.likelihood(model, [[1, 2, 3, 4]], target_stderr=float("nan")),
        # Each of these alone is allowed, and all of them together are more than a machine holds.
        lambda model: blockdiffusion.generate(model, num_samples=2**20, max_new_tokens=2**24),
        lambda model: blockdiffusion.infill(
            model, [[1, model.config.mask_id]], num_samples=2**20, top_k=10**9
        ),
        lambda model: blockdiffusion.Engine(model, max_rows=2**20, max_tokens=2**24),
    ],
)  # fmt: skip
def test_the_python_interface_keeps_them_too(tiny_law, call):
    with pytest.raises(UserError):
        call(tiny_law)


@pytest.mark.parametrize("text", ["bpe:" + "9" * 5000, "bpe:99999999", "bpe:²", "bpe:"])
def test_sizes_of_a_bpe(text, tmp_path):
    run = blockdiff("prepare", tmp_path, "--out", tmp_path / "o", "--tokenizer", text)
    assert run.returncode == 2 and "bpe:SIZE" in run.stderr and len(run.stderr) < 300
