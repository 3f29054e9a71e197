"""Errors that a user can mend. Each says what was given, the rule it breaks, and what to change.

Entry points print these in one sentence without a traceback; every other exception is a bug of ours.
"""


class UserError(Exception):
    """A user's mistake, in three parts that `str()` joins into one sentence.

    Args:
        got: what was given, with its values ("tensor-model-parallel-size is 3").
        rule: what must hold ("it must divide num-attention-heads (8)").
        fix: what to change, with the nearest value that works ("use 2 or 4").
    """

    def __init__(self, got: str, rule: str, fix: str) -> None:
        super().__init__(f"{got}: {rule}; {fix}" + ("" if fix.endswith(("?", ".")) else "."))
        self.got, self.rule, self.fix = got, rule, fix

    def __reduce__(self) -> tuple[type["UserError"], tuple[str, str, str]]:
        return type(self), (self.got, self.rule, self.fix)  # so that it passes between processes


class ConfigError(UserError):
    """A flag, a YAML entry or a combination of them that cannot work."""


class DataError(UserError):
    """A corpus, tokenizer or dataset file that cannot be used as it is."""


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or of another model."""
