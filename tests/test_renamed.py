"""The old names of modules that moved."""

import importlib
import subprocess
import sys

import pytest

from blockdiffusion.renamed import MOVED, MOVED_NAMES, new_name


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_is_the_module_itself(old):
    with pytest.warns(DeprecationWarning, match=MOVED[old]):
        sys.modules.pop(f"blockdiffusion.{old}", None)
        module = importlib.import_module(f"blockdiffusion.{old}")
    assert module is importlib.import_module(f"blockdiffusion.{MOVED[old]}")


@pytest.mark.parametrize("old", MOVED_NAMES)
def test_an_old_name_in_a_module_is_the_object_itself(old):
    home, _, name = f"blockdiffusion.{old}".rpartition(".")
    new_home, _, new = f"blockdiffusion.{MOVED_NAMES[old]}".rpartition(".")
    with pytest.warns(DeprecationWarning, match=MOVED_NAMES[old]):
        found = getattr(importlib.import_module(home), name)
    assert found is getattr(importlib.import_module(new_home), new)
    assert not hasattr(importlib.import_module(home), "nothing")


def test_a_module_below_one_that_moved_is_loaded_once():
    code = (
        "from blockdiffusion.evaluate.report.page import ReportContents as old; "
        "from blockdiffusion.reports.page import ReportContents as new; assert old is new"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_names_that_did_not_move():
    assert new_name("blockdiffusion.sampling") is None
    assert new_name("blockdiffusion.models.transformer") is None
    assert new_name("torch.cache") is None
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("blockdiffusion.nowhere")
