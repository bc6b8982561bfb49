"""The process in which `compile.compile_part` has one program compiled. It ends when that one does, however it ends."""

import json
import os
import sys
import threading

from sora_jax.plan.compile import work
from sora_jax.plan.job import Job


def _end_with_parent() -> None:
    sys.stdin.read()  # nothing is ever written to it
    os._exit(1)


threading.Thread(target=_end_with_parent, daemon=True).start()
values = json.loads(sys.argv[1])
work(Job(**{**values, "size": tuple(values["size"])}))
