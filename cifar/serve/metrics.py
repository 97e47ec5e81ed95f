"""What the service counts, in the format of Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
MOST_CLASSES = 1000
"""Of more classes, answers are not counted one by one: each would be a time series."""


class Metrics:
    """Of one replica. Its name is a label of every line, since any replica may be the one that is asked."""

    def __init__(self, replica: str) -> None:
        disable_created_metrics()  # a second line beside each, which nothing reads
        self.registry = registry = CollectorRegistry()
        self.replica = replica

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"cifar_{name}", text, ("replica", *labels), registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"cifar_{name}", text, ("replica", *labels), registry=registry, buckets=buckets)

        self._requests = counter("requests", "HTTP requests by route and status.", "route", "status")
        self._errors = counter("image_errors", "Images without an answer by reason.", "reason")
        self._images = counter("images", "Images that were answered by version.", "version")
        self._labels = counter("answers", "Answers by version and class.", "version", "label")
        self._failures = counter("batch_failures", "Batches whose computation failed by version.", "version")
        self._shadow = counter("shadow_images", "Images that the shadow answered, too.", "version", "same")
        self._withdrawn = counter("canaries_withdrawn", "Canaries that broke a limit.", "version")
        self._request_seconds = histogram("request_seconds", "From a whole request to its answer.", SECONDS, "route")
        self._queue_seconds = histogram("queue_seconds", "Wait of a request for its computation.", SECONDS)
        self._compute_seconds = histogram("compute_seconds", "Decoding and computing a batch.", SECONDS, "version")
        self._batch_images = histogram("batch_images", "Images computed together.", SIZES, "version")
        self.queue = Gauge(
            "cifar_queue_images", "Images that wait or are computed.", ("replica",), registry=registry
        ).labels(replica)
        self.body = Gauge(
            "cifar_request_bytes", "Bytes of requests that are not answered.", ("replica",), registry=registry
        ).labels(replica)

    def request(self, route: str, status: int, seconds: float) -> None:
        self._requests.labels(self.replica, route, status).inc()
        self._request_seconds.labels(self.replica, route).observe(seconds)

    def waited(self, seconds: float) -> None:
        self._queue_seconds.labels(self.replica).observe(seconds)

    def batch(self, version: str, images: int, seconds: float) -> None:
        self._compute_seconds.labels(self.replica, version).observe(seconds)
        self._batch_images.labels(self.replica, version).observe(images)

    def answered(self, version: str, labels: dict[str, int], classes: int) -> None:
        """`labels`: images per class."""
        self._images.labels(self.replica, version).inc(sum(labels.values()))
        if classes <= MOST_CLASSES:
            for label, count in labels.items():
                self._labels.labels(self.replica, version, label).inc(count)

    def bad_image(self, reason: str) -> None:
        self._errors.labels(self.replica, reason).inc()

    def failed(self, version: str) -> None:
        self._failures.labels(self.replica, version).inc()

    def shadowed(self, version: str, same: int, different: int) -> None:
        self._shadow.labels(self.replica, version, "yes").inc(same)
        self._shadow.labels(self.replica, version, "no").inc(different)

    def withdrew(self, version: str) -> None:
        self._withdrawn.labels(self.replica, version).inc()

    def text(self) -> str:
        return generate_latest(self.registry).decode()


def merge(texts: list[str]) -> str:
    """Expositions of several replicas as one: each family's header once, then all its lines."""
    families: dict[str, tuple[list[str], list[str]]] = {}
    for text in texts:
        name, known = "", False
        for line in text.splitlines():
            if line.startswith("# HELP "):
                name = line.split(" ", 3)[2]
                known = name in families
                families.setdefault(name, ([], []))
            header, lines = families.setdefault(name, ([], []))
            if not line.startswith("#"):
                lines.append(line)
            elif not known:
                header.append(line)
    return "".join(f"{line}\n" for header, lines in families.values() for line in (*header, *lines))
