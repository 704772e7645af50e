"""Released models' configurations become these flags; a field that is lost shows here."""

from pathlib import Path
from typing import Any

import orjson
import pytest

from checkpoint_convert.config_map import read_model
from tests.unit.checkpoint_convert import published

DENSE = (
    "--normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope "
    "--hidden-dropout 0"
)
ROUTED = (
    f"{DENSE} --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0 "
    "--moe-token-dispatcher-type alltoall"
)
UNTIED = "--untie-embeddings-and-output-weights"
YARN = '{"rope_type":"yarn","factor":4.0,"original_max_position_embeddings":32768}'


def sizes(
    layers: int, hidden: int, ffn: int, heads: int, context: int, epsilon: str, vocabulary: int
) -> str:
    return (
        f"--num-layers {layers} --hidden-size {hidden} --ffn-hidden-size {ffn} "
        f"--num-attention-heads {heads} --max-position-embeddings {context} "
        f"--norm-epsilon {epsilon} --attention-dropout 0 --padded-vocab-size {vocabulary}"
    )


def grouped(head_dim: int, groups: int) -> str:
    return f"--kv-channels {head_dim} --group-query-attention --num-query-groups {groups}"


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (
            published.LLAMA_2_7B,
            (
                sizes(32, 4096, 11008, 32, 4096, "1e-05", 32000),
                f"--kv-channels 128 --rotary-base 10000 {DENSE} {UNTIED}",
            ),
        ),
        (
            published.LLAMA_3_8B,
            (
                sizes(32, 4096, 14336, 32, 8192, "1e-05", 128256),
                f"{grouped(128, 8)} --rotary-base 500000 {DENSE} {UNTIED}",
            ),
        ),
        (
            published.LLAMA_3_1_8B,
            (
                sizes(32, 4096, 14336, 32, 131072, "1e-05", 128256),
                f"{grouped(128, 8)} --rotary-base 500000 --use-rope-scaling",
                f"--rope-scaling-factor 8 {DENSE} {UNTIED}",
            ),
        ),
        (
            published.LLAMA_3_2_1B,
            (
                sizes(16, 2048, 8192, 32, 131072, "1e-05", 128256),
                f"{grouped(64, 8)} --rotary-base 500000 --use-rope-scaling",
                f"--rope-scaling-factor 32 {DENSE}",
            ),
        ),
        (
            published.LLAMA_3_3_70B,
            (
                sizes(80, 8192, 28672, 64, 131072, "1e-05", 128256),
                f"{grouped(128, 8)} --rotary-base 500000 --use-rope-scaling",
                f"--rope-scaling-factor 8 {DENSE} {UNTIED}",
            ),
        ),
        (
            published.MISTRAL_7B_V0_1,
            (
                sizes(32, 4096, 14336, 32, 32768, "1e-05", 32000),
                f"{grouped(128, 8)} --rotary-base 10000 --window-size 4095,0 {DENSE} {UNTIED}",
            ),
        ),
        (
            published.MISTRAL_7B_V0_3,
            (
                sizes(32, 4096, 14336, 32, 32768, "1e-05", 32768),
                f"{grouped(128, 8)} --rotary-base 1000000 {DENSE} {UNTIED}",
            ),
        ),
        (
            published.MIXTRAL_8X7B,
            (
                sizes(32, 4096, 14336, 32, 32768, "1e-05", 32000),
                f"--num-experts 8 --moe-router-topk 2 {grouped(128, 8)} --rotary-base 1000000",
                f"{ROUTED} --moe-ffn-hidden-size 14336 {UNTIED}",
            ),
        ),
        *(
            (
                config,
                (
                    sizes(28, 3584, 18944, 28, 131072, "1e-06", 152064),
                    f"{grouped(128, 4)} --rotary-base 1000000 {DENSE} --add-qkv-bias {UNTIED}",
                ),
            )
            for config in (published.QWEN2_7B, published.QWEN2_5_7B)
        ),
        (
            published.QWEN2_5_7B_LONG,
            (
                sizes(28, 3584, 18944, 28, 32768, "1e-06", 152064),
                f"{grouped(128, 4)} --rotary-base 1000000 --megasft-rope-scaling {YARN}",
                f"{DENSE} --add-qkv-bias {UNTIED}",
            ),
        ),
        (
            published.QWEN3_0_6B,
            (
                sizes(28, 1024, 3072, 16, 40960, "1e-06", 151936),
                f"{grouped(128, 8)} --rotary-base 1000000 {DENSE} --qk-layernorm",
            ),
        ),
        (
            published.QWEN3_30B_A3B,
            (
                sizes(48, 2048, 6144, 32, 40960, "1e-06", 151936),
                "--num-experts 128 --moe-router-topk 8 --moe-ffn-hidden-size 768",
                f"{grouped(128, 4)} --rotary-base 1000000 {ROUTED} --qk-layernorm {UNTIED}",
            ),
        ),
        (
            published.DEEPSEEK_V3_BF16,
            (
                sizes(61, 7168, 18432, 128, 163840, "1e-06", 129280),
                "--num-experts 256 --moe-router-topk 8 --moe-ffn-hidden-size 2048",
                "--moe-router-topk-scaling-factor 2.5 --kv-lora-rank 512 --qk-head-dim 128",
                "--qk-pos-emb-head-dim 64 --v-head-dim 128 --kv-channels 64",
                "--rotary-base 10000 --rope-type yarn --rotary-scaling-factor 40 --mscale 1",
                f"--mscale-all-dim 1 --moe-layer-freq [0,0,0{',1' * 58}] {ROUTED}",
                "--multi-latent-attention --qk-layernorm --moe-router-score-function sigmoid",
                "--moe-router-enable-expert-bias --moe-router-bias-update-rate 0",
                "--moe-router-dtype fp32 --q-lora-rank 1536",
                "--moe-shared-expert-intermediate-size 2048 --moe-router-num-groups 8",
                f"--moe-router-group-topk 4 {UNTIED}",
            ),
        ),
    ],
)
def test_a_released_model_becomes_these_flags(
    tmp_path: Path, config: dict[str, Any], parts: tuple[str, ...]
) -> None:
    (tmp_path / "config.json").write_bytes(orjson.dumps(config))
    assert " ".join(read_model(tmp_path).flags) == " ".join(parts)
