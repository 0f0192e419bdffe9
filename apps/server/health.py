"""Whether the server is up, and figures for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from fastapi import APIRouter
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import BaseModel
from starlette.responses import Response

from .answers import Problem, problems
from .service import Service


class Health(BaseModel):
    status: Literal["ok", "stopping"]


class _Figures(Collector):
    """Read from the service at each scrape, so that nothing is counted twice."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def collect(self) -> Iterator[Metric]:
        jobs = CounterMetricFamily("edge_sd_jobs", "Jobs that ended", labels=("door", "state"))
        for (door, state), count in sorted(self.service.counts.items()):
            jobs.add_metric((door, state), count)
        yield jobs
        yield CounterMetricFamily("edge_sd_pictures", "Pictures drawn", value=self.service.pictures_drawn)
        seconds = self.service.seconds_drawing
        yield CounterMetricFamily("edge_sd_drawing_seconds", "Seconds of loading and drawing", value=seconds)
        yield GaugeMetricFamily("edge_sd_queue_depth", "Jobs that wait or are drawn", value=self.service.depth)
        yield GaugeMetricFamily("edge_sd_queue_limit", "Jobs that may wait", value=self.service.limit)
        loaded = len(self.service.engines.loaded())
        yield GaugeMetricFamily("edge_sd_models_loaded", "Models in memory", value=loaded)


def router(service: Service) -> APIRouter:
    """GET /health, which needs no token, and GET /metrics."""
    routes = APIRouter(tags=["server"])
    registry = CollectorRegistry()
    registry.register(_Figures(service))

    @routes.get("/health")
    async def health() -> Health:
        """Whether jobs are accepted."""
        return Health(status="stopping" if service.stopping else "ok")

    @routes.get(
        "/metrics", response_class=Response, responses={**problems(Problem), 200: {"content": {"text/plain": {}}}}
    )
    def metrics() -> Response:
        """Figures in Prometheus' text format."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return routes
