"""The errors this package raises on purpose; the first storey, it imports nothing.

Every message says what was asked, what was found and what to do. Each class is also the built-in
error its situation suggests, so that code which knows nothing of this package can catch it.
"""

__all__ = [
    "BackendUnavailableError",
    "CheckpointError",
    "ConfigError",
    "InputError",
    "MoeMtError",
    "PlacementError",
    "UnsupportedLanguageError",
]


class MoeMtError(Exception):
    """Base of every error raised on purpose by this package."""


class CheckpointError(MoeMtError, OSError):
    """A model that is missing, incomplete, unreadable or not what its configuration says."""


class ConfigError(MoeMtError, ValueError):
    """A configuration value that is unknown, contradictory or out of range."""


class UnsupportedLanguageError(MoeMtError, ValueError):
    """A language the model does not have, or a name that stands for several of them."""


class InputError(MoeMtError, ValueError):
    """Input data that cannot be read as what it should be, such as text that is not UTF-8."""


class BackendUnavailableError(MoeMtError, RuntimeError):
    """An implementation that was asked for and cannot run here."""


class PlacementError(MoeMtError, MemoryError):
    """A model that does not fit where it was asked to go."""
