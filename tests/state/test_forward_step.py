import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Annotated, Any, Optional

import pytest
import torch

from bridge.training.forward_step import ACCEPTED_FORMS, prepare_forward_step_func
from bridge.training.state import GlobalState

STATE = GlobalState(SimpleNamespace())  # type: ignore[arg-type]
BATCHES = iter(())
MODEL = torch.nn.Identity()


def call(step: Callable[..., Any], **named: Any) -> Any:
    return prepare_forward_step_func(step, STATE)(BATCHES, MODEL, **named)


def two(data_iterator: Any, model: Any) -> Any:
    return data_iterator, model


def two_and_plan(data_iterator: Any, model: Any, return_schedule_plan: bool = False) -> Any:
    return data_iterator, model, return_schedule_plan


def three(state: GlobalState, data_iterator: Any, model: Any) -> Any:
    return state, data_iterator, model


def four(state: Any, data_iterator: Any, model: Any, return_schedule_plan: bool = False) -> Any:
    return state, data_iterator, model, return_schedule_plan


def annotated(s: GlobalState, d: Any, m: Any) -> Any:
    return s, d, m


def optional(s: Optional[GlobalState], d: Any, m: Any) -> Any:  # noqa: UP045
    return s, d, m


def union(s: GlobalState | None, d: Any, m: Any) -> Any:
    return s, d, m


def in_a_string(s: "GlobalState | None", d: Any, m: Any) -> Any:
    return s, d, m


def optional_of_a_string(s: Optional["GlobalState"], d: Any, m: Any) -> Any:
    return s, d, m


def with_a_remark(s: Annotated[GlobalState, "the run"], d: Any, m: Any) -> Any:
    return s, d, m


def named_global_state(global_state: Any, d: Any, m: Any) -> Any:
    return global_state, d, m


def four_required(a: Any, b: Any, c: Any, return_schedule_plan: bool) -> Any:
    assert return_schedule_plan is False
    return a, b, c


def all_have_defaults(state: Any = None, data_iterator: Any = None, model: Any = None) -> Any:
    return state, data_iterator, model


def by_position_only(s: GlobalState, d: Any, m: Any, /) -> Any:
    return s, d, m


def state_then_star(s: GlobalState, *rest: Any) -> Any:
    return s, *rest


def with_extras(state: Any, d: Any, m: Any, scale: float = 2.0, *, bias: float = 1.0) -> Any:
    assert (scale, bias) == (2.0, 1.0)
    return state, d, m


