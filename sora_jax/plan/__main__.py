"""The process in which `compile.compile_part` has one program compiled."""

import json
import sys

from sora_jax.plan.compile import work
from sora_jax.plan.job import Job

values = json.loads(sys.argv[1])
work(Job(**{**values, "size": tuple(values["size"])}))
