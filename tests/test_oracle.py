"""Logits and greedy tokens of every parallel configuration, compared with transformers."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import NUM_STEPS, Oracle, make_checkpoint

from minidcp import LLM, RequestOutput, SamplingParams
from minidcp.attention.reference import ReferenceBackend
from minidcp.worker.model_runner import ModelRunner

PARALLEL = [(1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (8, 8)]
EXCHANGES = list(product(("ag_rs", "a2a"), ("wide", "narrow")))
CONFIGS = [
    (tp, dcp, comm, policy)
    for tp, dcp in PARALLEL
    for comm, policy in (EXCHANGES if dcp > 1 else [("a2a", "wide")])
]


UNEQUAL_MSCALES = dict(
    type="yarn", factor=8.0, original_max_position_embeddings=32, mscale=1.0, mscale_all_dim=0.5
)


def check(oracle: Oracle, outputs: list[RequestOutput]) -> None:
    """Check that tokens are equal, and every step's distribution within 1e-4 of the oracle's."""
    for prompt, output, tokens, logprobs in zip(
        oracle.prompts, outputs, oracle.tokens, oracle.logprobs, strict=True
    ):
        completion = output.outputs[0]
        assert completion.token_ids == tokens, f"prompt of {len(prompt)}"
        assert completion.logprobs is not None and len(completion.logprobs) == NUM_STEPS
        for step, entry in enumerate(completion.logprobs):
            ours = torch.empty(logprobs.shape[1])
            ids, values = zip(*entry.top, strict=True)
            ours[list(ids)] = torch.tensor(values)
            error = (ours - logprobs[step]).norm() / logprobs[step].norm()
            assert error < 1e-4, f"prompt of {len(prompt)}, step {step}: {error:.2e}"


def run(
    oracle: Oracle, tp: int, dcp: int, comm: str = "a2a", policy: str = "auto", **options
) -> LLM:
    """Complete the oracle's prompts and check the results. Returns the closed engine."""
    vocab = oracle.model.config.vocab_size
    params = SamplingParams(max_tokens=NUM_STEPS, temperature=0.0, ignore_eos=True, logprobs=vocab)
    options = dict(ranks="threads", device="cpu", max_model_len=512) | options
    with LLM(
        str(oracle.path),
        tp_size=tp,
        dcp_size=dcp,
        dcp_comm_backend=comm,
        exchange_policy=policy,
        **options,
    ) as llm:
        check(oracle, llm.generate(oracle.prompts, params))
    return llm


@pytest.mark.parametrize(("tp", "dcp", "comm", "policy"), CONFIGS)
def test_whole_prompts(
    oracle_of_any_style: Oracle, tp: int, dcp: int, comm: str, policy: str
) -> None:
    oracle = oracle_of_any_style
    llm = run(oracle, tp, dcp, comm, policy, max_num_batched_tokens=4096)
    assert llm.engine.stats.prompt_tokens == sum(map(len, oracle.prompts))


@pytest.mark.parametrize(("tp", "dcp", "comm", "policy"), CONFIGS)
def test_chunked_prompts(oracle: Oracle, tp: int, dcp: int, comm: str, policy: str) -> None:
    """Chunks of at most 37 tokens, mixed with decode rows, and blocks of only 4 tokens."""
    run(oracle, tp, dcp, comm, policy, max_num_batched_tokens=37, max_num_seqs=16, block_size=4)


