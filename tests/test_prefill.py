"""Chunks on top of cached context, with both strategies and beside decode rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import STYLES, make_checkpoint, make_prompt
from hypothesis import given
from hypothesis import strategies as st

from minidcp import LLM, EngineConfig, SamplingParams
from minidcp.attention.context import ContextPolicy
from minidcp.batch import Admission, StepPlan
from minidcp.engine.engine import LLMEngine
from minidcp.kv_cache.interleave import Interleave
from minidcp.model_config import ModelConfig

PARALLEL = [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (8, 8)]
BLOCK_SIZE = 4
CHUNKS = (1, 7, 64, 512)
DECODES = (3, 17, 45)  # number of tokens before the decoded one
LONG_PREFIX = 2000  # several pieces of gathered context


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int], torch.Tensor, list]:
    """A checkpoint, a long text, and the text's log-probabilities at every position.

    Last come the log-probabilities after the first DECODES tokens and the likeliest next one.
    """
    path = tmp_path_factory.mktemp("long")
    model = make_checkpoint(path, "v2", seed=3, max_position_embeddings=8192, num_hidden_layers=2)
    tokens = make_prompt(LONG_PREFIX + 256, 128)
    with torch.no_grad():
        logprobs = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
        after = [[*tokens[:n], int(logprobs[n - 1].argmax())] for n in DECODES]
        decoded = [model(torch.tensor([text])).logits[0, -1].log_softmax(-1) for text in after]
    return path, tokens, logprobs, decoded


@pytest.mark.parametrize("strategy", ["gather_kv", "gather_q"])
@pytest.mark.parametrize(("tp", "dcp"), PARALLEL)
def test_chunks_on_top_of_prefixes(stream: tuple, tp: int, dcp: int, strategy: str) -> None:
    path, tokens, logprobs, decoded = stream
    block = BLOCK_SIZE * dcp
    prefixes = sorted({0, 1, max(dcp - 1, 0), dcp, dcp + 1, block - 1, block, block + 1, 3 * block})
    rows = [(prefix, chunk) for prefix in prefixes for chunk in CHUNKS]
    rows += [(LONG_PREFIX, 7), (LONG_PREFIX, 256)]
    engine = LLMEngine(
        EngineConfig(
            str(path),
            tp_size=tp,
            dcp_size=dcp,
            ranks="threads",
            device="cpu",
            block_size=BLOCK_SIZE,
            max_model_len=LONG_PREFIX + 300,
            num_blocks=20000 // block,
            max_num_seqs=64,
            max_num_batched_tokens=600,  # so at most 600 tokens of context are gathered at once
            prefill_strategy=strategy,
        )
    )
    table: list[int] = []

    def run(plan: StepPlan) -> torch.Tensor | None:
        """Run a step. Returns the log-probabilities [rows that sample, vocab]."""
        engine.executor.submit(plan)
        entries = engine.executor.collect().logprobs or []
        return torch.tensor([[value for _, value in sorted(entry.top)] for entry in entries])

    # Long contexts get a step of their own: the reference back-end pads all rows to the longest.
    short, long = StepPlan(num_decode=len(DECODES)), StepPlan()
    lengths = [(n, 0) for n in DECODES] + rows
    for slot, (prefix, chunk) in enumerate(lengths):
        blocks = [len(table) + i for i in range(-(-(prefix + max(chunk, 1)) // block))]
        table += blocks
        new_blocks = [(slot, i, b) for i, b in enumerate(blocks)]
        for start in range(0, prefix, 600):
            text = tokens[start : min(start + 600, prefix)]
            plan = StepPlan(0, [slot], [start], [len(text)], text, new_blocks)
            if slot < len(DECODES):
                plan.sampling.append(0)
            plan.admitted.append(Admission(slot, SamplingParams(temperature=0.0, logprobs=128)))
            run(plan)
            new_blocks = []
        last = long if prefix == LONG_PREFIX else short
        last.new_blocks += new_blocks
        last.sampling.append(len(last.slots))
        last.admitted.append(Admission(slot, SamplingParams(temperature=0.0, logprobs=128)))
        last.slots.append(slot)
        last.starts.append(prefix)
        last.lengths.append(max(chunk, 1))
        last.tokens += tokens[prefix : prefix + chunk]
    ours = torch.cat([run(short), run(long)])
    engine.close()
    expected = torch.stack(decoded + [logprobs[prefix + chunk - 1] for prefix, chunk in rows])
    errors = (ours - expected).norm(dim=-1) / expected.norm(dim=-1)
    worst = int(errors.argmax())
    assert errors[worst] < 1e-4, f"row {lengths[worst]}: {errors[worst]:.2e}"


def test_a_conversation_of_ten_turns(stream: tuple) -> None:
    """With the prefix cache, a turn computes its new tokens and at most one block more.

    The tokens are the same as without the cache.
    """
    path, tokens, _, _ = stream
    options = dict(
        tp_size=4, dcp_size=4, ranks="threads", device="cpu", max_model_len=1024, block_size=4
    )
    params = SamplingParams(max_tokens=9, temperature=0.0, ignore_eos=True)
    histories = []
    for prefix_cache in (False, True):
        history: list[int] = []
        with LLM(str(path), prefix_cache=prefix_cache, **options) as llm:
            for turn in range(10):
                history += tokens[turn * 31 : turn * 31 + 31]
                computed = llm.engine.stats.prompt_tokens
                output = llm.generate([history], params)[0]
                computed = llm.engine.stats.prompt_tokens - computed
                known = len(history) - 31
                if prefix_cache and turn:
                    assert 31 <= computed <= 31 + 16
                    assert output.cached_tokens == len(history) - computed
                else:
                    assert computed == known + 31
                history += output.outputs[0].token_ids
            cached = llm.engine.scheduler.num_cached_tokens
            assert cached > 10 * 31 * 3 if prefix_cache else cached == 0
        histories.append(history)
    assert histories[0] == histories[1]


def record_plans(llm: LLM, plans: list[StepPlan]) -> None:
    submit = llm.engine.executor.submit

    def record(plan: StepPlan) -> None:
        plans.append(plan)
        submit(plan)

    llm.engine.executor.submit = record


def test_steps_that_do_not_mix(stream: tuple) -> None:
    """With --no-mixed-steps decode rows and chunks take turns, and the tokens are the same."""
    path, tokens, _, _ = stream
    prompts = [tokens[i : i + 40 + 30 * i] for i in range(6)]
    params = [
        SamplingParams(max_tokens=6 + 5 * i, temperature=0.0, ignore_eos=True) for i in range(6)
    ]
    texts = []
    for mixed in (True, False):
        plans = []
        with LLM(
            str(path), device="cpu", mixed_steps=mixed, max_num_batched_tokens=32, max_num_seqs=4
        ) as llm:
            record_plans(llm, plans)
            texts.append([o.outputs[0].token_ids for o in llm.generate(prompts, params)])
        mixes = [0 < plan.num_decode < len(plan.slots) for plan in plans]
        assert any(mixes) == mixed
        if not mixed:  # while there are both, they take turns
            kinds = [plan.num_decode > 0 for plan in plans]
            both = range(len(kinds) - 3 - kinds[::-1].index(False))
            assert all(not (kinds[i] and kinds[i + 1] and kinds[i + 2]) for i in both)
    assert texts[0] == texts[1]


def test_few_tokens_on_a_long_context_send_their_q() -> None:
    """DeepSeek-V2 at tp=dcp=8: gathering q moves fewer bytes if P > 72 C.

    For large chunks on little context the KV is gathered.
    """
    v2 = ModelConfig.from_dict(
        STYLES["v2"]
        | dict(
            model_type="deepseek_v2",
            num_attention_heads=128,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
        )
        | dict(qk_rope_head_dim=64, v_head_dim=128)
    )
    policy = ContextPolicy(v2, 16, Interleave(8, 16))
    assert policy.gathers_q(np.array([16]), np.array([4000]))
    assert policy.gathers_q(np.array([1, 1]), np.array([4000, 100000]))
    assert not policy.gathers_q(np.array([4096]), np.array([4000]))
    assert not policy.gathers_q(np.array([512]), np.array([64]))


@given(st.integers(1, 8192), st.integers(1, 100000))
def test_a_forced_strategy_is_obeyed(new: int, cached: int) -> None:
    config = ModelConfig.from_dict(STYLES["v2"] | {"model_type": "deepseek_v2"})
    for strategy in ("gather_kv", "gather_q"):
        policy = ContextPolicy(config, 1, Interleave(8, 16), strategy)
        assert policy.gathers_q(np.array([new]), np.array([cached])) == (strategy == "gather_q")
