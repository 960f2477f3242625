"""Chapter 1: the two forms of MLA, and what the planner says of DeepSeek-V2 on eight H200s."""

from facts import deploy
from svg import Picture

from minidcp.model_config import ModelConfig

DCP_SIZES = (1, 2, 4, 8)
BAR = 300  # pixels of the longest bar


def draw_forms(config: ModelConfig) -> Picture:
    """Decompressed above, absorbed below; the latent between them."""
    rank, rope = config.kv_lora_rank, config.qk_rope_head_dim
    nope, v = config.qk_nope_head_dim, config.v_head_dim
    picture = Picture(
        "MLA in two forms",
        f"The cache holds {config.latent_dim} values per token. Either W_UK and W_UV make keys and "
        "values of them, or W_UK turns the query and W_UV the result.",
        height=392,
    )
    picture.text(14, 26, "decompressed: for prompts", "bold")
    picture.labelled(40, 92, 100, 44, ["q", f"{nope} + {rope}"], "r0")
    picture.labelled(210, 40, 130, 44, ["k of a head", f"{nope} + {rope}"], "r1")
    picture.labelled(380, 40, 130, 44, ["v of a head", f"{v}"], "r1")
    picture.text(148, 78, "q · k", "code")
    picture.arrow((140, 104), (206, 72))
    picture.arrow((262, 168), (262, 88))
    picture.text(268, 130, "W_UK c, k_pe", "code")
    picture.arrow((420, 168), (420, 88))
    picture.text(426, 130, "W_UV c", "code")

    picture.labelled(180, 172, 280, 44, ["c", f"{rank}"], "r2")
    picture.labelled(464, 172, 60, 44, ["k_pe", f"{rope}"], "r3")
    picture.text(14, 190, "cache of a token", "bold")
    picture.text(14, 208, f"{config.latent_dim} values, shared", "soft")

    picture.text(14, 262, "absorbed: for decoding", "bold")
    picture.labelled(14, 300, 92, 44, ["q", f"{nope} + {rope}"], "r0")
    picture.arrow((106, 322), (168, 322))
    picture.text(137, 314, "W_UKᵀ", "middle code")
    picture.labelled(172, 300, 128, 44, ["q_latent, q_pe", f"{rank} + {rope}"], "r0")
    picture.arrow((236, 300), (236, 220))
    picture.text(242, 266, "q · (c, k_pe)", "code")
    picture.arrow((380, 216), (380, 296))
    picture.text(386, 266, "Σ p c", "code")
    picture.labelled(330, 300, 96, 44, ["Σ p c", f"{rank}"], "r2")
    picture.arrow((426, 322), (474, 322))
    picture.text(450, 314, "W_UV", "middle code")
    picture.labelled(478, 300, 68, 44, ["out", f"{v}"], "r1")
    picture.text(
        14, 374, "Widths of DeepSeek-V2, for one head. The demo model has the same.", "small soft"
    )
    return picture


def draw_plan(concurrency: int = 256) -> Picture:
    """Capacity and speed by DCP size: two bars for each."""
    picture = Picture(
        "DeepSeek-V2 on eight H200s, planned",
        "How many tokens the KV caches hold together and how many tokens per second are decoded, "
        "for DCP sizes 1, 2, 4 and 8.",
        height=274,
    )
    deployments = [deploy(8, size) for size in DCP_SIZES]
    capacities = [deployment.memory["capacity"] for deployment in deployments]
    speeds = [deployment.time_step(concurrency)["tokens_per_s"] for deployment in deployments]
    picture.text(14, 26, "DeepSeek-V2, tp 8, on eight H200s: estimates of minidcp plan", "bold")
    picture.rect(14, 40, 14, 12, "r0")
    picture.text(34, 51, "tokens in the cache", "small")
    picture.rect(180, 40, 14, 12, "r1")
    picture.text(200, 51, f"tokens/s, {concurrency} requests of 4,000 tokens", "small")
    for index, size in enumerate(DCP_SIZES):
        y = 68 + index * 50
        picture.text(14, y + 21, f"dcp {size}", "bold")
        for offset, css, value, largest, text in (
            (0, "r0", capacities[index], max(capacities), f"{capacities[index] / 1e6:.1f} million"),
            (18, "r1", speeds[index], max(speeds), f"{round(speeds[index], -2):,.0f}"),
        ):
            width = BAR * value / largest
            picture.rect(76, y + offset, width, 15, css)
            picture.text(84 + width, y + offset + 12, text, "small")
    return picture
