"""When something that is done every n optimizer steps is due."""


def passed(before: int, now: int, every: int) -> bool:
    """Whether a multiple of `every` lies after step `before` and not after `now`; a batch may be several steps."""
    return now // every > before // every
