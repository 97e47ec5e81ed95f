"""The service: what it answers, what it refuses, and which version it asks. Without Ray, in this process."""

import asyncio
import base64
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from cifar.config import Config, ConfigError, DataConfig, ModelConfig
from cifar.data.remote import StorageFailed
from cifar.model_dir import ModelInfo, save_model
from cifar.models import build_model
from cifar.predictor import Predictor
from cifar.serve.app import make_app
from cifar.serve.config import ServeConfig
from cifar.serve.errors import Busy, UnknownVersion
from cifar.serve.limits import HELD_REQUESTS, Limits
from cifar.serve.metrics import Metrics, merge
from cifar.serve.queue import Queue
from cifar.serve.service import CANARY_LEAST, KEPT_BYTES, TOOK_TOO_LONG, WAITING_REQUESTS, Service
from cifar.serve.versions import CANARY, SHADOW
from cifar.store import Store
from tests.images import bad_images, encode, noise, png

CLASSES = ("a", "b", "c")


def save(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = Config(data=DataConfig(image_size=16), model=ModelConfig(widths=(8, 8)))
    mean, std = (120.0, 110.0, 100.0), (60.0, 50.0, 40.0)
    model = build_model(config, len(CLASSES), mean, std)
    torch.nn.init.normal_(next(iter(model.modules())).get_parameter("network.head.weight"), std=3)
    info = ModelInfo(config=config, classes=CLASSES, mean=mean, std=std, fingerprint="f", source="digits")
    save_model(folder / "model", model, info, {"val_accuracy": 0.5, "lr": 1.0})
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("runs") / "flowers")


@pytest.fixture
def store(tmp_path: Path, run: Path) -> Store:
    """With one version of `flowers`, its champion."""
    store = Store(str(tmp_path / "store"))
    store.promote(store.publish(str(run), "flowers"))
    return store


def config_of(store: Store, **values: Any) -> ServeConfig:
    defaults: dict[str, Any] = {"model": "flowers", "store": store.path, "device": "cpu", "precision": "fp32"}
    return ServeConfig(**(defaults | values))


@pytest.fixture
def service(store: Store) -> Iterator[Service]:
    service = Service(config_of(store))
    yield service
    service.close()


@pytest.fixture
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(make_app(service)) as client:
        yield client


def encoded(*images: bytes) -> dict[str, list[str]]:
    return {"images": [base64.b64encode(image).decode() for image in images]}


def test_all_ways_to_send_images_give_what_the_predictor_gives(client: TestClient, run: Path) -> None:
    files = [png(0), png(1, 40)]
    predictor = Predictor(run / "model", "cpu", precision="fp32")
    expected = predictor.predict([predictor.decode(data) for data in files])
    answers = [
        client.post("/predict", files=[("files", ("0.png", files[0])), ("files", ("1.png", files[1]))]),
        client.post("/predict", json=encoded(*files)),
        client.post("/predict", json={"images": [f"data:image/png;base64,{one}" for one in encoded(*files)["images"]]}),
    ]
    for answer in answers:
        assert answer.status_code == 200
        body = answer.json()
        assert (body["model"], len(body["predictions"])) == ("flowers", 2)
        found = [[one["probabilities"][name] for name in CLASSES] for one in body["predictions"]]
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert [one["name"] for one in answers[0].json()["predictions"]] == ["0.png", "1.png"]
    for kind in ("image/png", "application/octet-stream"):
        (one,) = client.post("/predict", content=files[1], headers={"content-type": kind}).json()["predictions"]
        assert one["label"] == CLASSES[int(expected[1].argmax())]
        assert one["probability"] == pytest.approx(float(expected[1].max()), abs=1e-6)


def test_top_k_and_abstention(store: Store) -> None:
    service = Service(config_of(store, threshold=1.0, top_k=2))
    with TestClient(make_app(service)) as client:
        (one,) = client.post("/predict", json=encoded(png(0))).json()["predictions"]
        assert one["abstained"]
        assert len(one["top_k"]) == 2
        (one,) = client.post("/predict?top_k=1", json=encoded(png(0))).json()["predictions"]
        assert len(one["top_k"]) == 1


