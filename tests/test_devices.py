import pytest
import torch

from blockdiffusion.devices import select_device
from blockdiffusion.errors import UserError


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert select_device("auto").type == "cpu" and select_device("cpu").type == "cpu"
    with pytest.raises(UserError, match=r"train\.device is cuda, but this machine has only cpu"):
        select_device("cuda", "train.device")
    with pytest.raises(UserError, match="--device is tpu"):
        select_device("tpu", "--device")


def test_auto_prefers_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert select_device("auto").type == "cuda"
