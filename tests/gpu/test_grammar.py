"""Masks of grammars on a GPU: unpacked without a wait of the host, beside graphs, on many ranks."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import Oracle
from make_demo_checkpoint import make_tokenizer

from minidcp import LLM, SamplingParams, StructuredOutputsParams
from minidcp.worker.sampler import mask_forbidden

pytestmark = pytest.mark.gpu
PATTERN = "[a-z]{2,4}-[0-9]{3}"


@pytest.mark.parametrize("vocab_size", [102_400, 129_283])
def test_masks_without_waiting(vocab_size: int) -> None:
    torch.manual_seed(0)
    num_bytes = -(-vocab_size // 8)
    rows = range(1, 128, 2)
    random = torch.randint(0, 256, (len(rows), num_bytes), dtype=torch.uint8)
    masks = {row: bits.numpy().tobytes() for row, bits in zip(rows, random, strict=True)}
    logits = torch.randn(130, vocab_size)
    on_device = logits.cuda()
    mask_forbidden(on_device, masks)  # allocates what the next call reuses
    torch.cuda.set_sync_debug_mode("error")
    try:
        masked = mask_forbidden(on_device, masks)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(masked.cpu(), mask_forbidden(logits, masks))
    assert torch.equal(on_device.cpu(), logits)


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("cuda_graph", [True, False])
def test_answers_fit(checkpoint: Oracle, tmp_path: Path, tp_size: int, cuda_graph: bool) -> None:
    """Greedy and sampled, beside plain requests."""
    directory = shutil.copytree(checkpoint.path, tmp_path / "with tokenizer")
    make_tokenizer().save(str(directory / "tokenizer.json"))
    wanted = StructuredOutputsParams(regex=PATTERN)
    plain = SamplingParams(max_tokens=32, temperature=0.0, ignore_eos=True)
    params = [plain]
    for seed in range(8):
        temperature = float(seed % 2)
        params.append(
            SamplingParams(
                max_tokens=64,
                temperature=temperature,
                seed=seed,
                logprobs=3,
                structured_outputs=wanted,
            )
        )
    options = dict(device="cuda", max_model_len=1024, num_blocks=400, max_num_seqs=16)
    with LLM(
        directory,
        tp_size=tp_size,
        dcp_size=tp_size,
        cuda_graph=cuda_graph,
        ranks="threads" if tp_size == 1 else "processes",
        **options,
    ) as llm:
        outputs = llm.generate([list(checkpoint.prompts[3])] * len(params), params)
    assert len(outputs[0].outputs[0].token_ids) == 32
    for output in outputs[1:]:
        completion = output.outputs[0]
        assert completion.finish_reason == "stop"
        assert re.fullmatch(PATTERN, completion.text)
