"""Replies of an experiment's adapters, each against the base's, compared by a judge."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_lora.config.judge import JudgeSection
from slm_lora.config.schema import LATER_KEYS, DataSection
from slm_lora.data.sources import read_rows
from slm_lora.errors import DataError, IntegrityError, StorageError, UsageError
from slm_lora.experiment.judge_client import JudgeClient
from slm_lora.experiment.judge_prompt import (
    fill,
    parse_answer,
    read_prompt,
    request_body,
    request_key,
)
from slm_lora.records import Row
from slm_lora.runs.folder import Run
from slm_lora.runs.judge import (
    JUDGE_FILE,
    Answer,
    JudgedPair,
    JudgeHeader,
    Judgement,
    read_judgement,
    write_judgement,
)
from slm_lora.runs.replies import read_replies, replies_file
from slm_lora.runs.scored_run import ScoredRun
from slm_lora.runtime.lock import exclusive_lock
from slm_lora.runtime.progress import Reporter
from slm_lora.runtime.signals import StopRequested, graceful_stop
from slm_lora.stats.settings import base_key

PARTIAL_FILE = "judge.partial.jsonl"
"""Answers so far, one per line; removed once all are there."""
BYTES_PER_TOKEN = 4


@dataclass(frozen=True)
class Pair:
    """Replies to one test row; the keys of the requests for both orders, none if equal."""

    run: str
    row: str
    keys: tuple[str, ...]


@dataclass(frozen=True)
class JudgePlan:
    """The comparisons of an experiment.

    Attributes:
        section: of the recipe or the command line.
        results: folder of the experiment.
        header: of the file to be written.
        pairs: all of them.
        bodies: requests by key, each to be sent once.
        answers: known ones by key; None: unreadable.
    """

    section: JudgeSection
    results: Path
    header: JudgeHeader
    pairs: tuple[Pair, ...]
    bodies: Mapping[str, dict[str, Any]]
    answers: Mapping[str, Answer | None]

    @property
    def pending(self) -> list[str]:
        """Keys of the requests without an answer."""
        return [key for key in self.bodies if key not in self.answers]

    def estimate(self) -> str:
        """Requests, tokens and costs still to come."""
        count = len(self.pending)
        size = sum(len(self.bodies[key]["messages"][0]["content"].encode()) for key in self.pending)
        tokens, answers = size // BYTES_PER_TOKEN, count * self.section.max_answer_tokens
        text = (
            f"{count:,} requests to {self.section.url} (model {self.section.model}): about "
            f"{tokens:,} tokens, answers of at most {answers:,}"
        )
        if self.section.price is not None:
            price = self.section.price
            low = tokens * price["input"] / 1e6
            high = low + answers * price["output"] / 1e6
            text += f"; cost {low:,.2f} to {high:,.2f}"
        return text

    def run(self, reporter: Reporter) -> Judgement:
        """Send what is pending, and write the answers.

        Raises:
            StorageError: the judge is down; its answers so far are kept.
            UsageError: it refuses requests, or its key is missing.
            StopRequested: a signal asked for it; answers so far are kept.
        """
        with exclusive_lock(self.results):
            answers = {**self.answers, **_partial_answers(self.results)}
            pending = [key for key in self.bodies if key not in answers]
            if pending:
                for key, answer in self._ask(pending, reporter):
                    answers[key] = answer
            pairs = [_judged(pair, answers) for pair in self.pairs]
            write_judgement(self.results / JUDGE_FILE, self.header, pairs)
            (self.results / PARTIAL_FILE).unlink(missing_ok=True)
        return Judgement(self.header, tuple(pairs))

    def _ask(
        self, pending: Sequence[str], reporter: Reporter
    ) -> Iterator[tuple[str, Answer | None]]:
        partial = self.results / PARTIAL_FILE
        _drop_torn_line(partial)
        kept: set[str] = set()
        with (
            JudgeClient(self.section) as client,
            graceful_stop() as stop,
            reporter.task("judge", len(pending), "answers") as task,
            partial.open("a", encoding="utf-8") as file,
            ThreadPoolExecutor(self.section.max_concurrent) as pool,
        ):
            futures = {pool.submit(_answer, client, self.bodies[key]): key for key in pending}

            def keep(future: Future[Answer | None]) -> tuple[str, Answer | None]:
                key, answer = futures[future], future.result()
                file.write(json.dumps({"key": key, "answer": answer}) + "\n")
                file.flush()
                kept.add(key)
                return key, answer

            try:
                for future in as_completed(futures):
                    yield keep(future)
                    task.advance(1, 1)
                    stop.check()
            except (StorageError, UsageError, StopRequested) as error:
                pool.shutdown(cancel_futures=True)
                for future, key in futures.items():  # under way meanwhile, and paid for
                    if key not in kept and not future.cancelled() and not future.exception():
                        keep(future)
                if isinstance(error, StopRequested):
                    raise
                raise type(error)(
                    f"{error}; {len(kept)} of {len(pending)} answers kept, the same command "
                    "continues"
                ) from error
            task.close(f"{len(kept)} answers")


def plan_judge(
    section: JudgeSection, results: Path, runs: Sequence[Run], data: DataSection | None = None
) -> JudgePlan:
    """Plan the comparisons of all adapters with their bases; sends nothing.

    Args:
        section: settings of the judge.
        results: folder of the experiment.
        runs: of the experiment.
        data: source of the rows; None: that of the records, which have names of files only.

    Raises:
        UsageError: there are no replies of an adapter and its base.
        DataError: the rows of the replies are not in the data set any more.
        IntegrityError: replies or former answers are broken.
    """
    replies = {
        run.record.hash: there
        for run in runs
        if (there := read_replies(replies_file(run.folder))) is not None
    }
    bases = {
        base_key(ScoredRun(run, ())): run.record.hash for run in runs if run.record.adapter is None
    }
    opponents = {
        run.record.hash: base
        for run in runs
        if run.record.adapter is not None
        and run.record.hash in replies
        and (base := bases.get(base_key(ScoredRun(run, ())))) in replies
    }
    if not opponents:
        raise UsageError(
            f"{results}: no replies of adapter and base; run the experiment with a section "
            "`replies` (finished runs are kept)"
        )
    texts = {run: {reply.row: reply.reply for reply in rows} for run, (_, rows) in replies.items()}
    used = {*opponents, *opponents.values()}
    shared = set.intersection(*(set(texts[run]) for run in used))
    order = [row for row in texts[next(iter(opponents.values()))] if row in shared]
    order = order[: section.rows]
    if not order:
        raise UsageError(f"{results}: base and adapters have no replies to the same rows")
    rows, with_context = _rows(runs[0], order, data)
    template = read_prompt(section.prompt)
    bodies: dict[str, dict[str, Any]] = {}
    pairs = []
    for run, base in opponents.items():
        for row in order:
            keys = []
            first, second = texts[base][row], texts[run][row]
            for reply_a, reply_b in ((first, second), (second, first)) if first != second else ():
                content = fill(
                    template,
                    {
                        "prompt": _prompt_text(rows[row], with_context),
                        "reference": rows[row].turns[-1].content,
                        "reply_a": reply_a,
                        "reply_b": reply_b,
                    },
                )
                body = request_body(section.model, section.max_answer_tokens, content)
                keys.append(request_key(section.url, body))
                bodies[keys[-1]] = body
            pairs.append(Pair(run, row, tuple(keys)))
    header = JudgeHeader(
        settings=section.model_dump(
            mode="json", include={"url", "model", "rows", "max_answer_tokens"}
        )
        | {"prompt": template},
        bases=opponents,
        replies={run: replies[run][0].sha256 for run in sorted(used)},
    )
    answers = {**_former_answers(results), **_partial_answers(results)}
    return JudgePlan(section, results, header, tuple(pairs), bodies, answers)


def _rows(run: Run, wanted: Sequence[str], data: DataSection | None) -> tuple[dict[str, Row], bool]:
    """Rows of the data set by id, and whether prompts had their contexts."""
    section = data
    if section is None:
        recorded = run.raw["recipe"]["data"]
        section = DataSection.model_validate({**LATER_KEYS["data"], **recorded})
    try:
        rows = {row.row_id: row for row in read_rows(section).rows}
    except DataError as error:
        if data is not None:
            raise
        raise DataError(f"{error}; --recipe RECIPE names the file of the rows") from error
    if missing := [row for row in wanted if row not in rows]:
        raise DataError(
            f"data.name {section.name}: {len(missing)} of the {len(wanted)} rows with replies are "
            "not in it; its content has changed since the experiment"
        )
    return rows, run.record.data.template.include_context


def _prompt_text(row: Row, with_context: bool) -> str:
    turns = row.turns[:-1]
    text = (
        turns[0].content
        if len(turns) == 1
        else "\n\n".join(f"{turn.role}: {turn.content}" for turn in turns)
    )
    return f"{text}\n\n{row.context}" if with_context and row.context else text


def _answer(client: JudgeClient, body: Mapping[str, Any]) -> Answer | None:
    """The judge's answer; an unreadable one is asked for once more."""
    answer = parse_answer(client.ask(body))
    return answer if answer is not None else parse_answer(client.ask(body))


