"""The one exception for what a user gave: a config, a checkpoint, a dataset."""


class InputError(ValueError):
    """One sentence: what was found, what was expected and what to do."""


class DivergenceError(FloatingPointError):
    """One sentence: when training stopped to be finite, what to do, and what is left."""
