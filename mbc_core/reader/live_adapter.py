"""The adapter of a reader that goes on while adapters are promoted and rolled back.

The base model is loaded once. When another adapter is live, its files are fetched and checked beside the running
answers, and put on the base between two batches, under a lock: no batch ever sees parts of two adapters. If it cannot
be loaded, the one before stays, and a warning says why.
"""

from __future__ import annotations

import logging
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from mbc_core import defaults
from mbc_core.adapters import AdapterRegistry
from mbc_core.errors import MbcError

if TYPE_CHECKING:
    from torch import Tensor

    from mbc_core.bank import Bank
    from mbc_core.reader.kv_lora import KVLoraConfig
    from mbc_core.reader.language_model import HfModel, LanguageModel

SHIPPED_ADAPTER = "shipped"
CHECK_SECONDS = 5.0
"""Between two looks at the bank's registry: one small read of a table each."""

RETRY_SECONDS = 60.0
"""Before an adapter that could not be loaded is tried again."""

Warn = Callable[[str], None]
_FAILURES = (MbcError, OSError, RuntimeError, ValueError, KeyError)


@dataclass(frozen=True, slots=True)
class _Weights:
    """An adapter's weights as they are on a model, to put them back."""

    config: KVLoraConfig
    state: dict[str, Tensor]


class LiveAdapter:
    """A base model with the adapter that reads a bank now.

    Args:
        base: loaded, without adapter; its weights are never copied or loaded again.
        bank: whose registry says which adapter is live.
        folder: read with this adapter, always. as_of: with the one that was live then, always.
        every: seconds between two looks at the registry; 0: before each batch.
        warn: gets a line when an adapter cannot be loaded; a warning of ``logging`` when None.

    Raises:
        DamagedFile, ModelError: the first adapter cannot be loaded: there is none to keep.
    """

    def __init__(
        self,
        base: LanguageModel,
        bank: Bank,
        *,
        folder: Path | None = None,
        as_of: datetime | None = None,
        every: float = CHECK_SECONDS,
        warn: Warn | None = None,
    ) -> None:
        self._base, self._registry = base, AdapterRegistry(bank)
        self._fixed = folder is not None or as_of is not None
        self._every, self._warn = every, warn or logging.getLogger(__name__).warning
        self._lock, self._looking = threading.RLock(), threading.RLock()
        self._refused: dict[str | None, float] = {}
        self._looked = time.monotonic()
        self._model, self._name = with_adapter(base, bank, folder=folder, as_of=as_of)

    @property
    def language_model(self) -> LanguageModel:
        """The base with the adapter that is on it now. To answer while adapters change: :meth:`batch`."""
        return self._model

    @property
    def name(self) -> str | None:
        """The adapter that is on it: a version of the bank, ``shipped``, a folder, or None."""
        return self._name

    @contextmanager
    def batch(self) -> Iterator[LanguageModel]:
        """The model for one batch: whole adapters only; a newly promoted one is put on first."""
        self._look()
        with self._lock:
            yield self._model

    def refresh(self) -> bool:
        """Put on the adapter that is live now, at once, also one that was refused before.

        Returns:
            Whether another one was put on.
        """
        with self._looking:
            self._refused = dict.fromkeys(self._refused, float("-inf"))  # tried again, but not told of twice
            return self._swap()

    def _look(self) -> None:
        """Look at the registry when it is time; one thread does, the others go on with what there is."""
        if self._fixed or time.monotonic() - self._looked < self._every:
            return
        if self._looking.acquire(blocking=False):
            try:
                self._swap()
            finally:
                self._looking.release()

    def _swap(self) -> bool:
        if self._fixed:
            return False
        self._looked = time.monotonic()
        wanted: str | None = "(unknown)"
        try:
            wanted = self._registry.live(self._base.digest) or _shipped_for(self._base)
            if wanted == self._name:
                self._refused.clear()
                return False
            if time.monotonic() - self._refused.get(wanted, float("-inf")) < RETRY_SECONDS:
                return False
            with tempfile.TemporaryDirectory(prefix="mbc-adapter-") as place:
                self._put_on(wanted, self._fetch(wanted, Path(place)))
        except _FAILURES as error:
            if wanted not in self._refused:
                self._warn(f"adapter {wanted} cannot be used, {self._name or 'none'} goes on reading: {error}")
            self._refused[wanted] = time.monotonic()
            return False
        self._refused.clear()
        return True

    def _fetch(self, wanted: str | None, place: Path) -> Path | None:
        """A local folder with the adapter's checked files; None for the base alone."""
        if wanted is None:
            return None
        return defaults.reader_adapter() if wanted == SHIPPED_ADAPTER else self._registry.load(wanted, place)

    def _put_on(self, wanted: str | None, folder: Path | None) -> None:
        """Take the old one off and put the new one on; when that fails, the old one goes back."""
        from mbc_core.reader.kv_lora import add_kv_lora, load_adapter, read_adapter, set_adapter_state

        if folder is not None:
            read_adapter(folder, self._base.digest)  # most faults show here, before anybody waits
        with self._lock:
            before = _weights_of(self._model.model)
            plain = _without_adapter(self._model.model)
            try:
                model = plain if folder is None else load_adapter(plain, folder, base_digest=self._base.digest)[0]
            except _FAILURES:
                plain = _without_adapter(plain)
                if before is not None:
                    plain = add_kv_lora(plain, before.config)
                    set_adapter_state(plain, before.state, "the adapter that was read with")
                self._model = replace(self._base, model=plain.eval())
                raise
            self._model, self._name = replace(self._base, model=model.eval()), wanted


