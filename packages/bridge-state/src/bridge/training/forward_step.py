"""The contract of a forward step, and what makes one callable by megatron-core's schedules.

A forward step draws one microbatch, runs the model on it, and returns the model's output together
with the function that makes a loss of it (on the last pipeline stage, where the loss is). It may
be written in any of these forms::

    step(data_iterator, model)
    step(data_iterator, model, return_schedule_plan=False)
    step(state, data_iterator, model)
    step(state, data_iterator, model, return_schedule_plan=False)

as a function, a lambda, a partial, an object with ``__call__``, a bound method, or decorated with
``functools.wraps``. The state is recognised by its annotation `GlobalState` or by its name,
``state`` or ``global_state``, and comes first. `prepare_forward_step_func` finds the form once, at
start-up, and refuses what it cannot tell apart.
"""

import functools
import inspect
import re
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import Parameter
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ForwardRef,
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
    """Makes the loss of one microbatch out of the model's output, on the last pipeline stage.

    It returns one of

    1. ``(loss, metrics)``: the scalar mean loss of this microbatch on this rank. It is averaged
       over microbatches and over data-parallel and context-parallel ranks. A loss that is
       normalised already, in whatever way, belongs here.
    2. ``(loss_sum, num_tokens, metrics)``: the scalar sum of the token losses and how many tokens
       they are of (an integer tensor). The step's loss is the sum of all sums over the sum of all
       counts, across microbatches and those ranks. A mean in the place of the sum would be
       divided a second time: nothing can tell the two apart.
    3. any structure, where `evaluate` is called with ``collect_non_loss_data=True``: it is
       collected from each microbatch as it is, and nothing is trained.

    ``metrics`` maps names to values: a tensor ``[sum, count]`` is a mean over tokens, a scalar a
    mean over microbatches and ranks; `bridge.training.loss_reduction` has more kinds. One run
    keeps to one pattern.
    """

    def __call__(self, output_tensor: torch.Tensor, /) -> Any:
        """Return the loss of `output_tensor` in one of the three patterns."""
        ...


class ForwardStep(Protocol):
    """A prepared forward step, as megatron-core's schedules call it."""

    def __call__(
        self,
        data_iterator: Iterator[Any],
        model: torch.nn.Module,
        checkpoint_activations_microbatch: bool | None = None,
        *,
        return_schedule_plan: bool = False,
    ) -> tuple[Any, LossFunction]:
        """Run one microbatch.

        Args:
            data_iterator: Yields microbatches; None where megatron-core gives a rank no data.
            model: One model chunk.
            checkpoint_activations_microbatch: Third positional argument of megatron-core's, where
                ``num_microbatches_with_partial_activation_checkpoints`` is set.
            return_schedule_plan: Return megatron-core's plan of the chunk in place of its output,
                for the schedule that overlaps expert-parallel communication.
        """
        ...


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


@dataclass(frozen=True, kw_only=True)
class _Form:
    """What a forward step takes, and how."""

    takes_state: bool
    takes_plan: bool
    needs_plan: bool
    """The plan flag has no default, so it is always passed."""
    plan_by_position: bool
    takes_checkpoint: bool
    keywords: tuple[str, ...]
    """Names of the data iterator and the model, or of the model, where only a name will do: the
    rest of a partial that holds the state by name."""


