"""What all commands share: flags, and errors of the user as one line and an exit code."""

import errno
import os
import re
import signal
import sys
from collections.abc import Callable

from absl import app, flags, logging

from radialnet.config import Config
from radialnet.sections import ConfigError

EXIT_BAD_INPUT = 2
EXIT_NON_FINITE = 3
EXIT_ALARM = 4
EXIT_PREEMPTED = 75
# Where nothing was to be saved, by SIGINT and SIGTERM; what shells expect.
EXIT_INTERRUPTED, EXIT_TERMINATED = 130, 143

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


class NonFiniteError(RuntimeError):
    """Too many updates in a row that were not finite, from the training step `first_step` on."""

    def __init__(self, message: str, first_step: int):
        super().__init__(message)
        self.first_step = first_step


class AlarmError(RuntimeError):
    """The router goes wrong, and the run was to stop then."""


class PreemptedError(RuntimeError):
    """The process was asked to end, and the state is saved."""


def warn(line: str) -> None:
    """Tell of what goes on all the same."""
    print(f"warning: {line}", file=sys.stderr, flush=True)


def run(main: Callable[[], None]) -> None:
    """Parse the flags and call `main`; end with exit code 0, 2 (bad configuration or input), 3 (non-finite), 4 (an
    alarm, where that is to stop the run) or 75 (asked to end, run me again)."""
    app.run(lambda _: _guarded(main), flags_parser=_parse)


def command(*allowed: str) -> str:
    """The first argument, a word, taken off the command line; ends with exit code 2 where it is none of the allowed."""
    given = sys.argv[1] if len(sys.argv) > 1 else ""
    if given in ("--help", "--helpfull", "-h"):
        return allowed[0]
    if given not in allowed:
        _fail(ConfigError(f"{given!r}: the first argument must be one of {', '.join(allowed)}"), EXIT_BAD_INPUT)
    del sys.argv[1]
    return given


def read_config(flag: flags.FlagHolder) -> Config:
    """The validated config behind a `--config` flag. Raises ConfigError, also when the file can't be loaded."""
    return Config.from_dict(config_fields(flag))


def config_fields(flag: flags.FlagHolder) -> dict:
    """The fields behind a `--config` flag, not validated: section to field to value. Raises ConfigError."""
    try:
        return flag.value.to_dict()
    except OSError as error:
        # ml_collections tells at length what it tried; what went wrong stands at the end.
        raise ConfigError(f"--{flag.name}: can't be loaded: {str(error).strip().splitlines()[-1].strip()}") from None


def numbers(name: str, values: list[str], kind: type, allowed: str) -> list:
    """The values of a flag that takes numbers, by commas: whole ones (`kind` int) of 1 to 2**16, others up to ±1e9.

    Raises:
        ConfigError: naming the flag, its values and what is allowed.
    """
    try:
        parsed = [kind(value) for value in values]
    except ValueError:
        parsed = []
    least, most = (1, 2**16) if kind is int else (-1e9, 1e9)
    # Written so that NaN is none of them.
    if not parsed or not all(least <= value <= most for value in parsed):
        raise ConfigError(f"--{name}={','.join(values)}: {allowed} of {least:g} to {most:g} are needed")
    return parsed


def _parse(arguments: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(arguments)
    except (AttributeError, KeyError) as error:
        # How ml_collections reports a field that does not exist; it names the last part only.
        argument = next((argument for argument in arguments if _names(argument) & set(_QUOTED.findall(str(error)))), "")
        meant = re.search(r'Did you mean "(\w+)"', str(error))
        hint = f" (did you mean {meant[1]!r}?)" if meant else ""
        if not argument:
            _fail(error, EXIT_BAD_INPUT)
        _fail(ConfigError(f"{argument}: no such field{hint}; configs/base.py has all fields"), EXIT_BAD_INPUT)
    except (flags.Error, TypeError, ValueError, OSError) as error:
        _fail(error, EXIT_BAD_INPUT)
    if rest[1:]:
        _fail(ConfigError(f"{rest[1]!r}: not a flag; all arguments are --name=value"), EXIT_BAD_INPUT)
    return rest


_QUOTED = re.compile(r"'(\w+)")


def _names(argument: str) -> set[str]:
    """The parts of the name of a flag: {"--config", "model", "d_ff"}."""
    return set(argument.split("=")[0].split("."))


def _guarded(main: Callable[[], None]) -> None:
    if not flags.FLAGS["verbosity"].present:
        # JAX and Orbax report every detail at level INFO; --verbosity=0 shows it.
        logging.set_verbosity(logging.WARNING)
    # What is half written is taken away. A run that saves its state has a handler of its own (`preemption`).
    signal.signal(signal.SIGTERM, _end)
    try:
        main()
    except ConfigError as error:
        _fail(error, EXIT_BAD_INPUT)
    except BrokenPipeError:
        # Whoever read our output has seen enough. Nothing is left to be flushed at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        # A file or folder that may not be read or written, or is not what its place asks for; or the disk is full.
        if error.filename is None and error.errno not in _DISK_ERRORS:
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        _fail(ConfigError(f"{where}{error.strerror}"), EXIT_BAD_INPUT)
    except NonFiniteError as error:
        _fail(error, EXIT_NON_FINITE)
    except AlarmError as error:
        _fail(error, EXIT_ALARM)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except PreemptedError as error:
        print(error, file=sys.stderr)
        sys.exit(EXIT_PREEMPTED)


def _end(*_) -> None:
    # A second one ends a program at once that is deep in a library's code.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.exit(EXIT_TERMINATED)


def _fail(error: Exception, code: int) -> None:
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    sys.exit(code)
