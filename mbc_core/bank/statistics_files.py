"""Files of codebook statistics that wait for publication, less the sample vectors of forgotten documents."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from mbc_core.bank import parquet

if TYPE_CHECKING:
    from mbc_core.bank.bank import Bank


def candidate_keys(bank: Bank, path: str) -> npt.NDArray[np.int64]:
    """Keys of the documents whose vectors a file of statistics holds, as reset candidates or as probes.

    Raises:
        DamagedFile: it is no such file.
    """
    from mbc_core.codebook.statistics import BatchStatistics

    found = BatchStatistics.from_bytes(bank.storage.read_bytes(path), bank.storage.locate(path))
    return found.sampled_documents


def without_candidates(bank: Bank, path: str, gone: npt.NDArray[np.int64]) -> str | None:
    """Write the statistics again without the vectors of some documents; the file that held them stays for now.

    Returns:
        The path of what counts now: the same one when it held none of theirs, None when the file is gone (it was
        taken into a codebook, or forgotten with an interrupted run).
    """
    from mbc_core.codebook.statistics import BatchStatistics

    if not bank.storage.exists(path):
        return None
    found = BatchStatistics.from_bytes(bank.storage.read_bytes(path), bank.storage.locate(path))
    if not np.isin(found.sampled_documents, gone).any():
        return path
    data = found.without_documents(gone).to_bytes()
    again = f"{path.removesuffix('.safetensors').rsplit('-', 1)[0]}-{parquet.digest(data)}.safetensors"
    bank.storage.write_new(again, data)
    return again
