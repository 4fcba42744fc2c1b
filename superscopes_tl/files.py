"""Files: written atomically, and read safely from untrusted sources.

1. `written_whole` writes a new file beside the old one, syncs it to disk and moves it into place;
   a failure of disk or folder becomes one `OSError` with path and fix.
2. `unfit`: a regular file below a size limit, so that reading it terminates.
3. `read_zip`, `check_member`: named entries of a zip, no larger than declared.
4. `parse_json`, `read_json`: JSON of a bounded size, an object; by default without NaN.
5. `read_text`, `parse_table`: texts and tables, as spreadsheets encode and separate them.
6. `read_parquet`: numbers, booleans and strings, of a size known before it is allocated.
7. `checked_rows`, `checked_provenance`: the invariants of a table of readings and its provenance.
8. Readers raise `ValueError` or a library's own error; `reading` turns these into one
   `RunFileError` that names the file.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from torch import Tensor

from superscopes_tl.errors import RunFileError, describe, reason

if TYPE_CHECKING:
    import pyarrow as pa

MAX_JSON_BYTES = 16 * 2**20
"""Parsed, JSON takes many times as much memory."""

MAX_CELLS = 20_000_000
"""The most cells of a table of texts."""

MAX_COLUMNS, MAX_HEADER = 10_000, 2**20
"""The most columns of one, and characters up to the end of its header: pandas takes minutes and
gigabytes for millions of names."""

SEPARATORS = (",", "\t", ";")

_DTYPES = {"int": "iu", "float": "fiu", "bool": "b"}
"""Python types of columns, with the kinds of numpy dtypes that can hold them."""

_TEXTS = ("string", "large_string")
"""Types of text columns, as Arrow names them."""

_PARTS: Mapping[str, type | tuple[type, ...]] = {
    "prompt": str,
    "model": dict,
    "target_model": (dict, type(None)),
    "target_prompt": dict,
    "config": dict,
    "tokens": dict,
}
"""Types of the parts of a provenance that the package reads."""


@contextlib.contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`, which replaces it on success.

    A writer that fails leaves the old file alone; one that is killed may leave a temporary file.

    Raises:
        OSError: the folder is missing or read-only, the disk is full, or `target` is a folder.
    """
    fresh = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        if target.is_dir():
            raise IsADirectoryError("it is a folder")
        yield fresh
        with fresh.open("rb+") as written:
            os.fsync(written.fileno())  # some disks report only now that they are full
        fresh.replace(target)
    except OSError as error:
        raise unwritable(target, error) from error
    finally:
        with contextlib.suppress(OSError):  # it may never have been created
            fresh.unlink(missing_ok=True)


