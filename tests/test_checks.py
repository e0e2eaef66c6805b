"Every exercise of the course: its reference passes, and each known mistake is refused with its own sentence."

import inspect
from copy import copy
from functools import wraps
from types import FunctionType

import pytest
import torch
from torch import nn

from clip475.app import checks
from clip475.app.checks import Case, Exercise


class Doubler(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return 2 * self.linear(x)


class WithoutLayer(Doubler):
    def forward(self, x):
        return 2 * x


class NotDoubled(Doubler):
    def forward(self, x):
        return self.linear(x)


class Tripled(Doubler):
    def forward(self, x):
        return 3 * self.linear(x)


def build_and_run(Module, width, x):
    module = Module(width)
    return {"output": module(x), "parameters": sum(p.numel() for p in module.parameters())}


def stop_training(module):
    module.requires_grad_(False)


def set_on_module(module):
    module.requires_grad = False


def weights_only(module):
    module.weight.requires_grad = False


def bias_only(module):
    module.bias.requires_grad = False


def trained(function, make):
    module = make()
    function(module)
    return {name: p.requires_grad for name, p in module.named_parameters()}


# Two exercises of this file's own, so that the tests below say something about the checker itself.
checks.register(
    Exercise(
        name="Doubler",
        lesson="tests",
        reference=Doubler,
        cases=lambda: [Case("width 3", 3, torch.ones(2, 3)), Case("width 1", 1, torch.ones(1, 1))],
        mistakes={
            "The layer is not used.": WithoutLayer,
            "The output is not doubled.": NotDoubled,
            "That is three times.": Tripled,
        },
        hint="`nn.Linear`, then times two.",
        run=build_and_run,
    )
)
checks.register(
    Exercise(
        name="stop_training",
        lesson="tests",
        reference=stop_training,
        cases=[Case("a linear layer", lambda: nn.Linear(2, 2)), Case("a norm", lambda: nn.LayerNorm(2))],
        mistakes={
            "A module has no `requires_grad` of its own.": set_on_module,
            "The bias is still trained.": weights_only,
            "The weight is still trained.": bias_only,
        },
        hint="Every parameter has a flag.",
        run=trained,
    )
)
EXERCISES = checks.exercises()
MISTAKES = [(name, sentence) for name, exercise in EXERCISES.items() for sentence in exercise.mistakes]

pytestmark = pytest.mark.usefixtures("one_thread")


def as_student(function, name):
    "The same code as a student would hand it in: another object, under the name of the exercise."
    if inspect.isclass(function):
        return type(name, (function,), dict(vars(function)))
    if isinstance(function, FunctionType):
        copied = FunctionType(
            function.__code__, function.__globals__, name, function.__defaults__, function.__closure__
        )
        copied.__kwdefaults__ = copy(function.__kwdefaults__)
        return copied

    @wraps(function)
    def copied(*args, **kwargs):
        return function(*args, **kwargs)

    copied.__name__ = name
    return copied


def named(name, function):
    function.__name__ = name
    return function


@pytest.fixture(params=EXERCISES)
def exercise(request):
    return EXERCISES[request.param]


def test_reference_passes_and_the_students_own_is_returned(exercise, capsys):
    mine = as_student(exercise.reference, exercise.name)
    assert checks.check(mine) is mine, capsys.readouterr().out
    assert checks.passed(exercise.name)
    assert "✓" in capsys.readouterr().out


@pytest.mark.parametrize("name, sentence", MISTAKES)
def test_each_mistake_is_refused_with_its_own_sentence(name, sentence, capsys):
    exercise = EXERCISES[name]
    wrong = as_student(exercise.mistakes[sentence], name)
    assert checks.check(wrong) is exercise.reference
    shown = capsys.readouterr().out
    assert not checks.passed(name)
    assert sentence in shown
    assert not [other for other in exercise.mistakes if other != sentence and other in shown]


def test_at_least_three_mistakes_and_two_cases(exercise):
    cases = exercise.cases() if callable(exercise.cases) else exercise.cases
    assert len(exercise.mistakes) >= 3
    assert len(cases) >= 2
    assert exercise.hint.strip().endswith((".", "?", "`"))
    assert len({case.words for case in cases}) == len(cases)


def raises_not_implemented(*args, **kwargs):
    raise NotImplementedError


def returns_none(*args, **kwargs):
    return None


def only_dots(*args, **kwargs): ...


@pytest.mark.parametrize("empty", [raises_not_implemented, returns_none, only_dots])
def test_an_empty_answer_gets_a_hint(exercise, empty, capsys):
    empty = as_student(empty, exercise.name)
    assert checks.check(empty) is exercise.reference
    shown = capsys.readouterr().out
    assert "not written yet" in shown
    assert exercise.hint in shown
    assert not checks.passed(exercise.name)


def test_an_error_is_quoted_with_its_line(exercise, capsys):
    def broken(*args, **kwargs):
        raise ZeroDivisionError("my own slip")

    assert checks.check(named(exercise.name, broken)) is exercise.reference
    shown = capsys.readouterr().out
    assert "ZeroDivisionError: my own slip" in shown
    assert 'raise ZeroDivisionError("my own slip")' in shown


def test_the_wrong_number_of_arguments_is_explained(exercise, capsys):
    def too_many(a, b, c, d, e, f, g, h, i, j):
        return a

    assert checks.check(named(exercise.name, too_many)) is exercise.reference
    assert "it has to take" in capsys.readouterr().out


def test_the_reference_itself_is_not_a_students_answer(exercise, capsys):
    checks.check(as_student(returns_none, exercise.name))
    assert checks.check(exercise.reference) is exercise.reference
    assert not checks.passed(exercise.name)
    assert "library's version" in capsys.readouterr().out


@pytest.mark.parametrize("what", [None, 3, "recall_at_k", lambda: 0, print, float("nan"), [1, 2]])
def test_check_never_raises(what, capsys):
    assert checks.check(what) is what
    assert "✗" in capsys.readouterr().out