def _judged(pair: Pair, answers: Mapping[str, Answer | None]) -> JudgedPair:
    if not pair.keys:
        return JudgedPair(pair.run, pair.row, "tie", "tie", ())
    base_first, adapter_first = (answers[key] for key in pair.keys)
    return JudgedPair(pair.run, pair.row, base_first, adapter_first, pair.keys)


def _former_answers(results: Path) -> dict[str, Answer | None]:
    """Answers of a finished comparison, by key."""
    judgement = read_judgement(results / JUDGE_FILE)
    if judgement is None:
        return {}
    return {
        key: answer
        for pair in judgement.pairs
        for key, answer in zip(pair.keys, (pair.base_first, pair.adapter_first), strict=False)
    }


def _partial_answers(results: Path) -> dict[str, Answer | None]:
    """Answers of an interrupted comparison, by key; a torn last line is left out."""
    path = results / PARTIAL_FILE
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        answers = {record["key"]: record["answer"] for record in map(json.loads, lines)}
        if unknown := set(answers.values()) - {"A", "B", "tie", None}:
            raise ValueError(f"unknown answer {unknown.pop()!r:.40}")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise IntegrityError(f"{path}: broken ({error}); remove it to ask again") from error
    return answers


def _drop_torn_line(path: Path) -> None:
    """Cut what follows the last line break."""
    if path.exists():
        content = path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            with path.open("r+b") as file:
                file.truncate(end)
