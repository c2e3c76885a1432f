"""Stops a process's work on a bank at a chosen step: before or after any write, deletion, commit or checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from deltalake import DeltaTable

from mbc_core.bank import storage as storage_module
from mbc_core.bank.storage import Storage


class Died(BaseException):
    """Stands for the death of the process: nothing in the program may catch it and go on."""


class Steps:
    """Counts the steps that change the store; raises (or calls ``die``) at step number ``stop``.

    Attributes:
        taken: names of the steps so far.
    """

    def __init__(self, stop: int | None = None, die: Callable[[], None] | None = None) -> None:
        self.stop, self._die = stop, die
        self.taken: list[str] = []
        self.dead = False

    def tick(self, name: str) -> None:
        if self.dead:  # clean-up code of a process that is gone does not run
            raise Died(name)
        self.taken.append(name)
        if self.stop is not None and len(self.taken) > self.stop:
            self.dead = True
            if self._die is not None:
                self._die()
            raise Died(name)

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> Steps:
        """Patch every operation of the store."""
        for owner, name in ((Storage, "delete"), (Storage, "replace"), (DeltaTable, "create_checkpoint")):
            monkeypatch.setattr(owner, name, self._ticking(getattr(owner, name), name))
        monkeypatch.setattr(
            DeltaTable, "create_write_transaction", self._ticking(DeltaTable.create_write_transaction, "commit")
        )
        link = storage_module._link_new

        def named(temporary: Path, final: Path) -> bool:
            self.tick(f"written {final.name}, unnamed")
            done = link(temporary, final)
            self.tick(f"named {final.name}")
            return done

        monkeypatch.setattr(storage_module, "_link_new", named)
        return self

    def _ticking(self, original: Callable[..., object], name: str) -> Callable[..., object]:
        def ticking(*args: object, **kwargs: object) -> object:
            self.tick(f"before {name} {args[1] if name in ('delete', 'replace') else ''}")
            done = original(*args, **kwargs)
            self.tick(f"after {name}")
            return done

        return ticking
