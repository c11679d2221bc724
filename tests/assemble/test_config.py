"""The configuration: what is refused and where, defaults, presets, and that what is printed reads back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from penstock.assemble import load_config, print_config, replica_specs
from penstock.assemble.presets import PRESETS, policy_tables
from penstock.cluster.spec import SLOTS, ReplicaSpec, policies_of
from penstock.core.errors import BadConfig, SchemaMismatch


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "penstock.toml"
    path.write_text(text)
    return path


def test_nothing_is_a_configuration_of_the_default_model() -> None:
    config = load_config()
    (fleet,) = config.fleet
    assert (fleet.model, fleet.served_name, fleet.replicas) == ("default", "default", 1)
    assert fleet.cache.block_size == 16 and fleet.cache.prefix
    tables = policy_tables(fleet.policy, fleet.cache.prefix)
    assert {slot: table["name"] for slot, table in tables.items()} == {
        "order": "fcfs",
        "admit": "full-fit",
        "batch": "vllm-v1",
        "evict": "recompute-last",
        "blocks": "lru",
        "route": "prefix",
        "limit": "fixed",
    }
    assert policy_tables({}, has_prefix_cache=False)["route"]["name"] == "p2c"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("sede = 1", "'sede'; did you mean 'seed'"),
        ("[gateway]\nprot = 1", "'gateway.prot'; did you mean 'port'"),
        ("[net]\nx = 1", "'net.x'"),
        ("[log]\nx = 1", "'log.x'"),
        ("[serve]\nx = 1", "'serve.x'"),
        ("[[fleet]]\nmodle = 'm'", "'fleet[0].modle'; did you mean 'model'"),
        ("[[fleet]]\nexecutor = {devise = 'cpu'}", "'fleet[0].executor.devise'"),
        ("[[fleet]]\n[[fleet]]\nname = 'b'\ncache = {size = 1}", "'fleet[1].cache.size'"),
        ("[[fleet]]\npolicy = {ordr = 'fcfs'}", "'fleet[0].policy.ordr'; did you mean 'order'"),
        ("[[fleet]]\npolicy = {order = {name = 'fcfs', x = 1}}", "'fleet[0].policy.order.x'"),
    ],
)
def test_unknown_keys_are_refused_at_every_level(tmp_path: Path, text: str, place: str) -> None:
    with pytest.raises(BadConfig) as caught:
        load_config(write(tmp_path, text))
    assert place in str(caught.value)


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        (
            ["fleet.0.policy.order=lifo"],
            "no order policy is named 'lifo'; known: dfs-weight, drawn-priority, drr",
        ),
        (["fleet.0.policy.preset=orca"], "fleet[0].policy.preset must be one of vllm-v1, sglang"),
        (["fleet.0.policy.order=3"], "fleet[0].policy.order must be the name of a policy"),
        (["fleet.0.policy.batch.max_tokens=many"], "fleet[0].policy.batch.max_tokens must be int"),
        (["fleet.0.replicas=0"], "replicas must be at least 1"),
        (["fleet.0.executor.kind=magic"], "fleet[0].executor.kind must be one of"),
        (["fleet.0.cache.block_size=0"], "block_size must be at least 1"),
        (["fleet.3.replicas=1"], "there is no such place"),
        (["gateway.port=70000"], "port must lie between"),
        (["fleet.².replicas=1"], "there is no such place"),
        (["fleet.0.max_waiting=-1"], "max_waiting must be at least 1"),
        (["fleet.0.max_outstanding=0"], "max_outstanding must be at least 1"),
        (["fleet.0.cache.memory_bytes=0"], "memory_bytes must be at least 1"),
        (["fleet.0.executor.max_context=0"], "max_context must be at least 1"),
        (["net.latency_s=-1"], "latency_s must be"),
        (["net.bytes_per_s=0"], "bytes_per_s must be positive"),
        (["serve.drain_timeout_s=-1"], "drain_timeout_s must be"),
        (["serve.max_restarts=-1"], "max_restarts must be at least 0"),
        (["serve.start_timeout_s=0"], "start_timeout_s must be a positive number"),
        (["hub.endpoint=hub.example"], "endpoint must be a URL"),
        (["hub.offline=1"], "hub.offline must be bool"),
        (["gateway.stall_timeout_s=-1"], "gateway: stall_timeout_s must be"),
        (['fleet.0.aliases=["default"]'], "two models would be called 'default'"),
    ],
)
def test_bad_values_are_named(sets: list[str], told: str) -> None:
    with pytest.raises(BadConfig) as caught:
        load_config(sets=sets)
    assert told in str(caught.value)


def test_another_schema_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SchemaMismatch):
        load_config(write(tmp_path, "schema = 99"))


def test_sets_win_over_flags_and_flags_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "seed = 1\n[gateway]\nport = 1\nhost = '::1'\n[[fleet]]\nmodel = 'a'")
    config = load_config(
        path,
        model="b",
        flags={"gateway.port": 2, "fleet.0.executor.device": "cpu", "log.dir": None},
        sets=["gateway.port=3", "fleet.0.policy.batch.max_tokens=64"],
    )
    assert (config.seed, config.gateway.port, config.gateway.host) == (1, 3, "::1")
    assert (config.fleet[0].model, config.fleet[0].executor.device) == ("b", "cpu")
    (spec,) = replica_specs(config, 0)
    assert spec.policies["batch"] == {"name": "vllm-v1", "max_tokens": 64}


@pytest.mark.parametrize(
    "policy", ["", 'policy = {batch = "vllm-v1"}', 'policy = {preset = "vllm-v1", order = "fcfs"}']
)
def test_a_parameter_of_a_policy_that_is_a_bare_name_can_be_set(
    tmp_path: Path, policy: str
) -> None:
    path = write(tmp_path, f"[[fleet]]\n{policy}")
    (spec,) = replica_specs(load_config(path, sets=["fleet.0.policy.batch.max_tokens=64"]), 0)
    assert spec.policies["batch"] == {"name": "vllm-v1", "max_tokens": 64}
    sets = ["fleet.0.policy.batch=sglang", "fleet.0.policy.batch.chunk_tokens=64"]
    (spec,) = replica_specs(load_config(path, sets=sets), 0)
    assert spec.policies["batch"] == {"name": "sglang", "chunk_tokens": 64}


def test_names_come_from_folders_and_stay_as_written_otherwise(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    assert load_config(model=str(folder)).fleet[0].served_name == "my-model"
    assert load_config(model="Qwen/Qwen3-0.6B").fleet[0].served_name == "Qwen/Qwen3-0.6B"


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_fill_every_slot_of_a_replica(preset: str) -> None:
    tables = policy_tables({"preset": preset, "order": {"name": "edf"}}, True)
    assert set(tables) == set(SLOTS) - {
        "route_decode",
        "move",
        "scale",
        "fetch",
    }  # a fleet's, or of tiers, for those who name one
    assert tables["order"] == {"name": "edf"}
    made = policies_of(tables)
    assert all(made.all())


def test_what_is_printed_reads_back_as_the_same(tmp_path: Path) -> None:
    text = """
        seed = 7
        [gateway]
        cors_origins = ["https://a.example", "https://b.example"]
        [hub]
        endpoint = "https://hub.example"
        offline = true
        cache_dir = "hub"
        [serve]
        start_timeout_s = 7.5
        [gateway.api_keys]
        secret = "tenant"
        [log]
        dir = "logs"
        [[fleet]]
        name = "a \\"quoted\\" name"
        aliases = ["x"]
        policy = {preset = "sglang", batch = {chunk_tokens = 512}}
        [[fleet]]
        model = "llama-3.1-8b"
        executor = {kind = "modelled", gpu = "a100-80g"}
        cache = {num_blocks = 100, prefix = false}
    """
    config = load_config(write(tmp_path, text))
    printed = print_config(config)
    assert "secret" not in printed
    back = load_config(write(tmp_path, printed))
    assert print_config(back) == printed
    assert replace(back.gateway, api_keys={}) == replace(config.gateway, api_keys={})
    assert (back.seed, back.log, back.net) == (config.seed, config.log, config.net)
    assert (back.hub, back.serve) == (config.hub, config.serve)
    assert back.hub.cache_dir == Path("hub") and back.serve.start_timeout_s == 7.5
    for index, fleet in enumerate(config.fleet):
        assert back.fleet[index].served_name == fleet.served_name
        assert back.fleet[index].executor == fleet.executor
        assert back.fleet[index].cache == fleet.cache
        assert replica_specs(back, index) == replica_specs(config, index)


def test_a_spec_travels_as_json(tmp_path: Path) -> None:
    sets = [
        "fleet.0.executor.threads=1",
        f"log.dir={str(tmp_path)!r}",
        "fleet.0.cache.num_blocks=9",
    ]
    (spec,) = replica_specs(load_config(sets=sets), 0, "text")
    assert spec.log_dir == tmp_path
    assert ReplicaSpec.from_json(spec.to_json()) == spec
