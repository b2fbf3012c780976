"""The run that ``bridge pretrain`` and ``bridge finetune`` start, on one rank or on several."""

import argparse
import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, override

from bridge.cli.output import layout_lines, print_keys
from bridge.cli.runs.hidden_gpus import hide_gpus_on_cpu_runs
from bridge.cli.runs.launch import on_local_ranks
from bridge.cli.runs.one_rank import Command, RankFailed, train_here
from bridge.cli.runs.start_command import StartCommand
from bridge.cli.runs.starting_checkpoint import find_starting_checkpoint
from bridge.training.launchers import rank_environment, rendezvous_url
from bridge.training.local_paths import PathOption
from bridge.training.recipe_lookup import (
    add_configuration_arguments,
    checked_ranks,
    configure,
    find_recipe,
    read_documents,
)
from bridge.training.run_files.lock import directory_lock
from bridge.training.usage_error import UsageError

if TYPE_CHECKING:
    from bridge.training.config import ConfigContainer, YamlDocument, YamlText
    from bridge.training.contracts import Recipe


def add_parser(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: "Command", summary: str
) -> argparse.ArgumentParser:
    """Add a command that trains, with the arguments that all of them have."""
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary.capitalize()}. Keys: `bridge {name} RECIPE --help`.",
        add_help=False,
    )
    add_configuration_arguments(parser)
    parser.add_argument("--nproc", type=int, metavar="N", help="start N ranks on this machine")
    parser.add_argument("--run-dir", metavar="DIR", action=PathOption, help="the run's directory")
    parser.add_argument("--resume", action="store_true", help="continue the run in --run-dir")
    parser.add_argument(
        "--step", type=int, metavar="N", help="with --resume: from the checkpoint of step N"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check the configuration of all ranks; build nothing"
    )
    parser.add_argument("-h", "--help", action=_Help, nargs=0, help="list the keys and exit")
    return parser


class _Help(argparse.Action):
    """Lists the keys of the recipe that was named, with their values."""

    @override
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if getattr(namespace, "recipe", None):
            print_keys(parser, find_recipe(namespace.recipe))
        else:
            parser.print_help()
        parser.exit()


def run(options: argparse.Namespace, command: "Command", *, source: str | None = None) -> int:
    """Carry out a command that trains; return its exit code.

    Args:
        options: Its arguments.
        command: Its name.
        source: The run or checkpoint whose model a new run starts from, None for random weights.
    """
    with _claimed_directory(options):
        return _run(options, command, source)


def _run(options: argparse.Namespace, command: "Command", source: str | None) -> int:
    # megatron-core's overlap of transfers with computing relies on it; CUDA reads it once.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    ranks = _number_of_ranks(options)
    # The user's mistakes are found before ranks are started, for the layout of all of them.
    recipe, config = _configured(options, command, source, ranks)
    _check_directory(config)
    if options.dry_run:
        _check_length(config)
        _report_dry_run(recipe, config, ranks)
        return 0
    start = StartCommand.of_this_process(options.arguments, options.nproc)
    if ranks > 1 and rank_environment().launcher is None:
        return on_local_ranks(ranks, command, recipe, config, start)
    try:
        return train_here(command, recipe, config, start)
    except RankFailed as failure:
        return failure.code


def _number_of_ranks(options: argparse.Namespace) -> int:
    """Return the ranks of the run: those that a launcher has started, else those asked for."""
    environment = rank_environment()
    if environment.launcher is not None and options.nproc is not None:
        raise UsageError(
            f"--nproc={options.nproc}: {environment.launcher} has started this rank already; leave "
            f"--nproc out under {environment.launcher}"
        )
    if environment.world_size > 1 and not options.dry_run:
        rendezvous_url()  # Missing variables are reported before anything slow.
    is_a_rank = environment.launcher is not None
    return environment.world_size if is_a_rank else checked_ranks(options.nproc)


def _configured(
    options: argparse.Namespace, command: "Command", source: str | None, ranks: int
) -> "tuple[Recipe, ConfigContainer]":
    """Return the recipe and its resolved configuration, with all that the command line changes.

    Raises:
        UsageError: The configuration has problems, or there is no such recipe, file, run or
            checkpoint.
    """
    overrides = _all_overrides(options)
    given = _given_documents(options.config, rank_environment().rank)
    saved = _saved_configuration(options)
    hide_gpus_on_cpu_runs([*saved, *(document.text for document in given)], overrides)
    recipe = find_recipe(options.recipe)
    documents: list[YamlDocument] = [*saved, *given]
    start = None if source is None else find_starting_checkpoint(source, recipe)
    if start is not None:
        documents = [*saved, start.document, *given]
        overrides.append(f"checkpoint.pretrained_checkpoint={start.path}")
    config = configure(recipe, documents, overrides, world_size=ranks)
    if start is not None:
        from bridge.training.checkpoint.resume_rules import reject_another_model

        reject_another_model(start.path, config)
    config.command = command
    return recipe, config


