"""The old names of modules that moved."""

import importlib
import subprocess
import sys

import pytest

from blockdiffusion.renamed import MOVED, new_name


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_is_the_module_itself(old):
    with pytest.warns(DeprecationWarning, match=MOVED[old]):
        sys.modules.pop(f"blockdiffusion.{old}", None)
        module = importlib.import_module(f"blockdiffusion.{old}")
    assert module is importlib.import_module(f"blockdiffusion.{MOVED[old]}")


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