class PreparedForwardStep:
    """A user's forward step in the form of `ForwardStep`, the state filled in."""

    def __init__(self, func: Callable[..., Any], state: "GlobalState") -> None:
        """Find the form of `func`; raises UsageError as `prepare_forward_step_func` says."""
        self.func = func
        self.state = state
        self._form = _form_of(func)
        self.takes_schedule_plan = self._form.takes_plan
        """Whether `return_schedule_plan` may be asked for."""
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
        """Call the user's step; see `ForwardStep`.

        Raises:
            UsageError: The step has no parameter for something that megatron-core asks of it.
        """
        form = self._form
        arguments: list[Any] = [data_iterator, model]
        split = 2 - len(form.keywords)
        named = dict(zip(form.keywords, arguments[split:], strict=True))
        del arguments[split:]
        if checkpoint_activations_microbatch is not None:
            if not form.takes_checkpoint:
                raise UsageError(
                    "model.num_microbatches_with_partial_activation_checkpoints is set, but the "
                    f"forward step {_describe(self.func)} has no parameter {_CHECKPOINT}: "
                    "add it and pass it on to the model, or leave the setting out"
                )
            named[_CHECKPOINT] = checkpoint_activations_microbatch
        if return_schedule_plan and not form.takes_plan:
            raise UsageError(
                f"the forward step {_describe(self.func)} was asked for a schedule plan "
                f"(model.overlap_moe_expert_parallel_comm), but has no parameter {_PLAN}"
            )
        if return_schedule_plan or form.needs_plan:
            if form.plan_by_position:
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
        state: Handed to a step that takes it.

    Raises:
        UsageError: The form is none of the accepted ones or cannot be told; the message lists
            them and what was seen.
    """
    if isinstance(func, PreparedForwardStep):
        return func if func.state is state else PreparedForwardStep(func.func, state)
    return PreparedForwardStep(func, state)


def _form_of(func: Any) -> _Form:
    """Tell which form `func` has; raises UsageError if it has none, or may have several."""
    if inspect.isclass(func):
        raise _refusal(func, "is a class: pass an instance of it")
    if not callable(func):
        raise _refusal(func, "is not callable")
    bound = _names_bound_by_partials(func)
    parameters = [p for p in _signature(func).parameters.values() if p.name not in bound]
    kinds = {p.kind for p in parameters}
    stars = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    named = [p for p in parameters if p.kind not in stars]
    takes_state = _takes_state(func, named)
    keywords = _keywords(func, named[takes_state:], takes_state, stars[0] in kinds)
    extras = {p.name: p for p in named if p.name in (_PLAN, _CHECKPOINT)}
    takes_any_name = stars[1] in kinds
    plan_by_name = _takes_by_name(func, _PLAN)
    plan_is_third = _names(named)[takes_state + 2 :][:1] == [_PLAN]
    return _Form(
        takes_state=takes_state,
        takes_plan=(_PLAN in extras or _PLAN in bound or takes_any_name)
        and (plan_by_name or plan_is_third),
        needs_plan=_PLAN in extras and extras[_PLAN].default is Parameter.empty,
        plan_by_position=not plan_by_name,
        takes_checkpoint=_CHECKPOINT in extras or takes_any_name,
        keywords=keywords,
    )


def _takes_state(func: Any, named: list[Parameter]) -> bool:
    """Say whether the first parameter is the state; a state at any other place is refused."""
    states = [p for p in named if _is_state(p.annotation) or p.name in _STATE_NAMES]
    for parameter in states:
        if parameter is not named[0] or parameter.kind not in _BY_POSITION:
            raise _refusal(
                func, f"has the state in parameter {parameter.name!r}, which is not the first one"
            )
    # Three needed before return_schedule_plan: only one form has those, whatever their names are.
    needed = [p.name for p in named[:3] if p.default is Parameter.empty and p.name != _PLAN]
    four = len(needed) == 3 and _names(named[3:4]) == [_PLAN] and needed[0] != "data_iterator"
    return bool(states) or four


def _keywords(
    func: Any, after_state: list[Parameter], takes_state: bool, takes_star: bool
) -> tuple[str, ...]:
    """Find the data iterator and the model among the parameters; name those that need a name."""
    needed = [
        p
        for p in after_state
        if p.default is Parameter.empty and p.name not in (_PLAN, _CHECKPOINT)
    ]
    if len(needed) > 2:
        if len(needed) == 3 and not takes_state:
            raise _refusal(
                func, "takes three arguments, and neither a name nor an annotation tells which"
            )
        raise _refusal(func, f"needs more than a step is given: {', '.join(_names(needed[2:]))}")
    if len(needed) < 2 and takes_star:
        if takes_state or _names(after_state[:1]) == ["data_iterator"]:
            return ()
        raise _refusal(func, "takes *args, which does not tell whether the state comes first")
    places = needed if len(needed) == 2 else after_state[:2]
    if len(places) < 2:
        raise _refusal(func, "takes too few arguments")
    if after_state[:2] != places or any(p.name in (_PLAN, _CHECKPOINT) for p in places):
        raise _refusal(func, "does not begin with the data iterator and the model")
    return tuple(p.name for p in places if p.kind not in _BY_POSITION)


def _names(parameters: list[Parameter]) -> list[str]:
    return [parameter.name for parameter in parameters]


def _signature(func: Any) -> inspect.Signature:
    """Return the signature that tells most: a decorator's own only where it changes the form."""
    try:
        own = inspect.signature(func, follow_wrapped=False)
        wrapped = inspect.signature(func)
    except (TypeError, ValueError) as error:
        raise _refusal(func, f"has no signature that can be read ({error})") from error
    kinds = [p.kind for p in own.parameters.values()]
    if Parameter.VAR_POSITIONAL in kinds:
        return wrapped
    differs = sum(kind in _BY_POSITION for kind in kinds) != sum(
        p.kind in _BY_POSITION for p in wrapped.parameters.values()
    )
    return own if differs else wrapped


def _names_bound_by_partials(func: Any) -> set[str]:
    """Collect what partials hold by name, also those that a decorator has wrapped."""
    names: set[str] = set()
    while True:
        if isinstance(func, functools.partial):
            names |= func.keywords.keys()
            func = func.func
        elif hasattr(func, "__wrapped__"):
            func = func.__wrapped__
        else:
            return names


def _takes_by_name(func: Any, name: str) -> bool:
    """Say whether `func` itself, not what it wraps, can be given `name` as a keyword."""
    parameters = inspect.signature(func, follow_wrapped=False).parameters
    if any(p.kind is Parameter.VAR_KEYWORD for p in parameters.values()):
        return True
    return name in parameters and parameters[name].kind is not Parameter.POSITIONAL_ONLY


def _is_state(annotation: Any) -> bool:
    """Say whether an annotation, or a member of its union, is `GlobalState`.

    It goes by name: annotations may be strings, of names that exist only while type checking.
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


def _refusal(func: Any, problem: str) -> UsageError:
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
