"""Start, ramp and power law."""

import pytest

from w2s_train.schedule import Schedule, check_reached, whole_steps


def factors(schedule: Schedule, steps: list[int], **plan: int) -> list[float]:
    """Of a plan of 100 steps."""
    planned = schedule.plan(**{"total": 100, "last": 100} | plan)
    return [planned.factor(step, 100) for step in steps]


def test_constant_from_the_first_step():
    unknown = Schedule().plan(None, None)
    assert [unknown.factor(step, None) for step in (0, 1, 10**6)] == [1, 1, 1]


def test_start_and_ramp():
    schedule = Schedule(start_step=10, ramp_steps=4)
    assert factors(schedule, [0, 9, 10, 11, 13, 14, 90]) == [0, 0, 0, 0.25, 0.75, 1, 1]
    # A source that can predict later starts, and ramps, later.
    assert factors(schedule, [19, 20, 22], not_before=20) == [0, 0, 0.5]


def test_shares_are_of_the_plan():
    schedule = Schedule(start_step=0.25, ramp_steps=0.1)
    assert factors(schedule, [24, 25, 30, 35]) == [0, 0, 0.5, 1]
    assert factors(schedule, [29], last=30) == factors(schedule, [29])
    assert whole_steps("step", 0.01, 6) == 1


def test_alpha():
    """(step / total)^alpha, with 0^0 = 1 as in the reference; constant after the end."""
    assert factors(Schedule(alpha=0.0), [0]) == [1]
    assert factors(Schedule(alpha=0.5), [0, 25]) == [0, 0.5]
    assert factors(Schedule(alpha=2.0), [50, 200]) == [0.25, 1]


@pytest.mark.parametrize(
    "options", [{"start_step": -1}, {"start_step": 1.5}, {"ramp_steps": -0.1}, {"alpha": -1.0}]
)
def test_bad_schedules(options: dict):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}="):
        Schedule(**options)


def test_shares_and_alpha_need_a_length():
    late = (Schedule(3, alpha=1.0), Schedule(3, ramp_steps=0.5))  # checked before step 3
    for schedule in (Schedule(start_step=0.5), Schedule(alpha=1.0), *late):
        with pytest.raises(ValueError, match="max_steps"):
            schedule.plan(None, None)


def test_steps_after_the_last_one():
    check_reached("start_step", 99, 99, last=100)
    with pytest.raises(
        ValueError,
        match="start_step=100: .* must come before the last step, 100",
    ):
        Schedule(start_step=100).plan(100, 100)
    with pytest.warns(UserWarning, match="start_step=0.5: is step 50 of the plan"):
        Schedule(start_step=0.5).plan(total=100, last=20)
