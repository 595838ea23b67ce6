"""What commands show where there is no terminal."""

from blockdiffusion import terminal


def test_a_log_file_gets_a_line_now_and_then(monkeypatch, capsys):
    clock = iter([0.0, 10.0, 40.0, 45.0, 80.0])
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    with terminal.progress_bar("eval") as report:
        for done in (1, 4, 5, 8):
            report("exact", done, 10)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["eval exact: 4 of 10, 0:01:00 left", "eval exact: 8 of 10, 0:00:20 left"]


def test_what_is_done_soon_prints_nothing(capsys):
    with terminal.progress_bar("prepare") as report:
        report("tokenise", 5, None)
    assert capsys.readouterr().err == ""
