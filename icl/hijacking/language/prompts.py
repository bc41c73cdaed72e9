"""Hijacking prompts for facts: true sentences that name a wrong answer, repeated before the question.

The four tasks and their sentences are those of Li et al. 2025, appendix F.1. Beside the attack stand controls of equal
length, because a long repeated prefix alone can change an answer.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from training.errors import UserError, nearest

KINDS = ("hijack", "other", "neutral", "true", "generic")
"""What is repeated: the attack; the same sentence about another subject; a true sentence without the wrong answer; the
right answer, stated; "Do not think of" the wrong answer (Jiang et al. 2024)."""


@dataclasses.dataclass(frozen=True)
class Template:
    """The sentences of a task; `{subject}` and `{value}` are filled in."""

    negation: str
    statement: str
    neutral: str
    query: str


TEMPLATES: Mapping[str, Template] = {
    "language": Template(
        "{subject} did not speak {value}.",
        "{subject} spoke {value}.",
        "{subject} was a person.",
        "The native language of {subject} is",
    ),
    "country": Template(
        "{subject} does not live in {value}.",
        "{subject} lives in {value}.",
        "{subject} is a person.",
        "{subject} has a citizenship from",
    ),
    "sports": Template(
        "{subject} is not good at playing {value}.",
        "{subject} is good at playing {value}.",
        "{subject} is a person.",
        "{subject}'s best sport is",
    ),
    "city": Template(
        "{subject} is not in {value}.",
        "{subject} is in {value}.",
        "{subject} is a place.",
        "{subject} is in the city of",
    ),
}

_RELATIONS = {
    "P103": "language",
    "P1412": "language",
    "P27": "country",
    "P641": "sports",
    "P131": "city",
    "P276": "city",
}


@dataclasses.dataclass(frozen=True)
class Fact:
    """A subject, its right answer and a wrong one, and another subject for the control.

    Raises:
      UserError: an unknown task, equal answers, or the same subject twice.
    """

    task: str
    subject: str
    correct: str
    error: str
    other: str

    def __post_init__(self) -> None:
        if self.task not in TEMPLATES:
            raise UserError(f"task {self.task!r}: {nearest(self.task, TEMPLATES)}")
        if self.correct == self.error:
            raise UserError(f"the wrong answer for {self.subject!r} is the right one, {self.correct!r}")
        if self.subject == self.other:
            raise UserError(f"the control needs a subject other than {self.subject!r}")


def render(fact: Fact, count: int, kind: str = "hijack") -> str:
    """The prompt with `count` repetitions; the answer follows it with a space before it."""
    if kind not in KINDS:
        raise UserError(f"kind {kind!r}: {nearest(kind, KINDS)}")
    template = TEMPLATES[fact.task]
    sentence = {
        "hijack": template.negation.format(subject=fact.subject, value=fact.error),
        "other": template.negation.format(subject=fact.other, value=fact.error),
        "neutral": template.neutral.format(subject=fact.subject),
        "true": template.statement.format(subject=fact.subject, value=fact.correct),
        "generic": f"Do not think of {fact.error}.",
    }[kind]
    return " ".join([sentence] * count + [template.query.format(subject=fact.subject)])


def read_counterfact(path: str | Path) -> list[Fact]:
    """Facts of the four tasks from a CounterFact JSON file; other relations are left out.

    Whether a negation is true of a subject with several languages or homes is not in the data; look through the records
    before relying on them. The control's subject is that of the next record of the task.

    Raises:
      UserError: no such file, no JSON, or records of another form.
    """
    path = Path(path)
    try:
        records = [record["requested_rewrite"] for record in json.loads(path.read_text())]
        rows = [
            (
                _RELATIONS[record["relation_id"]],
                record["subject"],
                record["target_true"]["str"],
                record["target_new"]["str"],
            )
            for record in records
            if record["relation_id"] in _RELATIONS
        ]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no CounterFact file: {type(error).__name__} {error}") from error
    facts = []
    for task in TEMPLATES:
        members = [row for row in rows if row[0] == task]
        subjects = [row[1] for row in members]
        for i, (_, subject, correct, wrong) in enumerate(members):
            other = next((s for s in subjects[i + 1 :] + subjects[:i] if s != subject), None)
            if other is not None and correct != wrong:
                facts.append(Fact(task, subject, correct, wrong, other))
    return facts