@pytest.mark.parametrize(("tp", "dcp", "comm", "policy"), CONFIGS)
@pytest.mark.usefixtures("crowded")
def test_preemption(oracle: Oracle, tp: int, dcp: int, comm: str, policy: str) -> None:
    """There is room for half of what six prompts need: requests lose their blocks and start again.

    The q projection is replicated here. In the other tests it is sharded.
    """
    some = slice(2, None, 3)
    few = replace(
        oracle,
        prompts=oracle.prompts[some],
        tokens=oracle.tokens[some],
        logprobs=oracle.logprobs[some],
    )
    block_size = 4
    llm = run(
        few,
        tp,
        dcp,
        comm,
        policy,
        block_size=block_size,
        num_blocks=sum(len(p) + NUM_STEPS for p in few.prompts) // 2 // (block_size * dcp),
        prefix_cache=False,
        q_proj="replicated",
        max_model_len=400,
        max_num_batched_tokens=64,
        max_num_seqs=32,
    )
    assert llm.engine.scheduler.num_preemptions > 0


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_prefix_cache(v2: Oracle, prefix_cache: bool) -> None:
    """A second round finds its prompts in the cache, up to their last block, and says the same."""
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    with LLM(
        str(v2.path),
        tp_size=4,
        dcp_size=4,
        ranks="threads",
        device="cpu",
        max_model_len=512,
        prefix_cache=prefix_cache,
    ) as llm:
        for round in range(2):
            outputs = llm.generate(v2.prompts, params)
            assert [o.outputs[0].token_ids for o in outputs] == [t[:8] for t in v2.tokens]
            cached = [(len(p) - 1) // 64 * 64 if round and prefix_cache else 0 for p in v2.prompts]
            assert [o.cached_tokens for o in outputs] == cached


@pytest.mark.parametrize(("comm", "policy"), EXCHANGES)
def test_poison(v2: Oracle, comm: str, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put NaN into all cache slots that hold no token, and into the outputs of empty shards."""
    allocate, decode = ModelRunner.make_cache, ReferenceBackend.decode
    caches = empty = 0

    def poisoned_cache(*args: Any) -> torch.Tensor:
        nonlocal caches
        caches += 1
        return allocate(*args).fill_(torch.nan)

    def poisoned_decode(self: ReferenceBackend, *args: object) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal empty
        out, lse = decode(self, *args)  # type: ignore[arg-type]
        empty += int((lse == -torch.inf).sum())
        return out.masked_fill((lse == -torch.inf)[..., None], torch.nan), lse

    monkeypatch.setattr(ModelRunner, "make_cache", poisoned_cache)
    monkeypatch.setattr(ReferenceBackend, "decode", poisoned_decode)
    run(v2, 8, 8, comm, policy, max_num_batched_tokens=256)
    assert caches == 8 and empty > 0


def test_bf16_runs_close_to_fp32(v2: Oracle) -> None:
    """bf16 uses the packed exchange. The first token's distribution must stay close to fp32's."""
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=128)
    with LLM(
        str(v2.path),
        tp_size=4,
        dcp_size=4,
        ranks="threads",
        device="cpu",
        dtype="bfloat16",
        max_model_len=512,
    ) as llm:
        outputs = llm.generate(v2.prompts, params)
    errors = []
    for output, logprobs in zip(outputs, v2.logprobs, strict=True):
        entry = output.outputs[0].logprobs[0]
        ours = torch.tensor([value for _, value in sorted(entry.top)])
        errors.append(float((ours - logprobs[0]).norm() / logprobs[0].norm()))
    assert sorted(errors)[len(errors) // 2] < 0.05


@pytest.mark.parametrize(
    "changes",
    [
        dict(attention_bias=True),
        dict(rope_scaling=None),
        dict(tie_word_embeddings=True),
        dict(n_shared_experts=1, first_k_dense_replace=3),
        dict(rope_scaling=UNEQUAL_MSCALES),
    ],
    ids=["attention_bias", "no_yarn", "tied", "dense", "unequal_mscales"],
)
def test_variants(changes: dict[str, object], tmp_path: Path) -> None:
    """Configurations that config.json allows, but no checkpoint on the hub uses."""
    model = make_checkpoint(tmp_path, "v2", **changes)
    if changes.get("attention_bias"):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(0, 0.3)
        model.save_pretrained(tmp_path, max_shard_size="200KB")
    oracle = Oracle(tmp_path, model, [list(range(2, 41)), [5]], [], [])
    for prompt in oracle.prompts:
        tokens, logprobs = oracle.complete(prompt, NUM_STEPS)
        oracle.tokens.append(tokens)
        oracle.logprobs.append(logprobs)
    run(oracle, 4, 2, "a2a", "narrow", max_num_batched_tokens=16, max_num_seqs=4)