def _all_overrides(options: argparse.Namespace) -> list[str]:
    """Return the overrides, including those of options such as --run-dir."""
    overrides = list(options.overrides)
    if options.run_dir is not None:
        overrides.append(f"checkpoint.run_dir={options.run_dir}")
    overrides.append(f"checkpoint.resume={'true' if options.resume else 'false'}")
    if options.step is not None:
        overrides.append(f"checkpoint.step={options.step}")
    return overrides


def _report_dry_run(recipe: "Recipe", config: "ConfigContainer", ranks: int) -> None:
    for line in layout_lines(config, ranks):
        print(line)
    if (note := rank_environment().note) is not None:
        print(note)
    print(f"dry run: {recipe.name} is ready for {ranks} rank{'s' if ranks > 1 else ''}")


def _given_documents(paths: Sequence[str], rank: int) -> "list[YamlText]":
    """Read configuration files, and report the fields that belong to another run alone."""
    documents = read_documents(paths)
    for document in documents:
        if document.not_taken and rank == 0:
            fields = ", ".join(document.not_taken)
            print(f"--config {document.source}: taken without {fields}, of that run alone")
    return documents


@contextlib.contextmanager
def _claimed_directory(options: argparse.Namespace) -> Iterator[None]:
    """Claim the run's directory before anything slow is imported, if the command line names it.

    `pretrain` takes the claim over; it makes its own where the directory is named elsewhere.
    """
    with contextlib.ExitStack() as stack:
        path = options.run_dir
        for override in options.overrides if path is None else ():
            key, _, value = override.partition("=")
            path = value if key == "checkpoint.run_dir" else path
        # A missing run is reported later.
        has_directory = path and (not options.resume or Path(path).is_dir())
        environment = rank_environment()
        if has_directory and not options.dry_run and environment.rank == 0:
            # Under a launcher `pretrain` tries again, and all ranks learn of it.
            problems = () if environment.launcher is None else (UsageError,)
            with contextlib.suppress(*problems):
                stack.enter_context(directory_lock(Path(path)))
        yield


def _saved_configuration(options: argparse.Namespace) -> list[str]:
    """Return the configuration that a resumed run starts from; none for a new run."""
    if not options.resume:
        return []
    if options.run_dir is None:
        raise UsageError("--resume: say which run to continue with --run-dir DIR")
    from bridge.training.run_files.directory import RunDirectory, reject_wrong_directory

    directory = RunDirectory(Path(options.run_dir))
    reject_wrong_directory(directory, resume=True)
    return [directory.saved_config()]


def _check_directory(config: "ConfigContainer") -> None:
    """Reject a run's directory that does not fit this start, as the ranks would."""
    from bridge.training.checkpoint.resume_rules import reject_another_run
    from bridge.training.checkpoint.verification import reject_damaged
    from bridge.training.run_files.directory import RunDirectory, reject_wrong_directory

    if config.checkpoint.run_dir is None:
        return
    directory = RunDirectory(Path(config.checkpoint.run_dir))
    reject_wrong_directory(directory, resume=config.checkpoint.resume)
    reject_another_run(directory, config)
    if config.checkpoint.resume:
        checkpoint = directory.checkpoint_to_resume(config.checkpoint.step)
        if checkpoint is not None:
            reject_damaged(checkpoint)


def _check_length(config: "ConfigContainer") -> None:
    """Reject a run that is shorter than the steps it has done, as its ranks would."""
    from bridge.training.checkpoint.run_state import counters_of
    from bridge.training.data.run_length import last_step
    from bridge.training.run_files.directory import RunDirectory

    directory, train = config.checkpoint.run_dir, config.train
    # The length of epochs is known when the data is read.
    if directory is None or not config.checkpoint.resume or train.epochs is not None:
        return
    checkpoint = RunDirectory(Path(directory)).checkpoint_to_resume(config.checkpoint.step)
    if checkpoint is not None:
        last_step(train, 0, counters_of(checkpoint))
