"""Reading and writing pairs: embedded names, files, saved folders, and the hub."""

from __future__ import annotations

import gzip
import io
import json
import logging
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from veridical.errors import DamagedFileError, DataError, InputError, UnknownNameError, misspelt, unknown
from veridical.files import read_json, replacing, write_bytes, write_json
from veridical.pairs import adapters
from veridical.pairs.schema import NESTED, Pairs
from veridical.progress import quiet_datasets

log = logging.getLogger(__name__)
Rows = list[dict[str, Any]]
READ = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
WRITTEN = (".parquet", ".jsonl", ".csv")
HUB_OPTIONS = ("subset", "split", "revision")


def load(
    source: str | Path,
    *,
    adapter: str | None = None,
    columns: Mapping[str, str] | None = None,
    **options: Any,
) -> Pairs:
    """Pairs from `source`; see `Pairs.load`."""
    embedded = _embedded(source)
    path = embedded or Path(source).expanduser()
    if path.exists():
        rows = read_rows(path)
        name, place = (str(source) if embedded else _stem(path)), path
    else:
        hub = {option: options.pop(option) for option in HUB_OPTIONS if option in options}
        rows = from_hub(str(source), **hub)
        name, place = str(source), None
    if not rows:
        raise DataError(f"{source} has no rows")
    pairs = Pairs.from_rows(_schema_rows(rows, name, place, adapter, columns, options), name=name)
    pairs.beliefs = _load_beliefs(path) if place is not None else None
    return pairs


def read_rows(path: Path) -> Rows:
    """The rows of a file or of a folder, under the columns that it has itself."""
    if path.is_dir():
        return _from_folder(path)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [".gz"]
    suffix = (suffixes[:-1] if packed else suffixes)[-1:] or [""]
    if suffix[0] not in READ:
        raise DataError(
            f"{path.name} has an ending that cannot be read; expected {', '.join(READ)} (also .gz)"
        )
    if suffix[0] == ".parquet":
        return _from_parquet(path)
    text = _text(path, packed)
    try:
        if suffix[0] in (".csv", ".tsv"):
            return _from_csv(text, "\t" if suffix[0] == ".tsv" else ",")
        if suffix[0] == ".jsonl":
            return _from_jsonl(text, path)
        return _from_json(json.loads(text), path)
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        said = str(error).strip().splitlines()[0]
        raise DataError(f"{path.name} is not readable as {suffix[0].lstrip('.')}: {said}") from error


def save(pairs: Pairs, path: str | Path) -> Path:
    """Writes `pairs` to a parquet, jsonl or csv file; see `Pairs.save`."""
    path = Path(path)
    if path.suffix.lower() not in WRITTEN:
        raise unknown(
            "kind of file", path.suffix or path.name, WRITTEN, "Pairs are written by the ending of the name."
        )
    if path.suffix.lower() == ".parquet":
        import pyarrow.parquet as pq

        with replacing(path) as file:
            pq.write_table(pairs.dataset.with_format("arrow")[:], file, compression="zstd")
    elif path.suffix.lower() == ".jsonl":
        lines = (json.dumps(row, ensure_ascii=False) for row in pairs)
        write_bytes(path, "".join(f"{line}\n" for line in lines).encode("utf-8"))
    else:
        write_bytes(path, _csv_bytes(pairs))
    beside = _beliefs_path(path)
    if pairs.beliefs is not None:
        write_json(beside, pairs.beliefs.to_json())
    else:
        beside.unlink(missing_ok=True)
    return path


def _schema_rows(
    rows: Rows,
    name: str,
    source: Path | None,
    adapter: str | None,
    columns: Mapping[str, str] | None,
    options: dict[str, Any],
) -> Rows:
    """Rows of the schema, by the columns given, an adapter, or as they are."""
    if columns:
        rows = _renamed(rows, columns)
    if adapter is None and "prompt" in rows[0] and not _needs_adapter(rows):
        if options:
            raise unknown(
                "option", next(iter(options)), (), "The columns are those of the schema; no adapter is used."
            )
        return [_unpacked(row) for row in rows]
    if adapter is None:
        found = adapters.recognise(rows)
        if found is None:
            raise DataError(
                f"the layout of {name} is not known (columns: {', '.join(rows[0])}); name them, such as "
                f"columns={{'prompt': {next(iter(rows[0]))!r}}}, or an adapter: "
                + ", ".join(adapters.ADAPTERS)
            )
        adapter = found.name
        log.info("%s is read by the adapter %r, recognised by its columns", name, adapter)
    return adapters.adapt(rows, adapter, source, **options)


def _needs_adapter(rows: Rows) -> bool:
    """Whether a table with a prompt column is one of the known layouts, and not already in the schema."""
    found = adapters.recognise(rows)
    return found is not None and "prompt" in found.columns


def _renamed(rows: Rows, columns: Mapping[str, str]) -> Rows:
    for wanted in columns.values():
        if wanted not in rows[0]:
            raise unknown("column", wanted, rows[0])
    names = {source: schema for schema, source in columns.items()}
    taken = set(columns) - set(names)
    return [
        {names.get(column, column): value for column, value in row.items() if column not in taken}
        for row in rows
    ]


def _unpacked(row: dict[str, Any]) -> dict[str, Any]:
    """Messages and options that a csv holds as JSON text, as lists again."""
    for column in NESTED:
        value = row.get(column)
        if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
            try:
                parsed = json.loads(value)
            except ValueError:
                continue
            messages = column == "prompt" and all(
                isinstance(item, dict) and "role" in item for item in parsed
            )
            if parsed and (messages or column == "options"):
                row = {**row, column: parsed}
    return row