def decorated(step: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(step)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return step(*args, **kwargs)

    return wrapper


def decorated_by_position(step: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(step)
    def wrapper(*args: Any) -> Any:
        return step(*args)

    return wrapper


def decorated_with_names_lost(step: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(step)
    def wrapper(a: Any, b: Any, c: Any) -> Any:
        return step(a, b, c)

    return wrapper


class Functor:
    def __call__(self, state: GlobalState, data_iterator: Any, model: Any) -> Any:
        return state, data_iterator, model

    def method(self, state: GlobalState, data_iterator: Any, model: Any) -> Any:
        return state, data_iterator, model

    @classmethod
    def class_method(cls, state: GlobalState, data_iterator: Any, model: Any) -> Any:
        return state, data_iterator, model

    @staticmethod
    def static_method(state: GlobalState, data_iterator: Any, model: Any) -> Any:
        return state, data_iterator, model


class InheritedFunctor(Functor):
    pass


class FunctorWithoutState:
    def __call__(self, data_iterator: Any, model: Any) -> Any:
        return data_iterator, model


future: dict[str, Any] = {}
exec(  # Annotations of a module with the future import, whose names exist for type checkers only.
    """
from __future__ import annotations
def step(s: state_module.GlobalState, d: Iterator, m: Module):
    return s, d, m
""",
    future,
)

WITH_STATE: list[Callable[..., Any]] = [
    three,
    annotated,
    optional,
    union,
    in_a_string,
    optional_of_a_string,
    with_a_remark,
    named_global_state,
    four_required,
    all_have_defaults,
    by_position_only,
    state_then_star,
    with_extras,
    future["step"],
    lambda state, d, m: (state, d, m),
    functools.partial(with_extras, bias=1.0),
    decorated(three),
    decorated_by_position(annotated),
    decorated_with_names_lost(three),
    decorated(decorated(three)),
    functools.partial(decorated(with_extras), scale=2.0),
    Functor(),
    InheritedFunctor(),
    Functor().method,
    Functor.class_method,
    Functor.static_method,
]


@pytest.mark.parametrize("step", WITH_STATE)
def test_a_step_that_takes_the_state_is_given_it_first(step: Callable[..., Any]) -> None:
    assert call(step) == (STATE, BATCHES, MODEL)


WITHOUT_STATE: list[Callable[..., Any]] = [
    two,
    lambda iterator, model: (iterator, model),
    lambda data_iterator, *rest: (data_iterator, *rest),
    lambda a, b=None: (a, b),
    decorated(two),
    FunctorWithoutState(),
    FunctorWithoutState().__call__,
]


@pytest.mark.parametrize("step", WITHOUT_STATE)
def test_a_step_without_state_is_given_two_arguments(step: Callable[..., Any]) -> None:
    assert call(step) == (BATCHES, MODEL)


OTHER = GlobalState(SimpleNamespace())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "step",
    [
        functools.partial(three, OTHER),
        functools.partial(three, state=OTHER),
        functools.partial(annotated, s=OTHER),
        functools.partial(decorated(three), state=OTHER),
        decorated(functools.partial(three, state=OTHER)),
        functools.partial(functools.partial(with_extras, scale=2.0), state=OTHER),
        functools.partial(Functor(), OTHER),
        functools.partial(Functor().method, state=OTHER),
    ],
)
def test_a_partial_keeps_the_state_that_it_holds(step: Callable[..., Any]) -> None:
    assert call(step) == (OTHER, BATCHES, MODEL)


def test_a_decorator_that_fills_in_the_state_itself_is_taken_at_its_own_signature() -> None:
    @functools.wraps(three)
    def fills_in(data_iterator: Any, model: Any) -> Any:
        return three(OTHER, data_iterator, model)

    assert call(fills_in) == (OTHER, BATCHES, MODEL)


@pytest.mark.parametrize(
    ("step", "before"),
    [
        (two_and_plan, ()),
        (four, (STATE,)),
        (decorated(four), (STATE,)),
        (decorated_by_position(four), (STATE,)),
        (functools.partial(four, OTHER), (OTHER,)),
        (functools.partial(four, state=OTHER), (OTHER,)),
        (lambda a, b, return_schedule_plan: (a, b, return_schedule_plan), ()),
        (lambda a, b, *, return_schedule_plan=False: (a, b, return_schedule_plan), ()),
        (lambda d, m, /, return_schedule_plan: (d, m, return_schedule_plan), ()),
    ],
)
def test_a_schedule_plan_is_asked_for_by_keyword(step: Any, before: tuple[Any, ...]) -> None:
    assert call(step, return_schedule_plan=True) == (*before, BATCHES, MODEL, True)
    assert call(step) == (*before, BATCHES, MODEL, False)


@pytest.mark.parametrize("step", [two, three, state_then_star, decorated(three)])
def test_a_plan_of_a_step_that_makes_none_is_an_error(step: Callable[..., Any]) -> None:
    prepared = prepare_forward_step_func(step, STATE)
    assert not prepared.takes_schedule_plan
    with pytest.raises(ValueError, match="has no parameter return_schedule_plan"):
        prepared(BATCHES, MODEL, return_schedule_plan=True)


def test_the_third_positional_argument_of_the_schedules_is_not_the_plan_flag() -> None:
    def step(
        data_iterator: Any,
        model: Any,
        return_schedule_plan: bool = False,
        checkpoint_activations_microbatch: bool | None = None,
    ) -> Any:
        return return_schedule_plan, checkpoint_activations_microbatch

    prepared = prepare_forward_step_func(step, STATE)
    assert prepared(BATCHES, MODEL, True) == (False, True)
    assert prepared(BATCHES, MODEL, False) == (False, False)
    assert prepared(BATCHES, MODEL) == (False, None)


def test_activation_checkpointing_of_microbatches_needs_a_step_that_hears_of_it() -> None:
    prepared = prepare_forward_step_func(two_and_plan, STATE)
    with pytest.raises(ValueError, match="num_microbatches_with_partial_activation_checkpoints"):
        prepared(BATCHES, MODEL, True)


def state_second(data_iterator: Any, s: GlobalState, model: Any) -> Any: ...
def state_by_name_last(data_iterator: Any, model: Any, state: Any) -> Any: ...
def state_only_by_keyword(d: Any, m: Any, *, s: GlobalState | None = None) -> Any: ...
def two_states(state: GlobalState, other: GlobalState, model: Any) -> Any: ...
def none() -> Any: ...
def plan_first(return_schedule_plan: Any, data_iterator: Any, model: Any) -> Any: ...
def needs_more(state: GlobalState, d: Any, m: Any, tokenizer: Any) -> Any: ...
def named_data_first(data_iterator: Any, b: Any, c: Any, return_schedule_plan: Any) -> Any: ...


class WrongFunctor:
    def __call__(self, a: Any, b: Any, c: Any) -> Any: ...


@pytest.mark.parametrize(
    ("step", "problem"),
    [
        (state_second, "'s', which is not the first"),
        (state_by_name_last, "'state', which is not the first"),
        (state_only_by_keyword, "'s', which is not the first"),
        (two_states, "'other', which is not the first"),
        (none, "too few"),
        (lambda state, data_iterator: None, "too few"),
        (lambda model: None, "too few"),
        (lambda a, b, c: None, "takes three arguments, and neither"),
        (WrongFunctor(), "takes three arguments, and neither"),
        (needs_more, "more than a step is given: tokenizer"),
        (named_data_first, "takes three arguments"),
        (lambda a, b, c, d, e: None, "more than a step is given: c, d, e"),
        (lambda d, m, *, scale: None, "takes three arguments"),
        (plan_first, "does not begin with"),
        (lambda *args: None, "does not tell whether the state comes first"),
        (lambda *args, **kwargs: None, "does not tell whether the state comes first"),
        (lambda batches, *args: None, "does not tell whether the state comes first"),
        (MODEL, "does not tell whether the state comes first"),
        (Functor, "is a class: pass an instance"),
        (None, "is not callable"),
        (max, "has no signature|does not tell"),
    ],
)
def test_an_unclear_form_is_rejected_with_the_accepted_ones(step: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as error:
        prepare_forward_step_func(step, STATE)
    assert "seen: " in str(error.value)
    assert all(form in str(error.value) for form in ACCEPTED_FORMS)


def test_preparing_twice_gives_the_same_step() -> None:
    prepared = prepare_forward_step_func(three, STATE)
    assert prepare_forward_step_func(prepared, STATE) is prepared
    assert prepare_forward_step_func(prepared, OTHER)(BATCHES, MODEL) == (OTHER, BATCHES, MODEL)


def test_the_form_is_found_once_and_not_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare_forward_step_func(three, STATE)
    monkeypatch.delattr("inspect.signature")
    assert prepared(BATCHES, MODEL) == (STATE, BATCHES, MODEL)
