"""Messages to the user: `info`, `warn`, `debug`, `error`, printed once per run (by the first process only)."""

import logging
import sys

from .misc import get_rank

logger = logging.getLogger("threestudio_pgc")


class _PlainFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        message = super().format(record)
        return message if record.levelno == logging.INFO else f"{record.levelname.lower()}: {message}"


class _BarAwareHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        message = self.format(record)
        bars = sys.modules.get("tqdm")  # a line written past a progress bar would tear it
        bars.tqdm.write(message, file=sys.stderr) if bars else print(message, file=sys.stderr)


def setup(verbose: bool = False) -> None:
    """Send messages to stderr; `verbose` shows debug messages too. Safe to call again."""
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    logger.propagate = False
    if not logger.handlers:
        handler = _BarAwareHandler()
        handler.setFormatter(_PlainFormatter())
        logger.addHandler(handler)


def _on_first_process(level: int):
    def write(message: str, *args) -> None:
        if get_rank() == 0:
            logger.log(level, message, *args)

    return write


debug = _on_first_process(logging.DEBUG)
info = _on_first_process(logging.INFO)
warn = _on_first_process(logging.WARNING)
error = _on_first_process(logging.ERROR)