def with_adapter(
    base: LanguageModel, bank: Bank, *, folder: Path | None = None, as_of: datetime | None = None
) -> tuple[LanguageModel, str | None]:
    """Put on ``base`` the adapter that reads ``bank``.

    Args:
        folder: use this adapter's folder.
        as_of: the adapter that was live then.

    Returns:
        the adapted model, and the adapter's name: the bank's live version, ``shipped``, the folder, or None when there
        is none for this base model (it then reads unadapted).

    Raises:
        DamagedFile: the adapter's files do not match their digests.
        ModelError: ``folder`` was trained for another base model.
    """
    from mbc_core.memory import microseconds
    from mbc_core.reader.kv_lora import load_adapter

    registry = AdapterRegistry(bank)
    live = None if folder is not None else registry.live(base.digest, microseconds(as_of))
    if live is not None:
        with tempfile.TemporaryDirectory() as place:
            model, _ = load_adapter(base.model, registry.load(live, Path(place)), base_digest=base.digest)
        return replace(base, model=model.eval()), live
    name = str(folder) if folder is not None else _shipped_for(base)
    if name is None:
        return base, None
    model, _ = load_adapter(base.model, folder or defaults.reader_adapter() or Path(), base_digest=base.digest)
    return replace(base, model=model.eval()), name


def _shipped_for(base: LanguageModel) -> str | None:
    """``shipped`` when the release has an adapter for this base model."""
    from mbc_core.reader.kv_lora import adapter_base

    shipped = defaults.reader_adapter()
    return SHIPPED_ADAPTER if shipped is not None and adapter_base(shipped) == base.digest else None


def _weights_of(model: HfModel) -> _Weights | None:
    """Copies of the LoRA weights on a model; None when it carries none."""
    from mbc_core.reader.kv_lora import adapter_config, adapter_state

    if not hasattr(model, "peft_config"):
        return None
    return _Weights(adapter_config(model), {name: value.clone() for name, value in adapter_state(model).items()})


def _without_adapter(model: HfModel) -> HfModel:
    """The base model itself, its own modules in their places again; nothing is merged or copied.

    peft's own ``unload`` needs its wrapper, which is lost when loading an adapter fails half way.
    """
    from peft.tuners.lora import LoraLayer

    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    adapted = [(name, module) for name, module in plain.named_modules() if isinstance(module, LoraLayer)]
    for name, module in adapted:
        parent, _, last = name.rpartition(".")
        setattr(plain.get_submodule(parent), last, module.get_base_layer())
    if hasattr(plain, "peft_config"):
        del plain.peft_config
    return plain
