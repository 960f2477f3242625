"""Fixtures: checkpoints, what transformers computes with them, and CUDA graphs without a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from checkpoints import STYLES, Oracle, build_oracle

from minidcp.batch import ForwardBatch, StepPlan
from minidcp.worker import prompt_graphs
from minidcp.worker.cuda_graph import CapturedStep, DecodeGraphs, GraphLadder
from minidcp.worker.model_runner import ModelRunner

Tensors = tuple[torch.Tensor, ...]

pytest.register_assert_rewrite("servers")
torch.set_num_threads(1)  # with many ranks on two cores, more threads would be ten times slower


@pytest.fixture(scope="session", params=["v2", "v2-lite"])
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return build_oracle(request.param, tmp_path_factory.mktemp)


@pytest.fixture(scope="session", params=sorted(STYLES))
def oracle_of_any_style(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Oracle:
    return build_oracle(request.param, tmp_path_factory.mktemp)


@pytest.fixture(scope="session")
def v2(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    return build_oracle("v2", tmp_path_factory.mktemp)


@pytest.fixture
def crowded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Admit requests without leaving room to grow, so that short requests are preempted too."""
    monkeypatch.setattr("minidcp.engine.scheduler.GROWTH", 0)


class EagerGraph:
    """Runs again what was captured, into the same outputs."""

    def __init__(self, run: Callable[[], Tensors]) -> None:
        self.run = run
        self.outputs = tuple(torch.full_like(x, 7) for x in run())

    def pool(self) -> int:
        return 1

    def replay(self) -> None:
        for output, value in zip(self.outputs, self.run(), strict=True):
            output.copy_(value)


@pytest.fixture
def eager_graphs(monkeypatch: pytest.MonkeyPatch) -> list[StepPlan]:
    """Graphs in name only, which run on a CPU. Gives the steps that they replay, on any rank."""
    replayed: list[StepPlan] = []
    allocate = ModelRunner.allocate_cache
    replay = DecodeGraphs.replay

    def capture(self: GraphLadder, run: Callable[[], Tensors]) -> CapturedStep:
        graph = EagerGraph(run)
        return CapturedStep(graph, graph.outputs, 0)

    def capture_piece(run: Callable[[], Tensors], pool: object, state: object) -> CapturedStep:
        return CapturedStep(EagerGraph(run), (), 0)

    def allocate_cache(self: ModelRunner, num_blocks: int) -> None:
        allocate(self, num_blocks)
        self.make_prompt_graphs()
        self.make_graphs()

    def note_step(
        self: DecodeGraphs, plan: StepPlan
    ) -> tuple[ForwardBatch, torch.Tensor, torch.Tensor, torch.Tensor]:
        replayed.append(plan)
        return replay(self, plan)

    monkeypatch.setattr(DecodeGraphs, "replay", note_step)
    monkeypatch.setattr(GraphLadder, "capture", capture)
    monkeypatch.setattr(prompt_graphs, "capture", capture_piece)
    monkeypatch.setattr(ModelRunner, "allocate_cache", allocate_cache)
    return replayed
