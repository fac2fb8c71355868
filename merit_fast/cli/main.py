"""Entry point of ``merit-fast``: finds the command, runs it, turns errors into exit codes.

Exit codes: 0 done, 1 failed, 2 bad input (one line that names the file, the key and the rule).
Builds the parser of the requested command only and imports its needs only: a merge can take less
time than importing torch.
"""

import sys

from merit_fast import __version__
from merit_fast.cli.commands import COMMANDS
from merit_fast.cli.doctor import tell_missing_native
from merit_fast.cli.flags import Parser
from merit_fast.cli.overview import EXAMPLES, nearest_command, overview
from merit_fast.errors import InputError, MeritFastError, one_line


def main() -> None:
    """Runs the command line of this process and exits."""
    debug = "--debug" in sys.argv
    try:
        _run_command(sys.argv[1:])
        code = 0
    except InputError as error:
        code = _fail(error, 2, debug)
    except MeritFastError as error:
        code = _fail(error, 1, debug)
    except KeyboardInterrupt:
        message = "interrupted; the same command resumes the work"
        code = _fail(MeritFastError(message), 1, debug)
    except Exception as error:
        message = f"{type(error).__name__}: {one_line(error)} (--debug shows the traceback)"
        code = _fail(MeritFastError(message), 1, debug)
    sys.exit(code)


def _run_command(words: list[str]) -> None:
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
    tell_missing_native(name)
    work(arguments)


def _answer_without_command(words: list[str]) -> None:
    for word in words:
        if word not in ("-h", "--help", "--version"):
            raise InputError(f"command line: no such option: {word}")
    if "--version" in words:
        print(f"merit-fast {__version__}")
    else:
        print(overview())


def _fail(error: Exception, code: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    print(f"{'error' if code == 2 else 'failed'}: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
