"""How much one request may ask the bare base, and about how much work a question is."""

from collections.abc import Iterable, Mapping

from loraplex.errors import UnknownClassifierError, quoted
from loraplex.problems import refused_at
from loraplex.questions import ASK_THE_BASE, MAX_QUESTIONS
from loraplex.text.question import check_question
from loraplex.types import Question

MAX_NAME_CHARS, MAX_LABEL_CHARS = 128, 200  # names and labels are kept with each verdict
NUM_SEQUENCES = 2  # of a question, at least: its labels are presented in both orders
FRAME_CHARS = 2000  # about how many are tokenized around a question's own words, which are tried on several texts


def no_questions(questions: Iterable[str], known: Iterable[str]) -> UnknownClassifierError:
    """Return the error for questions to a server whose base answers none. known: the classifiers' names."""
    error = UnknownClassifierError([*questions], [*known])
    error.remedy += f"; {ASK_THE_BASE}"
    return error


def check_questions(questions: Mapping[str, Question]) -> None:
    """Raise InvalidRequestError where there are too many questions, or one that nobody could answer. Cheap."""
    if len(questions) > MAX_QUESTIONS:
        raise refused_at(
            ("questions",),
            f"{len(questions)} of them are for the bare base",
            remedy=f"ask it {MAX_QUESTIONS} in one request at most",
        )
    for name, question in questions.items():
        if len(name) > MAX_NAME_CHARS:
            raise refused_at(
                ("questions", name),
                "the name is too long",
                remedy=f"give a name of at most {MAX_NAME_CHARS} characters, and say the rest in the instructions",
            )
        if long := next((label for label in question.labels if len(label) > MAX_LABEL_CHARS), None):
            raise refused_at(
                ("questions", name),
                f"the label {quoted(long)} is too long",
                remedy=f"give labels of at most {MAX_LABEL_CHARS} characters, and say the rest in their descriptions",
            )
        check_question(name, question)
