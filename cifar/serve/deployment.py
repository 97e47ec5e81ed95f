"""The Service as a deployment of Ray Serve: replicas behind a proxy, as many as the load wants."""

import asyncio
import dataclasses
import logging
import time
from collections.abc import Mapping
from typing import Any

import ray
import torch
from fastapi import FastAPI
from ray import serve
from ray.experimental import internal_kv
from ray.serve.context import _get_global_client  # Serve has no other way to ask where it listens

from cifar.machine import usable_cpus
from cifar.serve.app import make_app
from cifar.serve.config import ServeConfig
from cifar.serve.keys import Keys, check_host, read_keys
from cifar.serve.metrics import merge
from cifar.serve.service import Service

REPLICA_MEMORY = 1 << 30
"""Bytes that a replica asks for: what it holds with a small model. Large images at the limits may take twice as much
again for a moment."""
MOST = 4
"""Replicas that `auto` starts on CPUs."""
ONGOING = 100
"""Requests at a time that a replica is meant to have when their number follows the load: enough to fill batches."""
PUBLISH_SECONDS = 1.0
STALE_SECONDS = 15.0
METRICS_KEY = b"cifar-metrics-"


class Replica:
    """One process that answers: its Service, and the app around it."""

    def __init__(self, config: ServeConfig, threads: int, keys: Keys | None) -> None:
        # Only the messages of this package: Serve writes its own.
        logging.getLogger("cifar").setLevel(logging.INFO)
        if threads:
            torch.set_num_threads(threads)
        self._keys = keys
        self._name = serve.get_replica_context().replica_id.unique_id
        self._service = Service(config, self._name)
        self._publishing = asyncio.get_running_loop().create_task(self._publish())

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_app(self._service, self._gather, self._keys)

    async def _publish(self) -> None:
        """Any replica may be asked for the metrics of all, so each leaves its own in the cluster's key-value store."""
        key = METRICS_KEY + self._name.encode()
        while True:
            text = f"{time.time()}\n{self._service.metrics.text()}"
            await asyncio.to_thread(internal_kv._internal_kv_put, key, text.encode(), overwrite=True)
            await asyncio.sleep(PUBLISH_SECONDS)

    async def _gather(self) -> str:
        return await asyncio.to_thread(self._read_all)

    def _read_all(self) -> str:
        mine = METRICS_KEY + self._name.encode()
        texts = [self._service.metrics.text()]
        for key in internal_kv._internal_kv_list(METRICS_KEY):
            value = b"" if key == mine else internal_kv._internal_kv_get(key) or b""
            written_at, _, text = value.decode().partition("\n")
            if not text:
                continue
            if time.time() - float(written_at) > STALE_SECONDS:  # it has ended
                internal_kv._internal_kv_del(key)
            else:
                texts.append(text)
        return merge(texts)


def make_deployment(config: ServeConfig, keys: Keys | None, own: bool = False) -> serve.Application:
    """The application for the cluster that this process is connected to; `own`: of one machine, for nothing else.

    ConfigError where Serve lets other machines in, without keys and not `config.insecure`.
    """
    if ray.is_initialized() and (client := _get_global_client(raise_if_no_controller_running=False)):
        check_host(client.http_config.host, keys, config.insecure)
    gpus = gpus_of(config)
    config = dataclasses.replace(config, replicas=replicas_of(config, gpus))
    low, high = config.replica_counts
    scaling: dict[str, Any] = {"num_replicas": low}
    if high > low:
        limits = {"min_replicas": low, "max_replicas": high, "target_ongoing_requests": ONGOING}
        scaling = {"autoscaling_config": {**limits, "upscale_delay_s": 5, "downscale_delay_s": 60}}
    wrapped: Any = serve.ingress(None)(Replica)
    deployment: Any = serve.deployment(
        wrapped,
        name="cifar",
        # The queue of the service is the bound: it counts images, and says 503 with Retry-After.
        max_ongoing_requests=10 * config.max_queue,
        # On a machine of its own a new replica finds room before an old one goes.
        ray_actor_options={"num_cpus": 0.5 if own else 1, "num_gpus": gpus, "memory": REPLICA_MEMORY},
        health_check_period_s=5,
        graceful_shutdown_timeout_s=30,
        logging_config={"enable_access_log": False},  # /metrics counts requests; a line for each costs
        **scaling,
    )
    # Several processes of one thread each answer more than one whose threads wait for each other: 1.3 times the images
    # in requests of 32, on two cores.
    return deployment.bind(config, max(1, usable_cpus() // high) if own else 0, keys)


def build(args: dict[str, Any]) -> serve.Application:
    """For `serve deploy`: the fields of ServeConfig as `args` of the application. Any node may have to run it."""
    known = {field.name for field in dataclasses.fields(ServeConfig)}
    if unknown := sorted(args.keys() - known):
        raise ValueError(f"args: unknown {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    config = ServeConfig(**args)
    return make_deployment(config, read_keys(config.api_key_file))


def gpus_of(config: ServeConfig) -> int:
    """Of each replica: one where a GPU is asked for, or the cluster has one for every replica."""
    if config.device != "auto":
        return int(config.device != "cpu")
    return int(_resources().get("GPU", 0) >= config.replica_counts[1])


def replicas_of(config: ServeConfig, gpus: int) -> str:
    """What `auto` means here: a replica for each GPU, or for each core that has 4 GiB of memory, up to MOST."""
    if config.replicas != "auto":
        return config.replicas
    resources = _resources()
    if gpus:
        return str(max(1, int(resources.get("GPU", 1))))
    cores, memory = resources.get("CPU", 1), resources.get("memory", 0)
    return str(max(1, min(MOST, int(cores), int(memory / (4 << 30)))))


def _resources() -> Mapping[str, float]:
    return ray.cluster_resources() if ray.is_initialized() else {}
