"""Entry point of ``merit-fast``: finds the command, runs it, turns errors into exit codes.

Exit codes: 0 done, 1 failed, 2 bad input (one line that names the file, the key and the rule), 130
interrupted (Ctrl-C), 143 terminated. Builds the parser of the requested command only and imports
its needs only: a merge can take less time than importing torch. Everything else is imported inside
``main``, so that an interruption at any time ends with one line.
"""

import contextlib
import gc
import os
import signal
import sys
from types import FrameType

# Idle threads of torch's OpenMP sleep: they would keep the cores busy that other work needs.
_ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def main() -> None:
    """Runs the command line of this process and exits."""
    before = {number: signal.signal(number, _interrupt) for number in _SIGNALS}
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)  # read once, when torch is imported
    debug = "--debug" in sys.argv
    try:
        code = _run(sys.argv[1:], debug)
    except KeyboardInterrupt as interrupt:
        code = _end_interrupted(interrupt, debug)
    finally:
        gc.freeze()  # else Python looks for garbage among all objects while it ends: 10 ms
    for number, handler in before.items():
        signal.signal(number, handler)
    sys.exit(code)


def _run(words: list[str], debug: bool) -> int:
    """Runs a command line and turns its errors into an exit code."""
    from merit_fast.errors import InputError, MeritFastError, no_space, one_line

    try:
        _run_command(words)
    except InputError as error:
        return _fail(str(error), 2, debug)
    except MeritFastError as error:
        return _fail(str(error), 1, debug)
    except Exception as error:
        reason = no_space(error)
        if reason is not None:
            return _fail(f"{getattr(error, 'filename', None) or 'a file'}: {reason}", 1, debug)
        message = f"{type(error).__name__}: {one_line(error)} (--debug shows the traceback)"
        return _fail(message, 1, debug)
    return 0


def _interrupt(signal_number: int, frame: FrameType | None) -> None:
    """Interrupts the work at its next Python line; a second signal ends the process at once.

    Every output is complete or absent at any time, so that the second signal loses no more.
    """
    for number in _SIGNALS:
        signal.signal(number, lambda number, frame: os._exit(128 + number))
    raise KeyboardInterrupt(signal_number)


def _end_interrupted(interrupt: KeyboardInterrupt, debug: bool) -> int:
    """Prints the line of an interruption and ends the process without waiting for its threads."""
    number = interrupt.args[0] if interrupt.args else signal.SIGINT
    what = "terminated" if number == signal.SIGTERM else "interrupted"
    code = _fail(f"{what}; the same command resumes the work", 128 + int(number), debug)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run_command(words: list[str]) -> None:
    from merit_fast.cli.commands import COMMANDS
    from merit_fast.cli.flags import Parser
    from merit_fast.cli.overview import EXAMPLES, nearest_command
    from merit_fast.errors import InputError

    name = next((word for word in words if not word.startswith("-")), None)
    if name is None:
        _answer_without_command(words)
        return
    if name not in COMMANDS:
        raise InputError(f"command line: no such command: {name!r}{nearest_command(name)}")
    command = COMMANDS[name]
    parser = Parser(name, command.purpose, EXAMPLES.get(name, ""))
    work = command.add_arguments(parser)
    parser.add_argument(
        "--json",
        dest="as_json",
        action="store_true",
        help="print one JSON object and no progress bars",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    others = list(words)
    others.remove(name)
    arguments = parser.parse_intermixed_args(others)
    from merit_fast.cli.doctor import tell_missing_native  # after --help has ended

    tell_missing_native(name)
    work(arguments)


def _answer_without_command(words: list[str]) -> None:
    from merit_fast import __version__
    from merit_fast.cli.overview import overview
    from merit_fast.errors import InputError

    for word in words:
        if word not in ("-h", "--help", "--version"):
            raise InputError(f"command line: no such option: {word}")
    if "--version" in words:
        print(f"merit-fast {__version__}")
    else:
        print(overview())


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    with contextlib.suppress(OSError):  # a log on a full disk: the exit code still tells
        print(f"{'error' if code == 2 else 'failed'}: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