def write_tensors(target: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write tensors and a header to a safetensors file, as `written_whole`."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with written_whole(target) as fresh:
        try:
            save_file(dict(tensors), fresh, metadata=dict(header))
        except SafetensorError as error:  # disk full, missing folder, no permission: text only
            raise OSError(str(error)) from error


def unwritable(path: object, error: Exception) -> OSError:
    """Build the error for a file that cannot be opened or written."""
    # A library's own text repeats the path, whose length would push the cause out of the message.
    number = error.errno if isinstance(error, OSError) else None
    cause = os.strerror(number) if number else str(error)
    wanted = "a file that can be opened and written"
    fix = "check folder, permissions, free space and other runs on this file, which is unchanged"
    return OSError(describe("path", wanted, f"{path} ({cause})", fix))


@contextlib.contextmanager
def reading(
    path: str | os.PathLike[str],
    expected: str,
    fix: str,
    *,
    most: int | None = None,
    passing: tuple[type[Exception], ...] = (),
) -> Iterator[None]:
    """Return a context for reading an untrusted file; what readers raise becomes a `RunFileError`.

    Args:
        path: the file.
        expected: what it should be, such as "a run file of version 3".
        fix: what to do if it is not, such as "pass a file that SweepResult.save wrote".
        most: largest size in bytes; `None` for no limit.
        passing: further exceptions to leave as they are, besides `FileNotFoundError`.
    """
    passed: tuple[type[Exception], ...] = (FileNotFoundError, RunFileError, *passing)
    try:
        if why := unfit(path, most):
            raise ValueError(why)
        yield
    except passed:
        raise
    except Exception as error:  # whatever the readers of zip, JSON, ... raise for bad bytes
        got = f"{path} with {reason(error)}"
        raise RunFileError(describe("path", expected, got, fix)) from error


def check_format(header: Mapping[str, Any], name: str, number: object) -> None:
    """Raise a `ValueError` unless the header of a file states this format and version."""
    if (header.get("format"), header.get("version")) != (name, number):
        raise ValueError(f"format {header.get('format')!r} version {header.get('version')!r}")


def unfit(path: str | os.PathLike[str], most: int | None) -> str:
    """Return why a file must not be opened; an empty string if it may be.

    Pipes and devices have no size, and reading one may never end. A file that is not there raises
    a `FileNotFoundError`.
    """
    if not Path(path).is_file():
        Path(path).stat()
        return "no ordinary file"
    too_large = most is not None and Path(path).stat().st_size > most
    return f"more than {most} bytes of content" if too_large else ""


def check_member(info: zipfile.ZipInfo, most: int) -> None:
    """Raise a `ValueError` for an entry of a zip that may unpack to more than `most` bytes."""
    if info.file_size > most:
        raise ValueError(f"more than {most} bytes of content in {info.filename}")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{info.filename} packed by method {info.compress_type}")


def read_zip(path: str | os.PathLike[str], names: Sequence[str], most: int) -> list[bytes]:
    """Return the contents of a zip of exactly these entries, each of up to `most` bytes."""
    if why := unfit(path, most):
        raise ValueError(why)
    found = []
    with zipfile.ZipFile(path) as archive:
        if sorted(archive.namelist()) != sorted(names):
            raise ValueError(f"the entries {archive.namelist()[:9]}, not {list(names)}")
        for info in map(archive.getinfo, names):
            check_member(info, most)
            with archive.open(info) as member:
                found.append(member.read(info.file_size))  # a plain read() unpacks up to 2 GB first
    return found


def read_json(text: str | bytes, *, nan: bool = False) -> dict[str, Any]:
    """Parse a JSON object, as `parse_json`; a `ValueError` for anything else."""
    found = parse_json(text, nan=nan)
    if not isinstance(found, dict):
        raise ValueError(f"JSON that is no object but {type(found).__name__}")
    return found


def parse_json(text: str | bytes, *, nan: bool = False) -> Any:
    """Parse JSON; `nan` allows NaN and infinity, which are not standard JSON.

    Raises:
        ValueError: too large, not JSON, or such a number.
        RecursionError: nested too deeply.
    """

    def refused(name: str) -> float:
        raise ValueError(f"{name} in JSON")

    if len(text) > MAX_JSON_BYTES:
        raise ValueError(f"more than {MAX_JSON_BYTES} bytes of JSON")
    return json.loads(text, parse_constant=float if nan else refused)


def read_text(path: str | os.PathLike[str], most: int) -> tuple[str, str]:
    """Return a text file's content, and its encoding: "utf-8" or, as spreadsheets save, another.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is larger than `most` bytes, or holds no text.
    """
    if why := unfit(path, most):
        raise ValueError(why)
    data = Path(path).read_bytes()
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        encoding = "latin-1"
        text = data.decode(encoding)
    if "\0" in text:
        raise ValueError("binary data")
    return text, encoding.removesuffix("-sig")


def parse_table(
    text: str, keep: Callable[[str], bool] = lambda name: True
) -> tuple[pd.DataFrame, list[str], str]:
    """Parse a table with a header, whose separator is a comma, a tab or a semicolon.

    Args:
        text: the table.
        keep: which columns to read, by name.

    Returns:
        The columns that were kept, every cell a text; the names of all columns; the separator, the
        one of which the header makes most names.

    Raises:
        ValueError: no table, more than `MAX_CELLS` cells or `MAX_COLUMNS` columns, or a header
            longer than `MAX_HEADER`.
    """
    stated = re.match(r'"?sep=(.)"?\r?\n', text)  # by a spreadsheet
    text = text[stated.end() :] if stated else text
    first = next(iter(text[:100_000].splitlines()), "")
    separator = stated[1] if stated else max(SEPARATORS, key=lambda s: _fields(first, s))
    _check_header(text, separator)
    options: dict[str, Any] = {"sep": separator, "index_col": False, "dtype": str}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pd.errors.ParserWarning)  # cells beyond the header
        header = pd.read_csv(io.StringIO(text, newline=""), nrows=0, **options)
        names = [str(name) for name in header]
        kept = [name for name in names if keep(name)]
        # Short lines under a long header would take gigabytes.
        if len(kept) * (text.count("\n") + text.count("\r") + 1) > MAX_CELLS:
            raise ValueError(f"more than {MAX_CELLS} cells")
        rows = pd.read_csv(
            io.StringIO(text, newline=""), keep_default_na=False, usecols=kept, **options
        )
    return rows, names, separator


def _fields(header: str, separator: str) -> int:
    """Return how many names a separator makes of a header."""
    try:
        return len(next(csv.reader([header], delimiter=separator), []))
    except csv.Error:
        return 0


