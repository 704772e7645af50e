"""Every error megasft raises at its users, in one tree.

A message states the fact, the numbers and the remedy; data errors name ``file:line``. The command
line prints the message alone and exits with 1, so what is raised here is what a user reads.
"""


class MegasftError(Exception):
    """Anything a user can cause and mend."""


class DataError(MegasftError):
    """A conversation file cannot be read, or holds nothing that can be trained on."""


class StoreError(MegasftError):
    """A token store is missing, half-written, of another format version, or already there."""


class PlanError(MegasftError):
    """Rows cannot be made from this store with these sizes."""


class AlignmentError(MegasftError):
    """A length is not a multiple of what the layout needs."""


class FlagError(MegasftError):
    """A command-line flag is missing, without effect, or contradicts another."""


class ConversionError(MegasftError):
    """A checkpoint cannot be converted without changing what the model computes."""


class MissingPackageError(MegasftError, ImportError):
    """A package is missing or too old; the message says what to install."""


class AuditError(MegasftError):
    """What a step computed is not what its rows hold; the run stops on that step."""


class SaveError(MegasftError):
    """A checkpoint could not be written; those before it are untouched."""
