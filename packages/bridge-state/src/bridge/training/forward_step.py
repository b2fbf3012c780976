"""The forms of a forward step, and the preparation of one for megatron-core's schedules.

A forward step draws one microbatch and runs the model on it. It returns the model's output and the
function that computes the loss from it, which is called on the last pipeline stage. A forward step
has one of these forms::

    step(data_iterator, model)
    step(data_iterator, model, return_schedule_plan=False)
    step(state, data_iterator, model)
    step(state, data_iterator, model, return_schedule_plan=False)

and is a function, a lambda, a partial, an object with ``__call__``, a bound method, or one of these
decorated with ``functools.wraps``. The state comes first. It is recognized by its annotation
`GlobalState` or by its name, ``state`` or ``global_state``. `prepare_forward_step_func` finds the
form once, at the start, and rejects a step whose form is not clear.
"""

import functools
import inspect
import re
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from inspect import Parameter
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ForwardRef,
    Literal,
    Protocol,
    Union,
    get_args,
    get_origin,
)

import torch

from bridge.training.usage_error import UsageError

if TYPE_CHECKING:
    from bridge.training.state import GlobalState


class LossFunction(Protocol):
    """Computes the loss of one microbatch from the model's output, on the last pipeline stage.

    It returns one of

    1. ``(loss, metrics)``: the scalar mean loss of this microbatch on this rank. It is averaged
       over microbatches and over data-parallel and context-parallel ranks. A loss that is
       normalized already, in whatever way, belongs here.
    2. ``(loss_sum, num_tokens, metrics)``: the scalar sum of the token losses and the number of
       these tokens (an integer tensor). The step's loss is the sum of all sums divided by the sum
       of all numbers, across microbatches and those ranks. A mean in place of the sum would be
       divided a second time, which nothing can detect.
    3. any structure, where `evaluate` is called with ``collect_non_loss_data=True``: it is
       collected from each microbatch as it is, and nothing is trained.

    ``metrics`` maps names to values: a tensor ``[sum, count]`` is a mean over tokens, a scalar a
    mean over microbatches and ranks; `bridge.training.loss_reduction` has more kinds. All
    microbatches of a run have the same pattern.
    """

    def __call__(self, output_tensor: torch.Tensor, /) -> Any:
        """Return the loss of `output_tensor` in one of the three patterns."""


ACCEPTED_FORMS = (
    "(data_iterator, model)",
    "(data_iterator, model, return_schedule_plan=False)",
    "(state: GlobalState, data_iterator, model)",
    "(state: GlobalState, data_iterator, model, return_schedule_plan=False)",
)
_STATE_NAMES = ("state", "global_state")
_PLAN = "return_schedule_plan"
_CHECKPOINT = "checkpoint_activations_microbatch"
_BY_POSITION = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
_STARS = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


class PreparedForwardStep:
    """A user's forward step as megatron-core's schedules call it, the state filled in."""

    def __init__(self, func: Callable[..., Any], state: "GlobalState") -> None:
        """Find the form of `func`.

        Raises:
            UsageError: The form is not clear.
        """
        self.func = func
        self.state = state
        try:
            self._form = _form_of(func)
        except _UnclearForm as error:
            raise _rejection(func, str(error)) from error.__cause__
        self.takes_schedule_plan = self._form.plan is not None
        """Whether `return_schedule_plan` may be set."""
        # A bound prefix costs nothing at each call, and sees later changes of the state.
        self._step = functools.partial(func, state) if self._form.takes_state else func

    def __call__(
        self,
        data_iterator: Iterator[Any],
        model: torch.nn.Module,
        checkpoint_activations_microbatch: bool | None = None,
        *,
        return_schedule_plan: bool = False,
    ) -> Any:
        """Run one microbatch.

        Args:
            data_iterator: Yields microbatches; None where megatron-core gives a rank no data.
            model: One model chunk.
            checkpoint_activations_microbatch: Third positional argument of megatron-core's, where
                ``num_microbatches_with_partial_activation_checkpoints`` is set.
            return_schedule_plan: Return megatron-core's plan of the chunk in place of its output,
                for the schedule that overlaps expert-parallel communication.

        Returns:
            The model's output, and its `LossFunction`.

        Raises:
            UsageError: The step has no parameter for an argument that megatron-core passes.
        """
        form = self._form
        inputs: list[Any] = [data_iterator, model]
        by_position = len(inputs) - len(form.keywords)
        arguments = inputs[:by_position]
        named = dict(zip(form.keywords, inputs[by_position:], strict=True))
        if checkpoint_activations_microbatch is not None:
            if not form.takes_checkpoint:
                raise UsageError(
                    "model.num_microbatches_with_partial_activation_checkpoints is set, but the "
                    f"forward step {_describe(self.func)} has no parameter {_CHECKPOINT}: "
                    "add it and pass it on to the model, or leave the setting out"
                )
            named[_CHECKPOINT] = checkpoint_activations_microbatch
        if return_schedule_plan and form.plan is None:
            raise UsageError(
                f"the forward step {_describe(self.func)} was asked for a schedule plan "
                f"(model.overlap_moe_expert_parallel_comm), but has no parameter {_PLAN}"
            )
        if return_schedule_plan or form.needs_plan:
            if form.plan == "by position":
                arguments.append(return_schedule_plan)
            else:
                named[_PLAN] = return_schedule_plan
        return self._step(*arguments, **named)


