"""How a question is put: by its cloze, by a template, after examples.

asked = with_prompt(load_questions(concepts=60), "question", shots=3)
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from paramspec.errors import InputError
from paramspec.seeds import by_hash
from paramspec.specwiki.schema import Question

FORMS = {"cloze": "{cloze}", "question": "Question: {question}\nAnswer:"}


def with_prompt(
    questions: Sequence[Question], form: str = "cloze", *, shots: int = 0, seed: int = 0
) -> list[Question]:
    """`with_prompt(questions, "question", shots=3)`: questions whose clozes are these prompts.

    >>> print(with_prompt(load_questions(concepts="gold"), "question")[0].cloze)
    Question: What is the chemical symbol of gold?
    Answer:

    Args:
        form: `cloze`, `question`, or a template, in which `{question}`, `{cloze}`, `{concept}` and
            `{options}` (a line each, after A, B, ...) stand for what is so called. One of the first
            two is needed. An option follows after one space.
        shots: examples in front, in the same form: questions on other concepts, with their answers.
        seed: of the choice of examples, which are the same for all but their own concepts.

    Raises:
        InputError: if a template has no place for the question, or if there are fewer examples.
    """
    template = FORMS.get(form, form).rstrip()
    if not re.search(r"\{(question|cloze)\}", template):
        raise InputError(f"prompt {form[:80]!r}: no {{question}} and no {{cloze}} in it; add one")
    ordered = sorted(questions, key=lambda question: by_hash(seed, "shots", question.id))
    made, fronts = [], dict[str, str]()
    for question in questions:
        if question.concept not in fronts:
            others = [one for one in ordered if one.concept != question.concept][:shots]
            if len(others) < shots:
                raise InputError(
                    f"shots {shots}: only {len(others)} questions on other concepts than "
                    f"{question.concept!r}; use fewer, or give more questions"
                )
            told = [f"{_put(template, one)} {one.options[one.answer]}\n\n" for one in others]
            fronts[question.concept] = "".join(told)
        prompt = fronts[question.concept] + _put(template, question)
        made.append(question.model_copy(update={"cloze": prompt}))
    return made


def _put(template: str, question: Question) -> str:
    letters = zip(string.ascii_uppercase, question.options, strict=False)
    values = question.model_dump(include={"question", "cloze", "concept"})
    values["options"] = "\n".join(f"{letter}. {option}" for letter, option in letters)
    # At once: what a question's text holds is text.
    return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), template)