def _check_header(text: str, separator: str) -> None:
    """Raise a `ValueError` for a header of too many columns, or that does not end."""
    start = io.StringIO(text[:MAX_HEADER], newline="")
    rows = csv.reader(start, delimiter=separator)
    try:  # as pandas does, pass over blank lines
        names = next((row for row in rows if len(row) > 1 or any(map(str.strip, row))), [])
    except csv.Error as error:
        raise ValueError(str(error)) from error
    if len(names) > MAX_COLUMNS or start.tell() == MAX_HEADER < len(text):
        raise ValueError(f"more than {MAX_COLUMNS} columns, or {MAX_HEADER} characters of header")


def read_parquet(data: bytes, most: int) -> pd.DataFrame:
    """Parse a Parquet file.

    A column of one repeated string takes a few bytes in the file and may take gigabytes in memory.
    Strings are therefore read dictionary-encoded, and expanded once their total size is known.

    Raises:
        ValueError: more than `most` bytes, or columns of other types than numbers, booleans and
            strings.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pq.read_schema(pa.BufferReader(data))
    texts = [field.name for field in schema if str(field.type) in _TEXTS]
    file = pq.ParquetFile(pa.BufferReader(data), read_dictionary=texts)
    _check_footer(file.metadata, schema, most)
    table, size = file.read(), 0
    columns = []
    for field, column in zip(schema, table.columns, strict=True):
        size += column.nbytes + (_text_bytes(column) if field.name in texts else 0)
        if size > most:
            raise ValueError(f"more than {most} bytes of table")
        columns.append(column.cast(field.type))  # no longer dictionary-encoded
    plain = pa.table(columns, names=table.column_names)
    frame: pd.DataFrame = plain.to_pandas(ignore_metadata=True)
    return frame


def _check_footer(metadata: Any, schema: pa.Schema, most: int) -> None:
    """Raise for types, sizes or compression that the footer declares, before data is read."""
    import pyarrow as pa

    for field in schema:
        plain = pa.types.is_integer(field.type) or pa.types.is_floating(field.type)
        plain = plain or pa.types.is_boolean(field.type) or pa.types.is_null(field.type)
        if not (plain or str(field.type) in _TEXTS):
            raise ValueError(f"a column {field.name!r} of {field.type}")
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
    rows = max(metadata.num_rows, sum(group.num_rows for group in groups))
    unpacked = sum(chunk.total_uncompressed_size for chunk in chunks)
    if rows * len(schema) * 8 > most or unpacked > most:
        raise ValueError(f"more than {most} bytes of table")
    # Snappy compresses at most 21-fold; other codecs have no such bound.
    if packed := {str(chunk.compression) for chunk in chunks} - {"SNAPPY", "UNCOMPRESSED"}:
        raise ValueError(f"a table packed by {', '.join(sorted(packed))}")


def _text_bytes(column: pa.ChunkedArray) -> int:
    """Return the expanded size of a dictionary-encoded column."""
    import pyarrow.compute as pc

    lengths = (pc.binary_length(c.dictionary).take(c.indices) for c in column.chunks)
    return sum(pc.sum(part).as_py() or 0 for part in lengths)


def checked_rows(table: pd.DataFrame, types: Mapping[str, str]) -> pd.DataFrame:
    """Return a table of readings after checking its columns.

    Args:
        table: the readings, and further columns.
        types: name of the Python type of each column of a reading.

    Raises:
        ValueError: a duplicate column, one of another type, or an impossible layer, position or α.
    """
    if twice := sorted(set(table.columns[table.columns.duplicated()])):
        raise ValueError(f"two columns {twice}")
    if table.empty:
        return table  # columns have no types yet
    for name, column in table.items():
        type_ = types.get(str(name), "texts or numbers")
        if type_ in _DTYPES:
            fits = column.dtype.kind in _DTYPES[type_]
        else:  # controls may be missing
            may_be = str if type_ == "str" else (str, int, float, type(None))
            fits = all(isinstance(value, may_be) for value in column.tolist())
        if not fits:
            raise ValueError(f"a column {name!r} that does not hold {type_}")
    for name in ("position", "target_layer", "draw", "source_layer"):
        number = -1 if name.endswith("_layer") else 0  # -1: no source layer, the input embedding
        if (table[name] < number).any():
            raise ValueError(f"a {name} below {number}")
    if not np.isfinite(table["alpha"]).all():
        raise ValueError("an alpha that is not finite")
    return table


def checked_provenance(found: object) -> dict[str, Any]:
    """Return a provenance; raise a `ValueError` for a part of a type that cannot be read."""
    if not isinstance(found, dict):
        raise ValueError("no provenance")
    for name, type_ in _PARTS.items():
        if name in found and not isinstance(found[name], type_):
            raise ValueError(f"provenance whose {name} is {type(found[name]).__name__}")
    if not isinstance(found.get("tokens", {}).get("labels", []), list):
        raise ValueError("provenance whose token labels are no list")
    return found
