"""What /metrics says, read back by Prometheus' own parser."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pumice.server.metrics import CONTENT_TYPE, Finished, Metrics, Standing


def read(metrics: Metrics) -> dict[tuple[str, ...], float]:
    """Each sample by its name, its model and the values of its other labels."""
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels, key=("model_name").__ne__))): sample.value
        for family in text_string_to_metric_families(metrics.text().decode())
        for sample in family.samples
    }


def test_what_requests_have_come_to() -> None:
    metrics = Metrics(list)
    metrics.finished(Finished("llava", "stop", 600, 576, 11, 1, 0.3, 2.3))
    metrics.finished(Finished("llava", "length", 10, 0, 1, 0, 0.04, 0.04))
    metrics.finished(Finished("llava", "abort", 5, 0, 0, 2, None, 7.0))
    metrics.finished(Finished("pebble", "stop", 1, 0, 2, 0, 0.1, 0.2))
    metrics.refused("llava")
    metrics.refused("llava")
    found = read(metrics)
    assert found["pumice:prompt_tokens_total", "llava"] == 615
    assert found["pumice:prompt_tokens_cached_total", "llava"] == 576
    assert found["pumice:generation_tokens_total", "llava"] == 12
    assert found["pumice:images_total", "llava"] == 3
    assert found["pumice:request_refused_total", "llava"] == 2
    assert ("pumice:request_refused_total", "pebble") not in found
    for reason in ("stop", "length", "abort"):
        assert found["pumice:request_success_total", "llava", reason] == 1
    # Two had a first token; one of them had more, (2.3 - 0.3) s for the ten after the first.
    assert found["pumice:time_to_first_token_seconds_count", "llava"] == 2
    assert found["pumice:time_to_first_token_seconds_bucket", "llava", "0.05"] == 1
    assert found["pumice:time_to_first_token_seconds_bucket", "llava", "0.5"] == 2
    assert found["pumice:time_per_output_token_seconds_count", "llava"] == 1
    assert found["pumice:time_per_output_token_seconds_sum", "llava"] == pytest.approx(0.2)
    assert found["pumice:e2e_request_latency_seconds_count", "llava"] == 3
    assert found["pumice:e2e_request_latency_seconds_sum", "llava"] == pytest.approx(9.34)
    assert found["pumice:generation_tokens_total", "pebble"] == 2


def test_what_is_in_memory_now() -> None:
    now = [Standing("llava", 3, 2, 0.25), Standing('a"b\\c\n', 0, 0, 0.0)]
    metrics = Metrics(lambda: now)
    found = read(metrics)
    assert found[("pumice:models_loaded",)] == 2
    assert found["pumice:num_requests_running", "llava"] == 3
    assert found["pumice:num_requests_waiting", "llava"] == 2
    assert found["pumice:kv_cache_usage_perc", "llava"] == 0.25
    assert found["pumice:num_requests_running", 'a"b\\c\n'] == 0
    now.clear()
    found = read(metrics)
    assert found[("pumice:models_loaded",)] == 0
    assert not [name for name in found if name[0] == "pumice:num_requests_running"]


def test_each_server_counts_for_itself() -> None:
    one, other = Metrics(list), Metrics(list)
    one.refused("llava")
    assert ("pumice:request_refused_total", "llava") in read(one)
    assert ("pumice:request_refused_total", "llava") not in read(other)
    assert CONTENT_TYPE.startswith("text/plain; version=")