def _embedded(source: str | Path) -> Path | None:
    from veridical.organisms import embedded_pairs

    if isinstance(source, Path) or "/" in source or "." in source:
        return None
    try:
        return Path(embedded_pairs(source))
    except UnknownNameError:
        return None


def _stem(path: Path) -> str:
    return path.name.split(".")[0] if path.is_file() else path.resolve().name


def _text(path: Path, packed: bool) -> str:
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if packed else content).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as error:
        raise DamagedFileError(f"{path} cannot be read ({error}); it was damaged or cut short") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name} is not UTF-8 text (byte {error.start})") from error


def _from_csv(text: str, separator: str) -> Rows:
    import pandas as pd

    # Words such as "None" or "NA" are answers and country codes here; only an empty cell is missing.
    frame = pd.read_csv(io.StringIO(text), sep=separator, keep_default_na=False, na_values=[""])
    frame = frame.astype(object).where(frame.notna(), None)
    return [{str(column): value for column, value in row.items()} for row in frame.to_dict("records")]


def _from_jsonl(text: str, path: Path) -> Rows:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path.name}, line {number} is not JSON: {error}") from error
        rows.append(row if isinstance(row, dict) else {"text": row})
    return rows


def _from_json(content: Any, path: Path) -> Rows:
    if isinstance(content, dict) and content and all(isinstance(value, list) for value in content.values()):
        lengths = {len(value) for value in content.values()}
        if len(lengths) > 1:
            raise DataError(f"{path.name} holds columns of different lengths: {sorted(lengths)}")
        return [dict(zip(content, values)) for values in zip(*content.values())]
    if not isinstance(content, list):
        raise DataError(f"{path.name} holds a {type(content).__name__}; expected a list of rows")
    if content and all(isinstance(item, str) for item in content):
        return _emotion_rows(path.parent) if _is_emotions(path) else [{"text": item} for item in content]
    if not all(isinstance(item, dict) for item in content):
        raise DataError(f"{path.name} holds a list of {type(content[0]).__name__}; expected rows")
    return content


def _from_parquet(path: Path) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise DamagedFileError(f"{path} is not readable parquet ({str(error).splitlines()[0]})") from error


def _from_folder(path: Path) -> Rows:
    """A folder that `datasets` saved, or one with a JSON list of sentences for each emotion."""
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        import datasets

        return _dataset_rows(datasets.load_from_disk(str(path)))
    if _is_emotions(path / "any.json"):
        return _emotion_rows(path)
    if any(path.glob("*.parquet")) or any(path.glob("*.csv")) or any(path.glob("*.jsonl")):
        return from_hub(str(path))
    raise DataError(f"{path} is a folder without a saved data set; name a file in it")


EMOTIONS = ("anger", "disgust", "fear", "happiness", "sadness", "surprise")


def _is_emotions(path: Path) -> bool:
    """Whether the file lies among lists of sentences that are named by at least two emotions."""
    named = path.stem in EMOTIONS or path.stem == "any"
    return named and sum((path.parent / f"{emotion}.json").is_file() for emotion in EMOTIONS) >= 2


def _emotion_rows(folder: Path) -> Rows:
    return [
        {"scenario": text, "emotion": emotion}
        for emotion in EMOTIONS
        if (folder / f"{emotion}.json").is_file()
        for text in read_json(folder / f"{emotion}.json")
    ]


def from_hub(
    source: str, subset: str | None = None, split: str | None = None, revision: str | None = None
) -> Rows:
    """A data set of the hub (or a folder laid out like one); its code, if it has any, is never run."""
    import datasets

    from veridical.organisms import PAIRS

    if Path(source).suffix.lower() in (*READ, ".gz"):
        raise UnknownNameError(f"no file {source}{_beside(Path(source))}")
    if misspelt(source, PAIRS) and not Path(source).exists():
        raise unknown("data set", source, PAIRS, "A data set of the hub is written owner/name")
    try:
        with quiet_datasets():
            found = datasets.load_dataset(source, name=subset, split=split, revision=revision)
    except Exception as error:
        # Whatever goes wrong in there (no network, no such name, a loading script), the name was what we had.
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise unknown(
            "data set", source, PAIRS, f"It is no file or folder here, and the hub said: {said}"
        ) from error
    return _dataset_rows(found)


def _dataset_rows(found: Any) -> Rows:
    """The rows of a data set, those of several splits with a `split` column."""
    import datasets

    if not isinstance(found, datasets.DatasetDict):
        return [dict(row) for row in found]
    parts = {str(name): [dict(row) for row in part] for name, part in found.items()}  # type: ignore[call-overload]
    if len(parts) == 1:
        return next(iter(parts.values()))
    return [{**row, "split": row.get("split", name)} for name, part in parts.items() for row in part]


def _beside(path: Path) -> str:
    """Names of the nearest files in the folder, for an error."""
    from veridical.errors import nearest

    if not path.parent.is_dir():
        return f"; there is no folder {path.parent}"
    close = nearest(path.name, [entry.name for entry in path.parent.iterdir()])
    return f"; nearest: {', '.join(close)}" if close else ""


def _csv_bytes(pairs: Pairs) -> bytes:
    """The rows as csv, nested columns as JSON text."""
    frame = pairs.to_pandas()
    for column in frame:
        if any(isinstance(value, list | dict) for value in frame[column]):
            frame[column] = [json.dumps(value, ensure_ascii=False) for value in frame[column]]
    return frame.to_csv(index=False).encode("utf-8")


def _beliefs_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}.beliefs.json")


def _load_beliefs(path: Path) -> Any:
    beside = _beliefs_path(path)
    if path.is_dir() or not beside.is_file():
        return None
    from veridical.pairs.beliefs import BeliefReport

    return BeliefReport.from_json(read_json(beside))
