"""Functions that torch.compile leaves as they are: `torch.compiler.disable`, which loads dynamo only once something compiles.

`torch.compiler.disable` itself imports dynamo where a function is defined, which takes longer than to import torch.
"""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")


def uncompiled(reason: str) -> Callable[[Callable[Arguments, Returned]], Callable[Arguments, Returned]]:
    """Decorator of a function that runs in eager mode, also where its caller is compiled; the reason is for dynamo's log."""

    def decorate(function: Callable[Arguments, Returned]) -> Callable[Arguments, Returned]:
        @wraps(function)
        def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Returned:
            # true while dynamo traces, which it then stops here
            if torch.compiler.is_compiling():
                return torch.compiler.disable(function, reason=reason)(*args, **kwargs)
            return function(*args, **kwargs)

        return run

    return decorate
