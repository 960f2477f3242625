"""What a rank holds in memory beside weights and cache, estimated from config.json. Estimates are
held to the sizes of caches that engines had (`tests/test_plan.py`)."""

import torch

from minidcp.attention.context import ContextPolicy
from minidcp.batch import MAX_SCORED_TOKENS
from minidcp.kernels.mailbox import PLACE_BYTES
from minidcp.model_config import ModelConfig
from minidcp.parallel.symmetric import HALF_BYTES
from minidcp.resolve import ResolvedConfig
from minidcp.worker.model_runner import GRAPH_BYTES
from minidcp.worker.prompt_graphs import MAX_TOKENS

# A process holds its CUDA context and kernels.
PROCESS_BYTES = 1200 << 20
# Tensors of [tokens, hidden size] that a layer holds beside the outputs of the experts.
PIECE_TENSORS = 8
FLOAT32_BYTES = 4


def get_itemsize(config: ResolvedConfig) -> int:
    """Bytes of one cached value, or of one weight that is not in FP8."""
    dtype: torch.dtype = getattr(torch, config.dtype)
    return dtype.itemsize


def count_bytes_beside_cache(config: ResolvedConfig, model_config: ModelConfig) -> int:
    """Memory of a rank that is neither weights nor cache: the process, symmetric buffers, CUDA
    graphs, and the tensors of the largest step."""
    tokens = config.max_num_batched_tokens
    itemsize = get_itemsize(config)
    attention = count_attention_values(config, model_config) * itemsize
    pieces = tokens * count_piece_values(config, model_config) * itemsize
    launched = max(attention, pieces)
    graphs = 0
    if config.cuda_graph:
        # Graphs keep their memory. Pieces that have no graph share it with the attention; the layer
        # for MTP has none.
        in_graphs = min(tokens, MAX_TOKENS)
        values = count_piece_values(config, model_config) + count_edge_values(config, model_config)
        graphs = in_graphs * values * itemsize
        if tokens <= MAX_TOKENS and not config.predicts:
            launched = attention
    # When a step is sampled, its logits are gathered and widened.
    rows = config.max_num_seqs + MAX_SCORED_TOKENS
    logits = rows * model_config.vocab_size * (itemsize + FLOAT32_BYTES)
    fixed = GRAPH_BYTES + PROCESS_BYTES + count_symmetric_bytes(config)
    return fixed + graphs + launched + logits


def count_piece_values(config: ResolvedConfig, model_config: ModelConfig) -> int:
    """What a layer holds of each token between two attentions."""
    experts = model_config.num_experts_per_tok + model_config.n_shared_experts
    tensors = experts + PIECE_TENSORS
    if config.tp_size > 1 and config.comm == "symmetric":
        tensors -= 1  # what a rank adds to the sum of all is built in its buffer
    between_products = experts * model_config.moe_intermediate_size // config.tp_size
    return tensors * model_config.hidden_size + between_products


def count_edge_values(config: ResolvedConfig, model_config: ModelConfig) -> int:
    """What graphs for prompts read and leave of each token; see `worker/prompt_graphs.py`."""
    own_heads = model_config.num_attention_heads // config.tp_size
    attended = own_heads * model_config.v_head_dim
    q_input = model_config.q_lora_rank or own_heads * model_config.qk_head_dim
    return model_config.hidden_size + attended + q_input + model_config.latent_dim


def count_attention_values(config: ResolvedConfig, model_config: ModelConfig) -> int:
    """What the attention of the largest step holds at a time.

    Of new tokens those are q, k with v, and the output. Of as many cached ones k with v, their
    output, both outputs stacked and merged. Or it is what crosses to other ranks and back.
    """
    own_heads = model_config.num_attention_heads // config.tp_size
    out = model_config.v_head_dim
    keys_and_values = model_config.qk_head_dim + out
    new = model_config.qk_head_dim + keys_and_values + out
    cached = keys_and_values + 4 * out
    most_values = config.max_num_batched_tokens * own_heads * cached
    if config.dcp_size > 1:
        queries = min(config.max_num_batched_tokens, ContextPolicy.max_queries)
        widths = 2 * model_config.latent_dim + 2 * model_config.kv_lora_rank
        most_values = max(most_values, queries * own_heads * config.dcp_size * widths)
    return config.max_num_batched_tokens * own_heads * new + most_values


def count_symmetric_bytes(config: ResolvedConfig) -> int:
    """Buffer and inbox of the TP group, and of the DCP group where it is another group."""
    if config.comm == "nccl":
        return 0
    sizes = []
    if config.tp_size > 1:
        sizes.append(config.tp_size)
    if 1 < config.dcp_size < config.tp_size:
        sizes.append(config.dcp_size)
    # Either has two halves, or regions. A region has a place for every rank.
    return sum(2 * HALF_BYTES + 2 * size * PLACE_BYTES for size in sizes)
