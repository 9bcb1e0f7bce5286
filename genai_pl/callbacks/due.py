"""Intervals of optimizer steps: whether something that happens every n steps is due."""


def passed(before: int, now: int, every: int) -> bool:
    """Whether a multiple of `every` was reached after step `before`, up to step `now`; a batch may be several steps.

    >>> passed(4, 5, 5), passed(5, 6, 5), passed(3, 11, 5)
    (True, False, True)
    """
    return now // every > before // every
