"""`Metrics`: what a server tells Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory, processor time, open files
        self.requests = Counter(
            "repnet_requests", "Answers to POST /predict", ["code"], registry=self.registry
        )
        self.seconds = Histogram(
            "repnet_request_seconds",
            "Time to answer POST /predict",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.batches = Histogram(
            "repnet_batch_images",
            "Images of a batch",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "repnet_requests_in_flight", "Requests without an answer", registry=self.registry
        )
        self.pixels = Gauge(
            "repnet_pixels_in_flight", "Pixels of images in memory", registry=self.registry
        )
