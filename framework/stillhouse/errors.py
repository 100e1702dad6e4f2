"""The error tree: a `UserError` is a mistake that the user can correct (exit code 2), a `RunError`
is a run that failed (exit code 1).

Every message says what was found, what was wanted and what to do. No class here has an `__init__`
of its own: Ray pickles the exceptions of actors, and such ones cannot be unpickled.
"""


class StillhouseError(Exception):
    """Root of every error that Stillhouse raises on purpose."""


class UserError(StillhouseError):
    """The user has to change something, a config or a machine, before the run can go on."""


class ConfigError(UserError):
    """A config file or an override is wrong."""


class CorpusError(UserError):
    """The documents cannot become sequences: empty, streamed, without their column, or without a
    target."""


class CacheError(UserError):
    """The cache directory cannot be written: its disk is full, or it is not the user's."""


class ModelError(UserError):
    """A model or tokenizer cannot be used: absent, unreadable, or of another vocabulary."""


class ChangedWeightsError(ModelError):
    """A local model's files are not those that the run was planned with."""


class RecipeError(UserError):
    """A store or run directory belongs to another recipe."""


class StoreError(UserError):
    """The store cannot be reached or written: wrong URL, missing permission, full disk."""


class StoreUnavailable(StoreError):
    """The store cannot be reached, is busy, or is full: the same call may succeed on another
    try."""


class ServerError(UserError):
    """A teacher's server cannot be used as it is: it does not answer, refuses, gives something
    else than was planned with, or would cost more than it may."""


class RunError(StillhouseError):
    """The run failed although its configuration was right."""


class InterruptedRunError(RunError):
    """The driver was asked to stop, and committed everything up to there (exit code 143)."""


class HeadGoneError(RunError):
    """The cluster's head node is gone, or the driver's machine has left the cluster."""


class ChunkError(RunError):
    """A chunk's bytes are not what was published: flipped, cut short, or of another recipe."""


class TeacherError(RunError):
    """A teacher failed its start-up check, or failed too often at one chunk."""


class GraderError(RunError):
    """A grader failed on every sample, cannot be started, or gets no answer from its server."""


class StudentError(RunError):
    """A student rank failed, or met a loss or gradient that is not finite."""


class CheckpointError(RunError):
    """No commit in a checkpoint directory verifies, or a commit could not be written."""
