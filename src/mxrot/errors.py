"""The errors that mxrot raises on purpose.

Each message is one sentence: where, what was expected, what was found, and what to do. The command line prints only the
message, without a traceback, and exits with the `exit_code` of the error.
"""

MOST_CHARACTERS = 2000
_END = 400


class MxrotError(Exception):
    """Base of all errors that mxrot raises on purpose.

    A message may quote a damaged file. It is therefore reduced to one line of printable characters. If it is longer
    than MOST_CHARACTERS, its middle is left out.
    """

    exit_code = 2

    def __init__(self, message: str = "") -> None:
        super().__init__(_presentable(message))


class MxrotWarning(UserWarning):
    """A warning: the work continues, but something that it should have is missing."""


class ConfigError(MxrotError):
    """A recipe, an option or a combination of them cannot work. Raised before any weight is loaded."""


class DataError(MxrotError):
    """A text or data set is missing, empty or too short."""


class NumericsError(MxrotError):
    """A NaN, an Inf, or a matrix that cannot be factorized. The message names the layer."""


class FamilyError(MxrotError):
    """A model is missing, is not a causal language model, or has a shape or family that mxrot does not know."""


class CheckpointError(MxrotError):
    """A folder or file is not a checkpoint that mxrot can read or write."""


class DiskFullError(CheckpointError):
    """The disk is full. What was there before is intact."""

    exit_code = 1


class MachineError(MxrotError):
    """The machine does not have enough of something. Finished work is kept."""

    exit_code = 1


class OutOfMemoryError(MachineError, MemoryError):
    """Main memory or GPU memory is exhausted."""


class DescriptorsError(MachineError):
    """Too many files are open at the same time."""


class TimeLimitError(MxrotError):
    """A run has stopped at its time limit. Finished work is kept, and the run can be continued."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again


class DamagedError(FamilyError, CheckpointError):
    """A file of a model or a checkpoint does not hold what its name says."""


class RankError(MxrotError):
    """An error that ended another process of the run, or the whole run."""

    def __init__(self, message: str, rank: int = 0, exit_code: int = 1) -> None:
        super().__init__(message)
        self.rank, self.exit_code = rank, exit_code


def leave_to_another(error: BaseException) -> None:
    """Mark an error that another process of the run reports."""
    error.__dict__["is_left_to_another"] = True


def is_left_to_another(error: BaseException) -> bool:
    """True if another process of the run reports this error."""
    return "is_left_to_another" in error.__dict__


class Note(str):
    """A text that mxrot has added to an error of any kind."""


def add_note(error: BaseException, text: str) -> None:
    """Add a text to an error, such as what is kept and how to continue. Python 3.11 shows it below a traceback."""
    notes = getattr(error, "__notes__", [])
    error.__notes__ = [*notes, Note(text)]


def notes_of(error: BaseException) -> list[str]:
    """The texts that `add_note` has added."""
    return [note for note in getattr(error, "__notes__", []) if isinstance(note, Note)]


def _presentable(message: str) -> str:
    if len(message) > MOST_CHARACTERS:
        message = f"{message[: MOST_CHARACTERS - _END - 5]} ... {message[-_END:]}"
    shown = (letter if letter.isprintable() else _escaped(letter) for letter in message)
    return "".join(shown)


def _escaped(letter: str) -> str:
    """A space for a line break, and the escape code for any other character that is not printable."""
    return " " if letter.isspace() else letter.encode("unicode_escape").decode()
