"""`winnow hosted prepare`: records to the files that a provider takes, checked by its rules, counted and priced.

The folder appears under its name only when whole:

    train.jsonl, validation.jsonl    what is uploaded
    prepared.json                    the settings, the files' digests, what was found
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from feedback.jsonl import DataError, Skipped, located_records
from training.hosted.counting import Counter, token_counter
from training.hosted.options import HostedOptions
from training.hosted.providers import Rules, Split
from training.hosted.record import RECORD_FILE, JobRecord
from training.hosted.rows import Row, converter
from training.hosted.services import check_options
from training.options import OptionsError

FACTS_FILE = "prepared.json"
_OURS = frozenset({FACTS_FILE, RECORD_FILE, "train.jsonl", "validation.jsonl", ".lock"})


@dataclass(frozen=True, slots=True)
class SplitFacts:
    """What one file holds."""

    num_records: int
    """Records that became rows."""
    num_rows: int
    num_tied: int
    """Pairs of rankings that were tied."""
    num_contradictions: int
    """Pairs that stand in the file the other way round as well."""
    num_skipped: int
    skipped: tuple[str, ...]
    """The first problems that were passed over."""
    tokens: int
    """Trained tokens of one pass. A pair counts as two conversations, each with its prompt."""
    longest_tokens: int
    """Of the longest conversation."""
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Prepared:
    """A folder that can be uploaded, or with `dry_run` what would be in it."""

    options: HostedOptions
    train: SplitFacts
    validation: SplitFacts | None
    folder: Path | None = None

    @property
    def run(self) -> str:
        """Names this job and no other: settings that shape it, and the data."""
        shaping = self.options.model_dump(mode="json", exclude=_NOT_SHAPING)
        digests = [None if split is None else split.sha256 for split in (self.train, self.validation)]
        text = json.dumps([shaping, digests], sort_keys=True)
        return f"winnow-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    @property
    def passes(self) -> int:
        """Passes over the data that are reckoned with; one, where the provider decides."""
        return self.options.epochs or 1

    @property
    def dollars(self) -> float | None:
        """What training costs by the given price. Validation is not billed by any of the services."""
        price = self.options.dollars_per_million_tokens
        return None if price is None else self.train.tokens * self.passes * price / 1e6

    def file(self, split: Split) -> Path:
        """The file of a split. Only of what stands in a folder."""
        assert self.folder is not None
        return self.folder / f"{split}.jsonl"

    def facts(self, split: Split) -> SplitFacts | None:
        return self.train if split == "train" else self.validation


_NOT_SHAPING = {
    *("train", "validation", "output", "skip_invalid", "key_variable"),
    *("tokenizer", "bytes_per_token", "dollars_per_million_tokens", "max_dollars"),
    *("timeout_s", "max_tries", "file_timeout_s", "poll_s"),
}


def prepare(options: HostedOptions, *, dry_run: bool = False, on_record: Callable[[], None] = lambda: None) -> Prepared:
    """Checks everything and, unless `dry_run`, writes the folder. Raises `OptionsError` and `DataError`.

    `on_record` is called for every record that was read.
    """
    rules = check_options(options).rules
    folder = Path(options.output).expanduser()
    if not dry_run:
        _refuse_taken(folder)
    count = token_counter(options)
    if dry_run:
        return _gathered(options, rules, count, None, on_record)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    replaced = partial.with_name(f"{partial.name}-before")
    try:
        prepared = _gathered(options, rules, count, partial, on_record)
        (partial / FACTS_FILE).write_text(_to_json(prepared), encoding="utf-8")
        partial.chmod(0o755)
        before = JobRecord.load(folder) if folder.exists() else None
        if before is not None and before.run == prepared.run:
            before.save(partial)  # The same files: what was sent of them need not be sent again.
        if folder.exists():
            folder.rename(replaced)
        partial.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return replace(prepared, folder=folder)


def load_prepared(folder: Path) -> Prepared:
    """What `prepare` wrote, its files unchanged. Raises `OptionsError`."""
    try:
        record = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
        options = HostedOptions.model_validate(record["options"])
        train = _split_facts(record["train"])
        validation = None if record["validation"] is None else _split_facts(record["validation"])
    except FileNotFoundError as error:
        raise OptionsError(f"{folder}: no {FACTS_FILE} there: run `winnow hosted prepare` first") from error
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise OptionsError(f"{folder / FACTS_FILE}: cannot be read ({error}): prepare again") from error
    return Prepared(options, train, validation, folder)


def _split_facts(record: dict[str, Any]) -> SplitFacts:
    return SplitFacts(**{**record, "skipped": tuple(record["skipped"])})


def check_files(prepared: Prepared) -> None:
    """Raises `OptionsError` where a file is not as it was checked."""
    for split in ("train", "validation"):
        facts = prepared.facts(split)
        if facts is None:
            continue
        file = prepared.file(split)
        try:
            with file.open("rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError as error:
            raise OptionsError(f"{file}: {error.strerror}: prepare again") from error
        if digest != facts.sha256:
            raise OptionsError(f"{file}: was changed after it was checked: prepare again")


def _to_json(prepared: Prepared) -> str:
    record: dict[str, Any] = {
        "run": prepared.run,
        "options": prepared.options.model_dump(mode="json"),
        "train": asdict(prepared.train),
        "validation": None if prepared.validation is None else asdict(prepared.validation),
    }
    return json.dumps(record, ensure_ascii=False, indent=2) + "\n"


def _refuse_taken(folder: Path) -> None:
    if not folder.exists():
        return
    record = JobRecord.load(folder)
    if record is not None and record.job.state != "absent":
        raise OptionsError(f"output: {folder} has a job already: see `winnow hosted status`, or name another folder")
    if not folder.is_dir() or {path.name for path in folder.iterdir()} - _OURS:
        raise OptionsError(f"output: {folder} holds other things: name another folder")


def _gathered(
    options: HostedOptions, rules: Rules, count: Counter, folder: Path | None, on_record: Callable[[], None]
) -> Prepared:
    seen: dict[str, str] = {}
    prompts: dict[str, str] = {}
    gathering = _Gathering(options, rules, count, seen, prompts, on_record)
    train = gathering.split("train", options.train, folder)
    if train.num_rows < rules.min_rows:
        raise DataError(
            f"train: {train.num_rows} rows; {options.provider} takes no fewer than {rules.min_rows}"
            + (f" ({train.num_skipped} records were skipped)" if train.num_skipped else "")
        )
    validation = gathering.split("validation", options.validation, folder) if options.validation else None
    if validation is not None and validation.num_rows == 0:
        raise DataError("validation: no rows are left")
    prepared = Prepared(options, train, validation)
    if options.max_dollars is not None and prepared.dollars is not None and prepared.dollars > options.max_dollars:
        raise OptionsError(
            f"max_dollars: {prepared.passes} passes over {train.tokens} tokens come to about "
            f"{prepared.dollars:.2f} dollars, more than {options.max_dollars:.2f}"
        )
    return prepared


@dataclass(frozen=True, slots=True)
class _Gathering:
    """Rows of both splits, written as they come: data may be larger than memory, digests of it are not."""

    options: HostedOptions
    rules: Rules
    count: Counter
    seen: dict[str, str]
    """Where each row came from, by its key."""
    prompts: dict[str, str]
    """Where each prompt of the training data came from."""
    on_record: Callable[[], None]

    def split(self, split: Split, files: Sequence[str], folder: Path | None) -> SplitFacts:
        if folder is None:
            return self._read(split, files, None)
        with (folder / f"{split}.jsonl").open("wb") as opened:
            return self._read(split, files, opened)

    def _read(self, split: Split, files: Sequence[str], out: IO[bytes] | None) -> SplitFacts:
        skipped = Skipped() if self.options.skip_invalid else None
        digest = hashlib.sha256()
        num_records = num_rows = num_tied = num_contradictions = tokens = longest = size = 0
        paths = [Path(file).expanduser() for file in files]
        for place, converted in located_records(paths, converter(self.options, self.rules), skipped):
            self.on_record()
            num_tied += converted.num_tied
            rows = [row for row in converted.rows if self._is_new(split, place, row, skipped)]
            num_records += bool(rows)
            for row in rows:
                num_rows += 1
                num_contradictions += row.opposite in self.seen
                lengths = [self.count(conversation, row.tools) for conversation in row.conversations]
                tokens += sum(lengths)
                longest = max(longest, *lengths)
                line = row.line.encode() + b"\n"
                digest.update(line)
                size += len(line)
                if out is not None:
                    out.write(line)
            self._check_size(split, place, num_rows, size)
        return SplitFacts(
            num_records=num_records,
            num_rows=num_rows,
            num_tied=num_tied,
            num_contradictions=num_contradictions,
            num_skipped=skipped.count if skipped else 0,
            skipped=tuple(skipped.examples) if skipped else (),
            tokens=tokens,
            longest_tokens=longest,
            size_bytes=size,
            sha256=digest.hexdigest(),
        )

    def _is_new(self, split: Split, place: str, row: Row, skipped: Skipped | None) -> bool:
        """Whether the row is one to write. Raises `DataError` for repeated ones unless they are to be skipped."""
        earlier, prompt = self.seen.get(row.key), self.prompts.get(row.prompt_key)
        problem = None
        if split == "validation" and prompt is not None:
            problem = f"{place}: prompt: is trained on too ({prompt}): it would measure what was learnt by heart"
        elif earlier is not None:
            problem = f"{place}: record: says the same as {earlier}"
        if problem is not None:
            if skipped is None:
                raise DataError(f"{problem}; skip_invalid leaves such records out")
            skipped.add(problem)
            return False
        self.seen[row.key] = place
        if split == "train":
            self.prompts.setdefault(row.prompt_key, place)
        return True

    def _check_size(self, split: Split, place: str, num_rows: int, size: int) -> None:
        provider, rules = self.options.provider, self.rules
        if size > rules.max_file_bytes:
            mib = rules.max_file_bytes / 2**20
            raise DataError(f"{place}: {split}: the file gets larger than the {mib:.0f} MiB that {provider} takes")
        if rules.max_rows is not None and num_rows > rules.max_rows:
            raise DataError(f"{place}: {split}: more rows than the {rules.max_rows} that {provider} takes")
