"""metrics.jsonl and the adapters of other services."""

import errno
import importlib
import json
import sys
from types import SimpleNamespace

import pytest

from blockdiffusion.errors import UserError
from blockdiffusion.train.loggers import (
    JsonLines,
    LogOptions,
    cut_metrics,
    make_loggers,
    read_metrics,
)

VALUES = {"loss": 2.5, "valid_stderr_noise": None, "samples": ["größe"], "note": "n"}
SEARCH = {"clip": [0.25, 0.75], "clip_grid": [[0.25, 0.75, 0.5]], "search_seconds": 1.5}


def use(logger):
    logger.start({"train": {"steps": 3}}, 1)
    logger.log(1, {"loss": 3.0})
    logger.log(2, VALUES)
    logger.log(2, {"samples": ["only text"]})
    logger.log(2, SEARCH)
    logger.finish()


def test_json_lines_append_and_read_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    use(JsonLines(path))
    use(JsonLines(path))
    lines = read_metrics(path)
    assert lines[:2] == [{"step": 1, "loss": 3.0}, {"step": 2, **VALUES}]
    assert lines[3] == {"step": 2, **SEARCH}
    assert len(lines) == 8
    assert "größe" in path.read_text(encoding="utf-8")


def test_cutting_drops_later_steps_and_half_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 3, "loss": 1}\n{"st')
    cut_metrics(path, 2)
    assert path.read_text() == '{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n'
    cut_metrics(tmp_path / "new.jsonl", 0)
    assert (tmp_path / "new.jsonl").read_text() == ""


def test_a_full_disk_takes_back_the_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    logger = JsonLines(path)
    logger.start({}, 1)
    logger.log(1, {"loss": 3.0})
    real = logger._file

    class Full:
        fileno, truncate, close = real.fileno, real.truncate, real.close

        def write(self, line):
            real.write(line[:4])
            raise OSError(errno.ENOSPC, "No space left on device")

    logger._file = Full()
    with pytest.raises(
        UserError, match=r"the disk is full: the line of step 2 of .*metrics\.jsonl"
    ):
        logger.log(2, {"loss": 2.0})
    logger.finish()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 3.0}
    ]


class Service:
    """A stand-in for the modules of W&B and Trackio, which have the same calls."""

    def __init__(self):
        self.started, self.logged, self.finished = [], [], 0

    def init(self, **settings):
        self.started.append(settings)
        return SimpleNamespace(
            log=lambda values, step: self.logged.append((step, values)), finish=self.finish
        )

    def finish(self):
        self.finished += 1


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_services_get_numbers_and_resume_the_same_run(tmp_path, monkeypatch, name):
    service = Service()
    monkeypatch.setitem(sys.modules, name, service)
    out = tmp_path / "my-run"
    out.mkdir()
    for _ in range(2):
        (logger,) = make_loggers(LogOptions(loggers=(name,)), out)
        use(logger)
    first, second = service.started
    assert first == second
    assert first["name"] == "my-run" and first["config"] == {"train": {"steps": 3}}
    assert first["resume"] == "allow"
    found = {"search_seconds": 1.5, "clip_low": 0.25, "clip_high": 0.75}
    assert service.logged == 2 * [(1, {"loss": 3.0}), (2, {"loss": 2.5}), (2, found)]
    assert service.finished == 2


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, name):
    module = "torch.utils.tensorboard" if name == "tensorboard" else name
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"names {name}.*pip install 'blockdiffusion\[loggers\]'"):
        make_loggers(LogOptions(loggers=(name,)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_tensorboard_writes_event_files(tmp_path):
    pytest.importorskip("tensorboard")
    (logger,) = make_loggers(LogOptions(loggers=("tensorboard",)), tmp_path)
    use(logger)
    events = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    read = events.EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(n.step, n.value) for n in read.Scalars("loss")] == [(1, 3.0), (2, 2.5)]
    assert [(n.step, n.value) for n in read.Scalars("clip_high")] == [(2, 0.75)]
    assert {"samples/text_summary", "note/text_summary"} <= set(read.Tags()["tensors"])
