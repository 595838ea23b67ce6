"""What processes share, and how they end together."""

import socket
import time

import pytest
import torch

from blockdiffusion.errors import UserError
from blockdiffusion.runtime import distributed as ranks
from blockdiffusion.runtime.distributed import SINGLE, ProcessGroup, process_group
from tests.command import blockdiff
from tests.launch import command, launch


def test_alone_nothing_is_asked_of_anybody():
    with process_group() as found:
        assert found is SINGLE
    assert SINGLE.share(6) == slice(0, 6) and SINGLE.is_mine(3) and SINGLE.is_first
    assert SINGLE.gather("a") == ["a"] and SINGLE.collect({1: "b", 0: "a"}) == ["a", "b"]
    assert SINGLE.sum(2.5) == 2.5 and SINGLE.max(3) == 3 and SINGLE.broadcast(lambda: 7) == 7


def test_shares_and_pieces_are_dealt_out_once():
    processes = [ProcessGroup(rank, 3, rank) for rank in range(3)]
    assert [i for p in processes for i in range(9)[p.share(9)]] == [*range(9)]
    assert all(sum(p.is_mine(number) for p in processes) == 1 for number in range(7))


def test_devices_are_one_for_each_process(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    cuda = torch.device("cuda")
    assert ProcessGroup(5, 8, 1).set_device(cuda) == cuda and chosen == [1]
    with pytest.raises(UserError, match="2 CUDA devices, too few for its process number 3"):
        ProcessGroup(2, 4, 2).set_device(cuda)
    with pytest.raises(UserError, match="several processes cannot train on mps"):
        ProcessGroup(0, 2, 0).set_device(torch.device("mps"))
    assert SINGLE.set_device(torch.device("mps")) == torch.device("mps")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc'"),
        ({"WORLD_SIZE": "9" * 30}, "WORLD_SIZE is '999"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2'"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "1", "RANK": "1"}, "RANK is '1'"),
        ({"RANK": "2"}, "RANK is '2'; it must be a whole number from 0 to 1"),
        ({"RANK": "1.0"}, "RANK is '1.0'"),
        ({"RANK": None}, "RANK is not set"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK is '2'"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT is '65536'"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not set"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"MASTER_ADDR": "no-such-machine.invalid"}, "MASTER_ADDR is 'no-such-machine.invalid'"),
        ({"MASTER_ADDR": "x" * 300}, "MASTER_ADDR is 'xxx"),
    ],
)
def test_variables_left_over_in_a_shell_are_named(monkeypatch, changed, said):
    monkeypatch.setattr(ranks, "SECONDS_TO_FIND", 1)
    whole = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in (whole | changed).items():
        if value is not None:
            monkeypatch.setenv(name, value)
    ended = blockdiff("eval", "no-model", "--data", "no-data")
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert said in ended.stderr and "unset" in ended.stderr


def test_a_job_of_one_needs_no_other_variable(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not ranks.several_processes()


def test_processes_that_cannot_meet_say_where(monkeypatch):
    with socket.socket() as other:  # somebody else's port
        other.bind(("127.0.0.1", 0))
        other.listen()
        values = ("2", "0", "127.0.0.1", str(other.getsockname()[1]))
        for name, value in zip(ranks.ENVIRONMENT, values, strict=True):
            monkeypatch.setenv(name, value)
        met = pytest.raises(UserError, match=f"could not meet at 127.0.0.1:{values[3]} ")
        with met, process_group():
            pass


def test_processes_do_not_wait_for_ever_for_one_that_is_nowhere(monkeypatch):
    monkeypatch.setattr(ranks, "SECONDS_TO_MEET", 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in zip(ranks.ENVIRONMENT, ("2", "1", "127.0.0.1", port), strict=True):
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    with pytest.raises(UserError, match=f"could not meet at 127.0.0.1:{port} "), process_group():
        pass
    assert time.monotonic() - began < 60


def exchange() -> None:
    with process_group() as outer, process_group() as processes:
        assert processes == outer
        rank = processes.rank
        assert processes.gather(f"of {rank}") == ["of 0", "of 1", "of 2"]
        assert processes.collect({5 - rank: rank}) == [2, 1, 0]
        assert processes.sum(0.1 * (rank + 1)) == (0.1 + 0.2) + 0.1 * 3
        assert processes.max(rank * (2 - rank)) == 1
        assert processes.broadcast(lambda: 10 + rank) == 10
        processes.barrier()
        print(rank)


def test_processes_tell_each_other():
    ended = launch(3, exchange)
    assert [(process.code, process.out) for process in ended] == [(0, f"{r}\n") for r in range(3)]


def fail(who: list[int], error: type[Exception]) -> None:
    from blockdiffusion.cli import main

    def work(*_: object, **__: object) -> None:
        with process_group() as processes:
            if processes.rank in who:
                raise error(f"process {processes.rank} is wrong")
            while True:
                processes.barrier()

    import blockdiffusion.cli

    blockdiffusion.cli.app = work
    main()


@pytest.mark.parametrize("who", [[0], [1], [2], [0, 1, 2]], ids=str)
def test_one_process_says_what_is_wrong_and_all_exit_with_2(who):
    ended = launch(3, fail, who, UserError)
    said = "".join(process.err for process in ended)
    assert said.count("\n") == 1 and "is wrong" in said and "Traceback" not in said
    assert [process.code for process in ended] == [2, 2, 2]


def test_a_fault_of_the_program_shows_its_trace_once():
    ended = launch(3, fail, [1], KeyError)
    assert "Traceback" in ended[1].err and "process 1 is wrong" in ended[1].err
    assert "another process of this job was killed or has failed" in ended[0].err
    assert ended[2].err == "" and all(process.code == 1 for process in ended)


def test_a_command_of_one_process_refuses_several():
    ended = launch(2, command, "prepare", "python-docs", "--out", "nowhere")
    assert sum("but prepare is the work of one; leave torchrun out" in p.err for p in ended) == 1
    assert [process.code for process in ended] == [2, 2]
