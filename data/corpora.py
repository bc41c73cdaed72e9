"""Large corpora as streams of documents: shards of SlimPajama's and C4's formats, and TFDS. Nothing is downloaded."""

import gzip
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from training.errors import UserError


def documents(folder: str | Path, field: str = "text") -> Iterator[str]:
    """The documents of all shards below a folder, in the order of their names.

    Args:
      folder: of files `*.jsonl`, `*.json` (C4's name for the same), each also with `.gz` or `.zst`, and `*.parquet`.
      field: that holds the text.

    Raises:
      UserError: no such files, a record without that field, or a package that a format needs is missing.
    """
    shards = [path for path in sorted(Path(folder).rglob("*")) if _reader(path) is not None]
    if not shards:
        raise UserError(f"{folder} has no files *{', *'.join(READERS)}")
    for path in shards:
        for number, record in enumerate(_reader(path)(path, field)):
            if not isinstance(record, str):
                raise UserError(f"{path}, record {number}: no text in the field {field!r}")
            yield record


def tfds_documents(name: str, data_dir: str | Path, split: str, field: str = "text") -> Iterator[str]:
    """The documents of a set that TFDS has prepared as `array_record`, read without TensorFlow.

    Raises:
      UserError: it is not prepared there, or has no such split or field.
    """
    from data.prepared_images import prepared  # which imports TFDS only when it is called

    builder = prepared(name, data_dir)
    for what, key, there in (("split", split, builder.info.splits), ("field", field, builder.info.features)):
        if key not in there:
            raise UserError(f"{name} has no {what} {key!r}; it has {', '.join(there)}")
    for example in builder.as_data_source(split=split):
        value = example[field]
        yield value.decode() if isinstance(value, bytes) else str(value)


def _json_lines(file: IO[bytes], path: Path, field: str) -> Iterator[Any]:
    for number, line in enumerate(file):
        if line.strip():
            try:
                yield json.loads(line).get(field)
            except (ValueError, AttributeError) as error:
                raise UserError(f"{path}, line {number + 1} is no JSON object: {error}") from error


def _plain(path: Path, field: str) -> Iterator[Any]:
    with open(path, "rb") as file:
        yield from _json_lines(file, path, field)


def _gzipped(path: Path, field: str) -> Iterator[Any]:
    with gzip.open(path, "rb") as file:
        yield from _json_lines(file, path, field)


def _zstandard(path: Path, field: str) -> Iterator[Any]:
    zstandard = _needed("zstandard", path)
    with open(path, "rb") as file, zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True) as stream:
        yield from _json_lines(io.BufferedReader(stream), path, field)


def _parquet(path: Path, field: str) -> Iterator[Any]:
    file = _needed("pyarrow.parquet", path).ParquetFile(path)
    if field not in file.schema_arrow.names:
        raise UserError(f"{path} has no column {field!r}; it has {', '.join(file.schema_arrow.names)}")
    for batch in file.iter_batches(batch_size=1024, columns=[field]):
        yield from batch.column(0).to_pylist()


READERS: dict[str, Callable[[Path, str], Iterator[Any]]] = {
    ".jsonl": _plain,
    ".json": _plain,
    ".jsonl.gz": _gzipped,
    ".json.gz": _gzipped,
    ".jsonl.zst": _zstandard,
    ".json.zst": _zstandard,
    ".parquet": _parquet,
}
"""By the end of a file's name: what yields a field of its records."""


def _reader(path: Path) -> Callable[[Path, str], Iterator[Any]] | None:
    return next((reader for end, reader in READERS.items() if path.name.endswith(end)), None)


def _needed(module: str, path: Path) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise UserError(f"{path.name} needs the package {package}: pip install {package}") from error
