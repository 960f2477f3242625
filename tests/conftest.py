"""Fixtures: checkpoints, and what transformers computes with them."""

from __future__ import annotations

import pytest
import torch
from checkpoints import STYLES, Oracle, build_oracle

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