def test_one_bad_image_does_not_fail_the_others(client: TestClient) -> None:
    bad = bad_images()
    answer = client.post("/predict", json=encoded(png(0), *(data for data, _ in bad.values()), png(1)))
    assert answer.status_code == 200
    first, *middle, last = answer.json()["predictions"]
    assert first["label"] in CLASSES
    assert last["label"] in CLASSES
    assert [one["error"] for one in middle] == [reason for _, reason in bad.values()]
    assert 'cifar_image_errors_total{reason="not an image"' in client.get("/metrics").text


def test_where_no_image_can_be_read_the_status_says_so(client: TestClient) -> None:
    answer = client.post("/predict", content=b"no image", headers={"content-type": "image/png"})
    assert answer.status_code == 422
    assert answer.json()["predictions"] == [{"error": "not an image"}]


def test_large_images_are_decoded_apart_and_answered_alike(client: TestClient, run: Path) -> None:
    data = png(3, 200)
    assert len(data) > 100_000
    predictor = Predictor(run / "model", "cpu", precision="fp32")
    expected = predictor.predict(predictor.decode(data)[None])[0]
    answer = client.post("/predict", json=encoded(data, data[:50_000])).json()["predictions"]
    np.testing.assert_allclose([answer[0]["probabilities"][name] for name in CLASSES], expected, atol=1e-6)
    assert answer[1]["error"] == "truncated or damaged"


@pytest.mark.parametrize(
    ("content", "kind", "status", "message"),
    [
        (b"", "image/png", 400, "empty body"),
        (b"{", "application/json", 400, "not JSON"),
        (b"[1]", "application/json", 400, '{"images"'),
        (b'{"images": []}', "application/json", 400, '{"images"'),
        (b'{"images": [7]}', "application/json", 400, '{"images"'),
        (b'{"images": ["%%%"]}', "application/json", 400, "images[0] is not base64"),
        (b"[" * 100_000, "application/json", 400, "not JSON"),
        (b"--x\r\n", "multipart/form-data; boundary=y", 400, "Invalid multipart"),
        (b"x", "multipart/form-data", 400, "boundary"),
        (b"--y--\r\n", "multipart/form-data; boundary=y", 400, "no files"),
        (b"x" * 2_000_001, "image/png", 413, "larger than 2 MB"),
    ],
)
def test_what_cannot_be_understood_is_one_clear_error(
    store: Store, content: bytes, kind: str, status: int, message: str
) -> None:
    with TestClient(make_app(Service(config_of(store, max_request_mb=2)))) as client:
        answer = client.post("/predict", content=content, headers={"content-type": kind})
        assert answer.status_code == status
        assert message in answer.json()["error"]


def test_too_many_images_and_unknown_versions_are_refused(store: Store) -> None:
    with TestClient(make_app(Service(config_of(store, max_images=2)))) as client:
        answer = client.post("/predict", json=encoded(*3 * [png(0)]))
        assert (answer.status_code, answer.json()) == (413, {"error": "3 images; a request may hold 2"})
        answer = client.post("/predict?version=nightly", json=encoded(png(0)))
        assert answer.status_code == 404
        assert "champion" in answer.json()["error"]
        assert client.post("/predict?top_k=0", json=encoded(png(0))).status_code == 400
        assert client.get("/nowhere").json() == {"error": "Not Found"}


