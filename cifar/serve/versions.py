"""Which versions a replica holds ready, and which of them answers a request."""

import dataclasses
import logging
import math
import random
import reprlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from cifar.config import ConfigError
from cifar.predictor import Predictor
from cifar.serve.config import ServeConfig
from cifar.serve.errors import UnknownVersion
from cifar.store import BOX, Store, Version, find_model, model_path

CANARY, SHADOW = "canary", "shadow"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Served:
    """One version of the model, ready to answer."""

    name: str
    version: str
    predictor: Predictor
    published_at: str | None
    numbers: dict[str, float]
    """What its metrics and its report say."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What is served at a moment; replaced as a whole, never changed."""

    default: Served
    canary: Served | None = None
    shadow: Served | None = None
    served: dict[str, Served]
    """By version."""
    aliases: dict[str, str]
    """Version of each alias."""

    def find(self, version: str | None) -> Served:
        """By version or alias; None is the one that answers by default."""
        if version is None:
            return self.default
        found = self.served.get(self.aliases.get(version, version))
        if found is None:
            known = ", ".join(sorted({*self.aliases, *self.served}))
            raise UnknownVersion(f"no version {reprlib.repr(version)} is served here; there are {known}")
        return found

    def route(self, share: float) -> Served:
        """For a request that asks for no version: the canary gets its share."""
        return self.canary if self.canary and random.random() < share else self.default


class Versions:
    """Follows the aliases of a published model; a folder, or one version that was named, stays as it is."""

    def __init__(self, config: ServeConfig):
        self._config = config
        self._withdrawn: set[tuple[str, str]] = set()
        """Version, and since when it was the canary: it may be tried again later."""
        self._canary_since = ""
        self._store: Store | None = None
        self._reference = config.model
        self._seen: object = {}
        if config.model and (path := model_path(config.model)):
            with find_model(config.model, config.store) as found:
                predictor = self._load(found.folder)
            numbers = _numbers(predictor.metrics)
            served = Served(name=found.name, version="local", predictor=predictor, published_at=None, numbers=numbers)
            logger.info("serving %s from %s", found.name, path)
            self.selection = Selection(default=served, served={served.version: served}, aliases={})
            return
        self._store = Store(config.store if config.model else str(BOX))
        if not config.model:
            self._reference = self._store.names()[0]
        try:
            self.selection = self._select({})
        except ConfigError as error:
            if config.model:
                raise ConfigError(
                    f"--model {config.model}: no folder of a run or a model; in --store: {error}"
                ) from error
            raise

    @property
    def name(self) -> str:
        return self.selection.default.name

    def refresh(self) -> None:
        """Read the aliases again and load what is new. What cannot be loaded changes nothing, and is logged once."""
        if self._store is None or "/" in self._reference:
            return
        aliases = None
        try:
            aliases = self._store.aliases(self.name)
            if aliases != self._seen or not aliases:
                self.selection = self._select(self.selection.served)
        except (ConfigError, OSError) as error:
            if isinstance(error, OSError):
                aliases = None  # the store is away: what was seen has to be read again
            if aliases != self._seen:
                logger.warning("the versions stay as they are: %s", error)
        self._seen = aliases

    def withdraw(self, served: Served) -> None:
        """Send the canary no more requests, and take its alias from it, so that other replicas do the same."""
        self._withdrawn.add((served.version, self._canary_since))
        if self.selection.canary is served:
            self.selection = dataclasses.replace(self.selection, canary=None)
        if self._store is not None:
            try:
                self._store.withdraw(served.name, served.version, CANARY)
            except (ConfigError, OSError) as error:
                logger.warning("%s: the alias could not be removed: %s", CANARY, error)

    def _select(self, held: dict[str, Served]) -> Selection:
        assert self._store is not None
        default = self._store.resolve(self._reference)
        wanted = {default.version: default}
        aliases: dict[str, str] = {}
        if "/" not in self._reference:
            known = {version.version: version for version in self._store.versions(default.name)}
            found = self._store.aliases(default.name)
            if CANARY in found:
                self._canary_since = found[CANARY].since
                if (found[CANARY].version, self._canary_since) in self._withdrawn:
                    del found[CANARY]
            aliases = {alias: one.version for alias, one in found.items() if one.version in known}
            wanted |= {version: known[version] for version in aliases.values()}
        served = {}
        for name, version in wanted.items():
            try:
                served[name] = held.get(name) or self._open(self._store, version)
            except ConfigError as error:
                if name == default.version:
                    raise
                logger.warning("%s is not served: %s", version, error)
                aliases = {alias: other for alias, other in aliases.items() if other != name}
        canary, shadow = (served.get(aliases.get(alias, "")) for alias in (CANARY, SHADOW))
        new = served[default.version]
        return Selection(
            default=new,
            canary=None if canary is new else canary,
            shadow=None if shadow is new else shadow,
            served=served,
            aliases=aliases,
        )

    def _open(self, store: Store, version: Version) -> Served:
        with store.open(version) as folder:
            predictor = self._load(folder)
        described = store.describe(version)
        logger.info("serving %s", version)
        return Served(
            name=version.name,
            version=version.version,
            predictor=predictor,
            published_at=version.published_at,
            numbers=_numbers(described["numbers"]),
        )

    def _load(self, folder: Any) -> Predictor:
        predictor = Predictor(folder, self._config.device, self._config.max_batch, self._config.precision)
        warm_up(predictor)
        return predictor


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    """Those that say how good the model is."""
    return {name: value for name, value in values.items() if name.startswith(("val_", "test_")) and _is_number(value)}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def warm_up(predictor: Predictor) -> None:
    """Answer noise at the sizes that will come: the first answer of a size prepares kernels, which takes longer."""
    rng = np.random.default_rng(0)
    size = predictor.image_size
    count = 1
    while count < predictor.batch_size:
        predictor.predict(rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8))
        count *= 4
