"""What `/metrics` says, for Prometheus. The names are vLLM's, with `pumice:` before them in place of `vllm:`, so that
dashboards made for the one need no more than that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CONTENT_TYPE_LATEST as CONTENT_TYPE
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

__all__ = ["CONTENT_TYPE", "Finished", "Metrics", "Reason", "Standing"]

Reason = Literal["stop", "length", "abort", "error"]
"""Why an answer ended: of itself, at its limit, because its client left, or because something failed."""

_FIRST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5)
_WHOLE_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)


@dataclass(frozen=True)
class Standing:
    """What one model in memory does at this moment."""

    model: str
    running: int
    waiting: int
    cache_usage: float
    """Share of the cache's pages that are in use, from 0 to 1."""


@dataclass(frozen=True)
class Finished:
    """What one request has come to."""

    model: str
    """A name of this server's own models; never what a request says, which may be anything."""
    reason: Reason
    prompt_tokens: int
    cached_tokens: int
    """Of the prompt's: those that were known from before."""
    generated_tokens: int
    images: int
    first_token_s: float | None
    """From the request's arrival; None where no token came."""
    whole_s: float


class Metrics:
    """Counts of one server, in a registry of its own."""

    def __init__(self, standings: Callable[[], Iterable[Standing]]) -> None:
        """`standings` says what the models in memory do; it is asked whenever somebody looks."""
        self._registry = CollectorRegistry()
        self._registry.register(_Standings(standings))
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts, images included.")
        self._cached = self._counter("prompt_tokens_cached", "Tokens of prompts that were known from before.")
        self._generated = self._counter("generation_tokens", "Tokens of answers.")
        self._images = self._counter("images", "Pictures in requests.")
        self._ended = self._counter("request_success", "Requests that ended, by reason.", "finished_reason")
        self._refused = self._counter("request_refused", "Requests refused because too many were waiting.")
        self._first_s = self._histogram("time_to_first_token_seconds", "From arrival to the first token.", _FIRST_S)
        self._token_s = self._histogram("time_per_output_token_seconds", "Between tokens, after the first.", _TOKEN_S)
        self._whole_s = self._histogram("e2e_request_latency_seconds", "From arrival to the last token.", _WHOLE_S)

    def finished(self, request: Finished) -> None:
        name = request.model
        self._prompt.labels(name).inc(request.prompt_tokens)
        self._cached.labels(name).inc(request.cached_tokens)
        self._generated.labels(name).inc(request.generated_tokens)
        self._images.labels(name).inc(request.images)
        self._ended.labels(name, request.reason).inc()
        self._whole_s.labels(name).observe(request.whole_s)
        if request.first_token_s is not None:
            self._first_s.labels(name).observe(request.first_token_s)
            if request.generated_tokens > 1:
                steps = request.generated_tokens - 1
                self._token_s.labels(name).observe((request.whole_s - request.first_token_s) / steps)

    def refused(self, model: str) -> None:
        """The queue of a model of this server was full."""
        self._refused.labels(model).inc()

    def text(self) -> bytes:
        """All of it, in Prometheus' text format, which `CONTENT_TYPE` names."""
        return generate_latest(self._registry)

    def _counter(self, name: str, about: str, *more: str) -> Counter:
        return Counter(f"pumice:{name}", about, ("model_name", *more), registry=self._registry)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"pumice:{name}", about, ("model_name",), buckets=buckets, registry=self._registry)


class _Standings:
    """Gauges that hold nothing: what they show is asked for when they are read."""

    def __init__(self, standings: Callable[[], Iterable[Standing]]) -> None:
        self._standings = standings

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        now = list(self._standings())
        yield GaugeMetricFamily("pumice:models_loaded", "Models in memory.", value=len(now))
        for name, about, values in (
            ("num_requests_running", "Requests that are being answered.", [each.running for each in now]),
            ("num_requests_waiting", "Requests that wait for their turn.", [each.waiting for each in now]),
            ("kv_cache_usage_perc", "Share of the cache in use; 1 is all of it.", [each.cache_usage for each in now]),
        ):
            gauge = GaugeMetricFamily(f"pumice:{name}", about, labels=["model_name"])
            for standing, value in zip(now, values):
                gauge.add_metric([standing.model], value)
            yield gauge
