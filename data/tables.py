"""Tables on disk: Parquet with page checksums, and beside it a description that is sealed with its sha256."""

import hashlib
import json
from datetime import date, datetime

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from utils.errors import DataError

SCHEMA_VERSION = 1


class TableMeta(BaseModel):
    """What lies beside a table on disk; ``rows``, ``file`` and ``sha256`` are filled in when it is stored."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = SCHEMA_VERSION
    symbol: str
    source: str
    last_session: date
    fetched_at: datetime
    revision: str | None = None
    bars_hash: str | None = None
    feature_set_hash: str | None = None
    target_horizon_bars: int | None = None
    rows: int = 0
    file: str = Field(default="", pattern=r"^(bars|features)-[0-9a-f]{16}\.parquet$")
    sha256: str = ""


class CorruptTableError(DataError):
    """A cached file is not the one that was written."""


def seal(meta: TableMeta) -> bytes:
    """Return the description of a table as JSON that begins with its own sha256."""
    return _sealed(json.dumps(meta.model_dump(mode="json"), sort_keys=True).encode())


def unseal(sealed: bytes) -> TableMeta | None:
    """Return the description that :func:`seal` wrote, None for another schema version.

    Raises
    ------
    CorruptTableError
        If a byte of it is not what was written.
    """
    text = sealed[len('{"sha256": "", "meta": ') + 64 : -1]
    if sealed != _sealed(text):
        raise CorruptTableError("the description of a table is not what was written")
    meta = json.loads(text)
    return TableMeta.model_validate(meta) if meta["schema_version"] == SCHEMA_VERSION else None


def _sealed(text: bytes) -> bytes:
    return b'{"sha256": "%b", "meta": %b}' % (hashlib.sha256(text).hexdigest().encode(), text)


def encode_table(frame: pd.DataFrame) -> bytes:
    """Return a table of numbers over dates as a Parquet file with page checksums."""
    dates = pd.DatetimeIndex(frame.index).as_unit("us").to_numpy()
    columns = {str(name): np.asarray(frame[name], dtype=np.float64) for name in frame.columns}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"date": dates, **columns}), sink, write_page_checksum=True)
    return bytes(sink.getvalue())


def decode_table(content: bytes) -> pd.DataFrame:
    """Return the table that :func:`encode_table` wrote, after checking its pages."""
    table = pq.read_table(pa.BufferReader(content), page_checksum_verification=True)
    columns = {name: table[name].to_numpy() for name in table.column_names if name != "date"}
    return pd.DataFrame(columns, index=pd.DatetimeIndex(table["date"].to_numpy(), name="date"))
