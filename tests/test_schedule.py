"""Start, ramp and power law."""

import pytest

from w2s_train.schedule import Schedule, Timeline

RUN = Timeline(total=100, last=100)


def test_constant_from_the_first_step():
    assert [Schedule().factor(step, Timeline()) for step in (0, 1, 10**6)] == [1, 1, 1]


def test_start_and_ramp():
    schedule = Schedule(start_step=10, ramp_steps=4)
    factors = [schedule.factor(step, RUN) for step in (0, 9, 10, 11, 13, 14, 90)]
    assert factors == [0, 0, 0, 0.25, 0.75, 1, 1]
    # A source that can predict later starts, and ramps, later.
    assert [schedule.factor(step, RUN, not_before=20) for step in (19, 20, 22)] == [0, 0, 0.5]


def test_shares_are_of_the_plan():
    schedule = Schedule(start_step=0.25, ramp_steps=0.1)
    assert [schedule.factor(step, RUN) for step in (24, 25, 30, 35)] == [0, 0, 0.5, 1]
    short = Timeline(total=100, last=30)
    assert schedule.factor(29, short) == schedule.factor(29, RUN)
    assert Timeline(total=6).steps("step", 0.01) == 1


def test_alpha():
    """(step / total)^alpha, with 0^0 = 1 as in the reference; constant after the end."""
    assert Schedule(alpha=0.0).factor(0, RUN) == 1
    assert Schedule(alpha=0.5).factor(0, RUN) == 0
    assert Schedule(alpha=0.5).factor(25, RUN) == 0.5
    assert Schedule(alpha=2.0).factor(50, RUN) == 0.25
    assert Schedule(alpha=2.0).factor(200, RUN) == 1


@pytest.mark.parametrize(
    "options", [{"start_step": -1}, {"start_step": 1.5}, {"ramp_steps": -0.1}, {"alpha": -1.0}]
)
def test_bad_schedules(options: dict):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}="):
        Schedule(**options)


def test_shares_and_alpha_need_a_length():
    for schedule in (Schedule(start_step=0.5), Schedule(alpha=1.0)):
        with pytest.raises(ValueError, match="max_steps"):
            schedule.check(Timeline())
    for schedule in (Schedule(3, alpha=1.0), Schedule(3, ramp_steps=0.5)):  # checked before step 3
        with pytest.raises(ValueError, match="max_steps"):
            schedule.check(Timeline())


def test_steps_after_the_last_one():
    RUN.check("start_step", 99)
    with pytest.raises(
        ValueError,
        match="start_step=100: .* must come before the last step, 100",
    ):
        RUN.check("start_step", 100)
    with pytest.warns(UserWarning, match="start_step=0.5: is step 50 of the plan"):
        Timeline(total=100, last=20).check("start_step", 0.5)
