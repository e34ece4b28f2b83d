"""Everything mxrot raises on purpose.

Each message is one sentence that says where, what was expected, what was found and what to do.
The command line prints it alone, without a traceback, and exits with its `exit_code`.
"""

MOST_CHARACTERS = 2000
_END = 400


class MxrotError(Exception):
    """Base of all errors that mxrot raises on purpose.

    What a message quotes may come from a damaged file: it is kept to one line of characters that any terminal shows,
    and to MOST_CHARACTERS, of which the middle is left out.
    """

    exit_code = 2

    def __init__(self, message: str = "") -> None:
        super().__init__(_presentable(message))


class MxrotWarning(UserWarning):
    """Something that goes on without what it should have."""


class ConfigError(MxrotError):
    """A recipe, an option or their combination that cannot work; raised before any weight is loaded."""


class DataError(MxrotError):
    """A text or data set that is missing, empty or too short."""


class NumericsError(MxrotError):
    """A NaN, an Inf or a matrix that cannot be factorized; names the layer."""


class FamilyError(MxrotError):
    """A model that is missing, is not a causal language model, or has a shape or family mxrot does not know."""


class CheckpointError(MxrotError):
    """A folder or file that is not a checkpoint mxrot can read or write."""


class DiskFullError(CheckpointError):
    """No space left on the device while writing; what stood there before is intact."""

    exit_code = 1


class MachineError(MxrotError):
    """Something that the machine does not have enough of; what was finished stays."""

    exit_code = 1


class OutOfMemoryError(MachineError, MemoryError):
    """Main memory, or that of a GPU."""


class DescriptorsError(MachineError):
    """Files that may be open at once."""


class TimeLimitError(MxrotError):
    """A run that has stopped by its limit of time; what was finished is kept to go on from."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again


class DamagedError(FamilyError, CheckpointError):
    """A file of a model or a checkpoint that cannot be read as what its name says."""


class RankError(MxrotError):
    """What ended another process of the run, or the run as a whole."""

    def __init__(self, message: str, rank: int = 0, exit_code: int = 1) -> None:
        super().__init__(message)
        self.rank, self.exit_code = rank, exit_code


def leave_to_another(error: BaseException) -> None:
    """Let another process of the run say what this error says."""
    error.__dict__["is_left_to_another"] = True


def is_left_to_another(error: BaseException) -> bool:
    """Does another process of the run say it?"""
    return "is_left_to_another" in error.__dict__


class Note(str):
    """What mxrot has added to an error, of whatever kind."""


def add_note(error: BaseException, text: str) -> None:
    """Let an error say more: what is kept, and how to go on. Python shows it below a traceback (from 3.11 on)."""
    notes = getattr(error, "__notes__", [])
    error.__notes__ = [*notes, Note(text)]


def notes_of(error: BaseException) -> list[str]:
    """What `add_note` has added."""
    return [note for note in getattr(error, "__notes__", []) if isinstance(note, Note)]


def _presentable(message: str) -> str:
    if len(message) > MOST_CHARACTERS:
        message = f"{message[: MOST_CHARACTERS - _END - 5]} ... {message[-_END:]}"
    shown = (letter if letter.isprintable() else _escaped(letter) for letter in message)
    return "".join(shown)


def _escaped(letter: str) -> str:
    """A space for what breaks lines, and the code of what a terminal would obey or cannot show."""
    return " " if letter.isspace() else letter.encode("unicode_escape").decode()
