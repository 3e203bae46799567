"""The one tree of errors that axn-ray raises on purpose: each message says what is wrong and names the cure."""


class AxnError(Exception):
    """Base of every error that a user can mend; the command line prints it as one sentence."""


class InputError(AxnError):
    """Input data or settings that cannot be used: a bad file, id, shape, dtype or range."""


class ArtifactError(AxnError):
    """An artifact that is missing, truncated, of another kind or made from other inputs."""


class ModelError(AxnError):
    """A model that cannot be loaded or that gives unusable output."""


class FitError(AxnError):
    """A factorization that diverged or cannot start."""
