"""Load as foreign servers tell it. The pages have the form that their makers document."""

from __future__ import annotations

import pytest

from penstock.cluster.foreign import Load, RemoteConfig, read_load
from penstock.core.errors import BadConfig

VLLM = b"""# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 8.0
vllm:num_requests_running{engine="1",model_name="m"} 3.0
vllm:num_requests_waiting{engine="0",model_name="m"} 5.0
vllm:num_requests_waiting{engine="1",model_name="m"} 0.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.75
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.25
vllm:cache_config_info{block_size="16",cache_dtype="auto",engine="0",num_gpu_blocks="1000"} 1.0
vllm:cache_config_info{block_size="16",cache_dtype="auto",engine="1",num_gpu_blocks="1000"} 1.0
vllm:num_requests_running_by_reason{reason="x"} 99
"""
SGLANG = b"""sglang:token_usage{model_name="m"} 0.28
sglang:num_running_reqs{model_name="m"} 162.0
sglang:num_queue_reqs{model_name="m"} 2826.0
sglang:num_used_tokens{model_name="m"} 123859.0
sglang:max_total_num_tokens{model_name="m"} 442353.0
"""
LLAMA = b"""# TYPE llamacpp:requests_processing gauge
llamacpp:requests_processing 2
# TYPE llamacpp:requests_deferred gauge
llamacpp:requests_deferred 1
llamacpp:predicted_tokens_seconds nan
"""


@pytest.mark.parametrize(
    ("page", "load"),
    [
        (VLLM, Load(11, 5, 0.5, 2000, 16)),
        (VLLM.replace(b"kv_cache_usage", b"gpu_cache_usage"), Load(11, 5, 0.5, 2000, 16)),
        (SGLANG, Load(162, 2826, 0.28, 442353, 1)),
        (LLAMA, Load(2, 1)),
        (b"tgi_batch_current_size 4\ntgi_queue_size 2\n", Load(4, 2)),
        (b"vllm:num_requests_running NaN\nvllm:num_requests_waiting what\n", Load()),
        (b'process_cpu_seconds_total 3\n\xff{"', Load()),
    ],
)
def test_pages_of_each_maker(page: bytes, load: Load) -> None:
    assert read_load(page) == load


def test_a_key_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RemoteConfig(urls=("http://a",), api_key="$SOME_KEY")
    monkeypatch.setenv("SOME_KEY", "secret")
    assert config.key() == "secret"
    monkeypatch.delenv("SOME_KEY")
    with pytest.raises(BadConfig, match="SOME_KEY"):
        config.key()