def test_models_health_and_page(client: TestClient, store: Store) -> None:
    models = client.get("/models").json()
    version = store.resolve("flowers")
    assert (models["name"], models["default"]) == ("flowers", version.version)
    (card,) = models["versions"]
    assert card["aliases"] == ["champion"]
    assert card["classes"] == list(CLASSES)
    assert card["numbers"] == {"val_accuracy": 0.5}
    assert client.get("/healthz").text == "ok"
    assert client.get("/readyz").text == "ready"
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_the_documents_name_every_status(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert set(paths["/predict"]["post"]["responses"]) >= {"200", "400", "404", "408", "413", "422", "500", "503"}


def test_the_documentation_loads_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/docs")
    assert page.status_code == 200
    parts = re.findall(r'(?:src|href)="([^"]*)"', page.text)
    assert len(parts) >= 2
    for part in parts:
        assert part.startswith("/")
        assert client.get(part).status_code == 200
    assert "://" not in page.text


def test_a_folder_needs_no_store(run: Path) -> None:
    with TestClient(make_app(Service(ServeConfig(model=str(run), device="cpu")))) as client:
        body = client.post("/predict", json=encoded(png(0))).json()
    assert (body["model"], body["version"]) == ("flowers", "local")


def test_without_a_name_the_model_in_the_box_answers() -> None:
    service = Service(ServeConfig(device="cpu", max_batch=2))
    assert service.name == "cifar10"
    service.close()


def test_a_model_that_is_not_there_is_named(store: Store) -> None:
    with pytest.raises(ConfigError, match=r"--model trees: .*there are: flowers"):
        Service(config_of(store, model="trees"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"replicas": "0"}, "--replicas 0: use a count"),
        ({"replicas": "3:2"}, "--replicas 3:2"),
        ({"canary_share": 1.5}, "--canary-share 1.5: use a share from 0 to 1"),
        ({"max_images": 6000}, "--max-images 6000: use 1 to --max-queue, 1024"),
    ],
)
def test_wrong_settings_name_the_flag(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServeConfig(**values)


# Versions


def publish(store: Store, folder: Path, alias: str, seed: int) -> str:
    version = store.publish(str(save(folder / f"v{seed}", seed)), "flowers")
    store.promote(version, alias)
    return version.version


def test_promotion_and_roll_back_are_followed_while_requests_are_answered(store: Store, tmp_path: Path) -> None:
    service = Service(config_of(store, poll_seconds=0.05))
    old = service.selection.default.version
    with TestClient(make_app(service)) as client:

        def wait_for(version: str) -> None:
            deadline = time.monotonic() + 20
            while True:
                answer = client.post("/predict", json=encoded(png(0)))
                assert answer.status_code == 200
                if answer.json()["version"] == version:
                    return
                assert time.monotonic() < deadline

        new = publish(store, tmp_path, "champion", 1)
        wait_for(new)
        store.roll_back("flowers", "champion")
        wait_for(old)
        assert client.post(f"/predict?version={new}", json=encoded(png(0))).status_code == 404  # no alias names it


def test_a_damaged_version_is_not_served_and_the_old_one_stays(store: Store, tmp_path: Path) -> None:
    service = Service(config_of(store))
    old = service.selection.default.version
    new = publish(store, tmp_path, "champion", 1)
    (Path(store.path) / "flowers" / new / "model.safetensors").write_bytes(b"damaged")
    service._versions.refresh()
    assert service.selection.default.version == old
    store.promote(store.resolve(f"flowers/{old}"))
    bad = publish(store, tmp_path, "nightly", 2)
    (Path(store.path) / "flowers" / bad / "model.safetensors").write_bytes(b"damaged")
    service._versions.refresh()
    assert service.selection.aliases == {"champion": old}
    service.close()


def test_a_store_that_is_away_for_a_while_is_followed_when_it_is_back(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also one that goes between two questions."""
    service = Service(config_of(store))
    old = service.selection.default.version
    new = publish(store, tmp_path, "champion", 1)

    def away(*_: Any) -> Any:
        raise StorageFailed("away")

    for question in ("aliases", "versions"):
        with monkeypatch.context() as patch:
            patch.setattr(Store, question, away)
            for _ in range(3):
                service._versions.refresh()
                assert ask(service, 1) == [old]
    assert caplog.text.count("the versions stay as they are: away") == 1
    service._versions.refresh()
    assert ask(service, 1) == [new]
    service.close()


def ask(service: Service, times: int, version: str | None = None) -> list[str]:
    """Versions that answered so many requests, one after the other."""

    async def run() -> list[str]:
        return [(await service.predict([png(0)], version)).served.version for _ in range(times)]

    return asyncio.run(run())


def test_the_canary_gets_its_share_and_an_alias_can_be_asked_for(store: Store, tmp_path: Path) -> None:
    canary = publish(store, tmp_path, CANARY, 1)
    service = Service(config_of(store, canary_share=0.3))
    answered = ask(service, 200)
    assert 30 <= answered.count(canary) <= 95  # 60 expected, standard deviation 6.5
    assert set(ask(service, 3, CANARY)) == {canary}
    assert canary not in ask(service, 20, "champion")
    with pytest.raises(UnknownVersion):
        ask(service, 1, SHADOW)
    service.close()


def breaking(service: Service, version: str, how: Callable[[np.ndarray], np.ndarray]) -> None:
    """Let the predictor of a version fail."""
    served = service.selection.served[version]
    answer = served.predictor.predict
    served.predictor.predict = lambda images: how(answer(images))  # type: ignore[method-assign]


def test_a_failing_canary_fails_nobody_and_is_withdrawn(store: Store, tmp_path: Path) -> None:
    canary = publish(store, tmp_path, CANARY, 1)
    service = Service(config_of(store, canary_share=1.0))
    breaking(service, canary, lambda probabilities: probabilities * np.nan)
    champion = service.selection.default.version
    assert set(ask(service, CANARY_LEAST + 5)) == {champion}
    assert service.selection.canary is None
    assert CANARY not in store.aliases("flowers")
    assert f'cifar_canaries_withdrawn_total{{replica="local",version="{canary}"}} 1.0' in service.metrics.text()
    service._versions.refresh()
    assert service.selection.canary is None
    store.promote(store.resolve(f"flowers/{canary}"), CANARY)  # tried again
    service._versions.refresh()
    assert service.selection.canary is not None
    service.close()


def test_a_canary_is_judged_by_its_own_batches(store: Store, tmp_path: Path) -> None:
    old = publish(store, tmp_path, CANARY, 1)
    service = Service(config_of(store, canary_share=1.0, canary_max_errors=0.3))
    breaking(service, old, lambda probabilities: probabilities * np.nan)
    ask(service, CANARY_LEAST - 1)  # too few to decide
    new = publish(store, tmp_path, CANARY, 2)
    service._versions.refresh()
    assert set(ask(service, CANARY_LEAST)) == {new}
    assert service.selection.canary is not None
    service.close()


def test_a_slow_canary_is_withdrawn_at_the_limit_that_was_set(store: Store, tmp_path: Path) -> None:
    canary = publish(store, tmp_path, CANARY, 1)

    def slow(probabilities: np.ndarray) -> np.ndarray:
        time.sleep(0.03)
        return probabilities

    for limit, withdrawn in ((0.0, False), (25.0, True)):
        service = Service(config_of(store, canary_share=1.0, canary_max_ms=limit))
        breaking(service, canary, slow)
        ask(service, CANARY_LEAST)
        assert (service.selection.canary is None) == withdrawn
        service.close()


def test_the_shadow_answers_too_but_nobody_sees_it(store: Store, tmp_path: Path) -> None:
    shadow = publish(store, tmp_path, SHADOW, 1)
    service = Service(config_of(store))

    async def run() -> None:
        for _ in range(5):
            assert (await service.predict([png(0), b"bad"])).served.version != shadow
            while service._tasks:
                await asyncio.sleep(0.001)

    asyncio.run(run())
    text = service.metrics.text()
    lines = [line for line in text.splitlines() if line.startswith("cifar_shadow_images_total")]
    assert sum(float(line.split()[-1]) for line in lines) == 5
    assert f'cifar_images_total{{replica="local",version="{shadow}"}}' not in text
    service.close()


def test_a_model_that_fails_is_a_500_with_a_reason(store: Store) -> None:
    service = Service(config_of(store))
    breaking(service, service.selection.default.version, lambda probabilities: probabilities * np.nan)
    with TestClient(make_app(service)) as client:
        answer = client.post("/predict", json=encoded(png(0)))
    assert answer.status_code == 500
    assert "failed" in answer.json()["error"]


# Queue and limits


def test_a_batch_grows_while_another_one_is_computed_and_keeps_the_order() -> None:
    batches: list[list[int]] = []

    def compute(key: str, items: list[int], waited: list[float]) -> list[str]:
        batches.append(items)
        time.sleep(0.02)
        return [f"{key}{item}" for item in items]

    queue: Queue[str, int, str] = Queue(compute, max_batch=4, max_queue=100)

    async def run() -> list[list[str]]:
        first = asyncio.create_task(queue.put("x", [0]))
        await asyncio.sleep(0.005)
        keys = ("x", "y", "x", "x", "y")
        rest = [asyncio.create_task(queue.put(key, [10 * n, 10 * n + 1])) for n, key in enumerate(keys, 1)]
        return await asyncio.gather(first, *rest)

    answers = asyncio.run(run())
    assert answers == [["x0"], ["x10", "x11"], ["y20", "y21"], ["x30", "x31"], ["x40", "x41"], ["y50", "y51"]]
    assert batches == [[0], [10, 11, 30, 31], [20, 21, 50, 51], [40, 41]]
    assert queue.size == 0
    queue.close()


def test_a_large_request_is_computed_in_several_batches() -> None:
    sizes = []

    def compute(key: str, items: list[int], waited: list[float]) -> list[int]:
        sizes.append(len(items))
        return items

    queue: Queue[str, int, int] = Queue(compute, max_batch=4, max_queue=100)
    assert asyncio.run(queue.put("x", list(range(10)))) == list(range(10))
    assert sizes == [4, 4, 2]
    queue.close()


def test_a_full_queue_refuses_at_once_and_a_failure_is_the_callers() -> None:
    def compute(key: str, items: list[int], waited: list[float]) -> list[int]:
        time.sleep(0.02)
        if key == "bad":
            raise ZeroDivisionError
        return items

    queue: Queue[str, int, int] = Queue(compute, max_batch=4, max_queue=5)

    async def run() -> list[Any]:
        tasks = [asyncio.create_task(queue.put(key, [1, 2])) for key in ("good", "bad", "good")]
        return await asyncio.gather(*tasks, return_exceptions=True)

    good, bad, refused = asyncio.run(run())
    assert good == [1, 2]
    assert isinstance(bad, ZeroDivisionError)
    assert isinstance(refused, Busy)
    assert queue.size == 0
    queue.close()


def test_a_request_whose_client_left_is_not_computed() -> None:
    seen = []

    def compute(key: str, items: list[int], waited: list[float]) -> list[int]:
        seen.extend(items)
        time.sleep(0.02)
        return items

    queue: Queue[str, int, int] = Queue(compute, max_batch=1, max_queue=5)

    async def run() -> None:
        first = asyncio.create_task(queue.put("x", [1]))
        await asyncio.sleep(0.005)
        second = asyncio.create_task(queue.put("x", [2]))
        third = asyncio.create_task(queue.put("x", [3]))
        await asyncio.sleep(0)
        second.cancel()
        assert (await first, await third) == ([1], [3])

    asyncio.run(run())
    assert seen == [1, 3]
    queue.close()


def test_busy_is_503_with_retry_after(store: Store) -> None:
    service = Service(config_of(store, max_queue=2, max_images=2))
    service._queue.size = 1
    with TestClient(make_app(service)) as client:
        answer = client.post("/predict", json=encoded(png(0), png(1)))
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        service._queue.size = 2
        assert client.get("/readyz").status_code == 503


def limited(
    messages: list[dict[str, Any]], delay: float = 0.0, held: int = 0, **headers: str
) -> tuple[int, bytes, int]:
    """Status, body and bytes held afterwards of a request through Limits of 1,000 bytes and 0.05 s."""
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(await receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": seen[0]["body"]})

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(delay)
        return messages.pop(0)

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    limits = Limits(app, max_bytes=1000, seconds=0.05, metrics=Metrics("r"))
    limits._held = held
    scope = {"type": "http", "headers": [(name.replace("_", "-").encode(), v.encode()) for name, v in headers.items()]}
    asyncio.run(limits(scope, receive, send))
    return (sent[0]["status"], sent[1]["body"], limits._held - held) if sent else (0, b"", limits._held - held)


def part(size: int, more: bool) -> dict[str, Any]:
    return {"type": "http.request", "body": b"x" * size, "more_body": more}


def test_bodies_are_bounded_in_size_in_time_and_together() -> None:
    assert limited([part(600, True), part(400, False)]) == (200, b"x" * 1000, 0)
    assert limited([part(600, True), part(401, False)])[::2] == (413, 0)
    assert limited([], content_length="1001")[::2] == (413, 0)
    assert limited([part(1, True) for _ in range(100)], delay=0.01)[::2] == (408, 0)
    assert limited([part(600, False)], held=1000 * HELD_REQUESTS - 500)[::2] == (503, 0)
    assert limited([part(1, True), {"type": "http.disconnect"}]) == (0, b"", 0)


def test_metrics_of_replicas_are_one_document() -> None:
    one, other = Metrics("one"), Metrics("other")
    one.request("/predict", 200, 0.1)
    other.request("/predict", 200, 0.2)
    text = merge([one.text(), other.text()])
    assert text.count("# TYPE cifar_requests_total counter") == 1
    for name in ("one", "other"):
        assert f'cifar_requests_total{{replica="{name}",route="/predict",status="200"}} 1.0' in text
    assert merge([one.text()]) == one.text()


def test_arrays_are_answered_like_files(service: Service) -> None:
    image = noise(5, 24)

    async def run() -> Any:
        return await service.predict([image, encode(Image.fromarray(image))])

    answered = asyncio.run(run())
    np.testing.assert_array_equal(answered.probabilities[0], answered.probabilities[1])


def test_many_slow_clients_do_not_stop_the_others() -> None:
    """Where bodies fill all room, the one that has held most for longest makes place."""
    statuses: dict[str, int] = {}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    limits = Limits(app, max_bytes=1000, seconds=5, metrics=Metrics("r"))

    async def ask(name: str, first: int, pause: float = 0.0) -> None:
        messages = [part(first, True), part(1, False)]

        async def receive() -> dict[str, Any]:
            if len(messages) == 1:
                await asyncio.sleep(pause)
            return messages.pop(0)

        async def send(message: Any) -> None:
            statuses.setdefault(name, message.get("status", 0))

        await limits({"type": "http", "headers": []}, receive, send)

    async def run() -> None:
        slow = [asyncio.create_task(ask(f"slow {place}", 900, 0.2)) for place in range(HELD_REQUESTS)]
        await asyncio.sleep(0.05)
        await asyncio.gather(*(ask(f"quick {place}", 500) for place in range(5)))
        assert limits._held <= 1000 * HELD_REQUESTS
        await asyncio.gather(*slow)

    asyncio.run(run())
    assert {statuses[f"quick {place}"] for place in range(5)} == {200}
    assert [statuses[f"slow {place}"] for place in range(HELD_REQUESTS)].count(503) == 2
    assert (limits._held, limits._arriving) == (0, {})


def test_a_large_image_is_decoded_once_even_if_it_is_damaged(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = service.selection.default.predictor
    decode, times = predictor.decode, []
    monkeypatch.setattr(predictor, "decode", lambda data: (times.append(len(data)), decode(data))[1])
    answered = asyncio.run(service.predict([png(0, 300)[:100_000], png(1, 300)]))
    assert answered.errors == ["truncated or damaged", None]
    assert len(times) == 2


def test_a_request_gets_so_much_time_to_decode(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cifar.serve.service.DECODE_SECONDS", 0.0)
    predictor = service.selection.default.predictor
    monkeypatch.setattr(predictor, "decode", lambda data: (sum(range(100_000)), noise(0, 16))[1])
    lying = encode(Image.new("RGB", (16, 16)), "avif")  # decoded apart, since its header may say less than it is
    answered = asyncio.run(service.predict([lying, lying, lying]))
    assert answered.errors == [None, TOOK_TOO_LONG, TOOK_TOO_LONG]


def test_large_images_wait_in_bounds(service: Service) -> None:
    service._decoding = WAITING_REQUESTS * 32_000_000 - 1000
    with pytest.raises(Busy, match="large images"):
        asyncio.run(service.predict([png(0)]))
    service._decoding = 0
    assert asyncio.run(service.predict([png(0)])).errors == [None]


def test_freed_memory_is_returned_when_nobody_asks_or_it_is_much(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, returned = [0], []
    monkeypatch.setattr("cifar.serve.service.resident_memory", lambda: held[0])
    monkeypatch.setattr("cifar.serve.service.return_freed_memory", lambda: returned.append(held[0]))
    for asked, now, trims in ((True, 100, False), (True, 99, False), (True, KEPT_BYTES + 101, True), (False, 7, False)):
        returned.clear()
        service._asked, held[0] = asked, now
        service._tidy()
        assert bool(returned) == trims
    held[0] = 8
    service._tidy()
    assert returned == [8]
