"""What a conversion is dealt out as: everything once, the largest first, evenly."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import loftq_cli
from loftq_cli.checkpoint.journal import Unit
from loftq_cli.checkpoint.request import Request
from loftq_cli.conversion.jobs import Held, Job, claim, jobs, shares
from loftq_cli.conversion.prepare import prepare
from loftq_cli.machine.observer import Observer
from loftq_cli.planning.plan import Plan, PlannedShard
from loftq_cli.settings.options import Options
from tests.support import checkpoints


def planned(directory: Path, **chosen: object) -> Plan:
    model = directory / "model"
    if not model.exists():
        checkpoints.write(model, checkpoints.llama(layers=2), cuts=(6, 13))
    options = Options(**{"threads": 1, "rank": 4, **chosen})
    return prepare(Request(str(model)), directory / "out", options, observer=Observer())[0]


def test_every_tensor_is_in_one_job_and_every_shard_is_read_once(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    found = jobs(plan)
    named = [tensor.name for job in found for tensor in (*job.matrices, *job.kept)]
    assert sorted(named) == sorted(tensor.name for tensor in plan.source.tensors)
    rests = [job.shard.name for job in found if not job.matrices]
    assert sorted(rests) == sorted(shard.name for shard in plan.shards)
    assert min(job.cost for job in found) > 0
    # What takes as long as a disk does, whatever the device, is begun first.
    assert [bool(job.matrices) for job in found] == [False] * 3 + [True] * 14
    costs = [job.cost for job in found[3:]]
    assert costs == sorted(costs, reverse=True)
    assert "mlp" in found[3].matrices[0].name


@pytest.mark.parametrize(("full", "together"), [(False, 1), (True, 3)])
def test_what_full_statistics_weight_alike_stays_together(
    full: bool, together: int, tmp_path: Path
) -> None:
    names = [f"model.layers.0.self_attn.{each}_proj.weight" for each in "qkv"]
    moments = loftq_cli.Moments(64, full=full)
    moments.add(torch.randn(200, 64, generator=torch.Generator().manual_seed(0)))
    plan = planned(tmp_path)
    path = tmp_path / "stats"
    loftq_cli.save_statistics(path, dict.fromkeys(names, moments), model=tmp_path / "model")
    plan = planned(tmp_path, stats=str(path))
    groups = [[tensor.name for tensor in job.matrices] for job in jobs(plan)]
    assert max(map(len, groups)) == together
    assert not full or sorted(names) in [sorted(group) for group in groups]


def of_costs(costs: list[int]) -> list[Job]:
    shard = PlannedShard(None, "shard", ())
    return [Job(shard, (), (), cost) for cost in sorted(costs, reverse=True)]


def loads(dealt: list[list[Job]]) -> list[int]:
    return [sum(job.cost for job in share) for share in dealt]


@given(st.lists(st.integers(1, 1000), max_size=60), st.integers(1, 9))
def test_shares_are_even_and_leave_nothing_out(costs: list[int], count: int) -> None:
    dealt = shares(of_costs(costs), count)
    assert len(dealt) == count
    assert sorted(job.cost for share in dealt for job in share) == sorted(costs)
    assert max(loads(dealt)) - min(loads(dealt)) <= max(costs, default=0)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(1, 3))
def test_no_way_of_dealing_out_is_better_by_more_than_a_quarter(
    costs: list[int], count: int
) -> None:
    """Graham 1969: at most 4/3 - 1/(3 count) times the best, which is found by trying them all."""
    best = min(
        max(sum(c for c, w in zip(costs, whose, strict=True) if w == n) for n in range(count))
        for whose in itertools.product(range(count), repeat=len(costs))
    )
    worst = max(loads(shares(of_costs(costs), count)))
    assert worst <= (4 / 3 - 1 / (3 * count)) * best + 1e-9


def test_a_counter_gives_each_job_to_one_and_leaves_out_what_is_done(tmp_path: Path) -> None:
    found = jobs(planned(tmp_path))
    done = next(job for job in found if job.matrices)
    (name,) = (tensor.name for tensor in done.matrices)
    before = Held({name: Unit(name, "", {}, {})}, {})
    counter = itertools.count()
    ranks = [claim(lambda: next(counter), found, before) for _ in range(3)]
    taken = [next(rank) for _ in range(4) for rank in ranks]
    taken += [job for rank in ranks for job in rank]
    assert taken == [job for job in found if job is not done]