def prepare_forward_step_func(
    func: Callable[..., Any], state: "GlobalState"
) -> PreparedForwardStep:
    """Make a forward step of any accepted form callable as megatron-core's schedules call it.

    Args:
        func: The user's step, or one that is prepared already.
        state: Passed to a step that takes it.

    Raises:
        UsageError: The step has none of the accepted forms, or more than one; the message lists
            them and the signature that was seen.
    """
    if isinstance(func, PreparedForwardStep):
        return func if func.state is state else PreparedForwardStep(func.func, state)
    return PreparedForwardStep(func, state)


@dataclass(frozen=True, kw_only=True)
class _Form:
    """The way in which a forward step takes its arguments."""

    takes_state: bool
    keywords: tuple[str, ...]
    """The names of the data iterator and the model, or of the model alone, if they must be passed
    by name. A partial that holds the state by name leaves no other way for its other parameters."""
    plan: Literal["by name", "by position"] | None
    """The way in which the step takes `return_schedule_plan`; None if it does not."""
    needs_plan: bool
    """Whether `return_schedule_plan` has no default."""
    takes_checkpoint: bool


class _UnclearForm(Exception):
    """A forward step has none of the accepted forms, or more than one."""


def _form_of(func: Any) -> _Form:
    """Return the form of a forward step, found by the names and annotations of its parameters."""
    if inspect.isclass(func):
        raise _UnclearForm("is a class: pass an instance of it")
    if not callable(func):
        raise _UnclearForm("is not callable")
    bound = _names_bound_by_partials(func)
    parameters = [p for p in _signature(func).parameters.values() if p.name not in bound]
    kinds = {p.kind for p in parameters}
    takes_any_name = Parameter.VAR_KEYWORD in kinds
    named = [p for p in parameters if p.kind not in _STARS]
    takes_state = _takes_state(named)
    after_state = named[takes_state:]
    takes_plan = takes_any_name or _PLAN in {*_names(named), *bound}
    return _Form(
        takes_state=takes_state,
        keywords=_keywords(after_state, takes_state, Parameter.VAR_POSITIONAL in kinds),
        plan=_way_of_plan(func, after_state) if takes_plan else None,
        needs_plan=_PLAN in _names(_required(named)),
        takes_checkpoint=_CHECKPOINT in _names(named) or takes_any_name,
    )


def _takes_state(named: Sequence[Parameter]) -> bool:
    """Whether the first parameter is the state; a state anywhere else is rejected."""
    states = [p for p in named if _is_state(p.annotation) or p.name in _STATE_NAMES]
    for parameter in states:
        if parameter is not named[0] or parameter.kind not in _BY_POSITION:
            raise _UnclearForm(
                f"has the state in parameter {parameter.name!r}, which is not the first one"
            )
    # The first of three parameters before return_schedule_plan is the state, whatever its name.
    required = _names(_required(named[:3]))
    is_fourth_form = len(required) == 3 and _names(named[3:4]) == [_PLAN]
    return bool(states) or (is_fourth_form and required[0] != "data_iterator")


