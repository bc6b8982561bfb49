"""`sora-jax check`, `verify` and `safety-eval`: what may be asked for, and what files say of themselves."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from sora_jax.cli.words import PROMPTS_HELP, prompts_of
from sora_jax.errors import Refused


def add_commands(commands: Any) -> None:
    check = commands.add_parser("check", help="what the prompt gate says of prompts", allow_abbrev=False)
    check.set_defaults(run=_check)
    check.add_argument("prompt", nargs="?", help="the prompt")
    check.add_argument("--prompts", metavar="FILE", help=PROMPTS_HELP)
    check.add_argument("--policy", metavar="FILE", help="a TOML file that changes the policy (see docs/safety.md)")
    check.add_argument("--json", action="store_true", help="print JSON, a list with one verdict per prompt")

    verify = commands.add_parser(
        "verify",
        help="what a file says of how it was made, and whether it was changed",
        allow_abbrev=False,
        epilog="Exit codes: 0 intact, by a signer that is known here; 4 intact, by one that is not; 5 changed since it "
        "was signed; 6 no manifest; 7 unchanged, but signed with a certificate that does not hold; 2 not readable.",
    )
    verify.set_defaults(run=_verify)
    verify.add_argument("file", metavar="FILE", help="a video or picture, ours or of others")
    verify.add_argument("--anchors", metavar="PEM", help="root certificates to trust besides this installation's own")
    verify.add_argument("--json", action="store_true", help="print JSON")

    measure = commands.add_parser("safety-eval", help="measure the prompt gate on frozen prompts", allow_abbrev=False)
    measure.set_defaults(run=_measure)
    measure.add_argument("-o", "--out", metavar="DIR", help="folder for the report (default: print it)")


def _check(options: argparse.Namespace) -> None:
    from sora_jax.safety.gate import check_prompts, load_gate
    from sora_jax.safety.policy import load_policy

    prompts = prompts_of(options)
    check_prompts(prompts)
    gate = load_gate(load_policy(options.policy))
    verdicts = gate.check_many(prompts)
    if options.json:
        print(json.dumps([{"prompt": p, **dataclasses.asdict(v)} for p, v in zip(prompts, verdicts, strict=True)]))
    else:
        for verdict in verdicts:
            why = f"refused: {', '.join(verdict.categories)}: {verdict.reason} (by {verdict.layer})"
            print("allowed" if verdict.allowed else why)
    refused = sum(not verdict.allowed for verdict in verdicts)
    if refused:
        raise Refused(f"{refused} of {len(verdicts)} prompts")


def _verify(options: argparse.Namespace) -> int:
    from sora_jax.safety.verify import verify

    found = verify(options.file, options.anchors)
    print(json.dumps(dataclasses.asdict(found)) if options.json else found.text)
    return found.exit_code


def _measure(options: argparse.Namespace) -> None:
    from sora_jax.safety.evaluation import safety_eval

    print(safety_eval(options.out)["text"])
