"""Work in another thread, that holds up neither Ctrl-C nor the end of the program."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")


def start(work: Callable[[], Result]) -> Callable[[], Result]:
    """Starts on something that is needed later; what comes back waits for its result, or raises what it raised."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # whoever waits for the result gets it
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future.result