def _keywords(
    after_state: Sequence[Parameter], takes_state: bool, takes_star: bool
) -> tuple[str, ...]:
    """Find the data iterator and the model; return the names of those that need a name."""
    required = [p for p in _required(after_state) if p.name not in (_PLAN, _CHECKPOINT)]
    if len(required) == 3 and not takes_state:
        raise _UnclearForm(
            "takes three arguments, and neither a name nor an annotation tells which"
        )
    if len(required) > 2:
        raise _UnclearForm(f"needs more than a step is given: {', '.join(_names(required[2:]))}")
    if len(required) < 2 and takes_star:
        if takes_state or _names(after_state[:1]) == ["data_iterator"]:
            return ()
        raise _UnclearForm("takes *args, which does not tell whether the state comes first")
    both = required if len(required) == 2 else after_state[:2]
    if len(both) < 2:
        raise _UnclearForm("takes too few arguments")
    if after_state[:2] != both or {_PLAN, _CHECKPOINT} & set(_names(both)):
        raise _UnclearForm("does not begin with the data iterator and the model")
    return tuple(p.name for p in both if p.kind not in _BY_POSITION)


def _way_of_plan(
    func: Any, after_state: Sequence[Parameter]
) -> Literal["by name", "by position"] | None:
    """Return how `func` takes `return_schedule_plan`.

    The signature of `func` itself decides, which may be a decorator's wrapper around the step.
    """
    own = inspect.signature(func, follow_wrapped=False).parameters.values()
    if any(
        p.kind is Parameter.VAR_KEYWORD
        or (p.name == _PLAN and p.kind is not Parameter.POSITIONAL_ONLY)
        for p in own
    ):
        return "by name"
    return "by position" if _names(after_state[2:3]) == [_PLAN] else None


def _required(parameters: Sequence[Parameter]) -> list[Parameter]:
    return [p for p in parameters if p.default is Parameter.empty]


def _names(parameters: Sequence[Parameter]) -> list[str]:
    return [p.name for p in parameters]


def _signature(func: Any) -> inspect.Signature:
    """Return the signature of what `func` wraps, or its own where a decorator changes the form."""
    try:
        own = inspect.signature(func, follow_wrapped=False)
        wrapped = inspect.signature(func)
    except (TypeError, ValueError) as error:
        raise _UnclearForm(f"has no signature that can be read ({error})") from error
    kinds = [p.kind for p in own.parameters.values()]
    if Parameter.VAR_POSITIONAL in kinds:
        return wrapped
    differs = sum(kind in _BY_POSITION for kind in kinds) != sum(
        p.kind in _BY_POSITION for p in wrapped.parameters.values()
    )
    return own if differs else wrapped


def _names_bound_by_partials(func: Any) -> set[str]:
    """Return the names of what partials hold, also of those that a decorator has wrapped."""
    names: set[str] = set()
    while True:
        if isinstance(func, functools.partial):
            names |= func.keywords.keys()
            func = func.func
        elif hasattr(func, "__wrapped__"):
            func = func.__wrapped__
        else:
            return names


def _is_state(annotation: Any) -> bool:
    """Whether an annotation, or a member of its union, is `GlobalState`.

    The name decides: annotations may be strings, of names that exist only while type checking.
    """
    if isinstance(annotation, ForwardRef):
        annotation = annotation.__forward_arg__
    if isinstance(annotation, str):
        return re.search(r"\bGlobalState\b", annotation) is not None
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return any(_is_state(member) for member in get_args(annotation))
    return inspect.isclass(annotation) and any(
        base.__name__ == "GlobalState" for base in annotation.__mro__
    )


def _rejection(func: Any, problem: str) -> UsageError:
    try:
        seen = str(inspect.signature(func))
    except (TypeError, ValueError):
        seen = repr(func)
    return UsageError(
        f"the forward step {_describe(func)} {problem}; seen: {seen}; accepted: "
        + ", ".join(ACCEPTED_FORMS)
    )


def _describe(func: Any) -> str:
    while isinstance(func, functools.partial):
        func = func.func
    name = getattr(func, "__qualname__", None)
    return str(name or type(func).__qualname__)
