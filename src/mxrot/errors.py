"""Everything mxrot raises on purpose.

Each message is one sentence that says where, what was expected, what was found and what to do.
The command line prints it alone, without a traceback, and exits with its `exit_code`.
"""


class MxrotError(Exception):
    """Base of all errors that mxrot raises on purpose."""

    exit_code = 2


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
