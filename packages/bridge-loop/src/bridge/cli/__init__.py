"""The ``bridge`` command.

Exit codes: 0 for success, 2 for a mistake of the user's (printed without a traceback), 1 for a
failure while running, 128 + N when signal N asked the run to stop.
"""

import argparse
import signal
import sys
from collections.abc import Sequence

from bridge.cli import doctor, export, finetune, merge, pretrain, recipes
from bridge.cli.output import flush_output
from bridge.training.entry_points import COMMANDS
from bridge.training.usage_error import is_usage_error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    try:
        options = _parse(arguments)
        return int(options.run(options))
    except BrokenPipeError:
        return 0  # The reader of the output has closed it.
    except Exception as error:
        if not is_usage_error(error):
            raise
        print(f"bridge: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        flush_output()


def command_parser() -> argparse.ArgumentParser:
    """Return the parser of the command, with the commands of all installed packages."""
    parser = argparse.ArgumentParser(
        prog="bridge",
        description="Train Megatron-core models, on GPUs or, to try a layout, on a CPU.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (pretrain, finetune, recipes, merge, export, doctor):
        command.register(commands)
    _, broken = COMMANDS.usable(lambda register: register(commands))
    for line in broken.values():
        print(f"bridge: {line}", file=sys.stderr)
    return parser


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes positional arguments in one piece only: overrides after an option come here.
    unknown = [argument for argument in rest if argument.startswith("-") or "=" not in argument]
    if unknown or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(unknown or rest)}")
    if rest:
        options.overrides += rest
    options.arguments = list(sys.argv[1:] if arguments is None else arguments)
    return options
