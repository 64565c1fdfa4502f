"""Which of several processes this is, by what launchers leave in the environment."""

from __future__ import annotations

import pytest

from loftq_cli.errors import UsageError
from loftq_cli.machine.launched import Place, local, place

TORCH = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "first",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
}


def test_what_torchrun_and_accelerate_set_is_taken() -> None:
    assert place(TORCH) == Place(3, 8, 1, 2, "first", 29500)
    assert local(TORCH) == (1, 2)
    elastic = {**TORCH, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert place(elastic) == Place(3, 8, 1, 2, "first", 29500, served=True)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"RANK": "0"},
        {"WORLD_SIZE": "4"},
        {**TORCH, "WORLD_SIZE": "1", "RANK": "0"},
        # A batch script of Slurm, and the shell of salloc.
        {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        # mpirun's processes are children of one task a node.
        {**SLURM, "OMPI_COMM_WORLD_RANK": "0"},
    ],
)
def test_a_process_that_is_alone_is_known(environment: dict[str, str]) -> None:
    assert place(environment) is None
    assert local(environment) == (0, 1)


def test_tasks_of_srun_are_taken_and_meet_at_the_first_host() -> None:
    found = place(SLURM)
    assert found is not None
    assert (found.rank, found.size, found.local_rank, found.local_size) == (5, 7, 1, 3)
    assert found.address == "gpu03"
    assert found.port == place({**SLURM, "SLURM_PROCID": "0"}).port
    # Steps side by side, and jobs, meet elsewhere.
    assert found.port != place({**SLURM, "SLURM_STEP_ID": "1"}).port
    assert 1024 < found.port < 32_768
    chosen = place({**SLURM, "MASTER_ADDR": "here", "MASTER_PORT": "1234"})
    assert chosen is not None
    assert (chosen.address, chosen.port) == ("here", 1234)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu3", "gpu3"),
        ("gpu[3,7-9]", "gpu3"),
        ("gpu[007-009],login", "gpu007"),
        ("a,b", "a"),
        ("rack[1-2]-gpu", "rack1-gpu"),
    ],
)
def test_the_first_host_of_a_list_of_slurm_s(nodes: str, first: str) -> None:
    found = place({**SLURM, "SLURM_STEP_NODELIST": nodes})
    assert found is not None
    assert found.address == first


def test_tasks_on_one_host_need_no_name_for_it() -> None:
    found = place(
        {
            **SLURM,
            "SLURM_STEP_NUM_NODES": "1",
            "SLURM_STEP_TASKS_PER_NODE": "7",
            "SLURM_NODEID": "0",
        }
    )
    assert found is not None
    assert (found.address, found.local_size) == ("127.0.0.1", 7)
    several = {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2(x2),3", "SLURM_NODEID": "2"}
    assert local(several) == (1, 3)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"RANK": "8"}, "rank 8 of 8"),
        ({"RANK": "-1"}, "rank -1 of 8"),
        ({"RANK": "x"}, "RANK='x' is not a number"),
        ({"MASTER_PORT": "0"}, "at port 0"),
        ({"MASTER_PORT": ""}, "MASTER_PORT='' is not a number"),
    ],
)
def test_what_contradicts_itself_is_refused(changed: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        place({**TORCH, **changed})


def test_what_is_missing_is_named() -> None:
    with pytest.raises(UsageError, match="MASTER_ADDR and MASTER_PORT are not set"):
        place({"RANK": "0", "WORLD_SIZE": "2"})
