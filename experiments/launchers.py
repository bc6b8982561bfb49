"""What a run of `launch.py` is as commands: on this machine, on TPU VMs, with Slurm, on GKE."""

import argparse
import hashlib
import json
import math
import re
import shlex
import socket
import sys
from dataclasses import dataclass, field

from sora_jax.errors import InputError

_SLURM_SIGNAL = 65535  # seconds before the end at which sbatch can send a signal, at most


@dataclass(frozen=True)
class Run:
    """One training: its name and the words that follow `sora-jax`."""

    name: str
    arguments: list[str]


@dataclass(frozen=True)
class Command:
    """What is typed into a shell."""

    words: list[str]
    text: str = ""  # what it reads
    environment: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        words = [f"{name}={value}" for name, value in self.environment.items()] + [shlex.join(self.words)]
        return " ".join(words) + (f" <<'EOF'\n{self.text}EOF" if self.text else "")


def on_this_machine(run: Run, processes: int) -> list[Command]:
    """A command for each process. Several find one another by what `sora-jax train` reads from the environment."""
    words = [sys.executable, "-m", "sora_jax", *run.arguments]
    if processes == 1:
        return [Command(words, environment={"JAX_NUM_PROCESSES": "1"})]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    common = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    # Each has one GPU, if there are any: JAX would give all to all of them.
    own = [{"JAX_PROCESS_ID": str(index), "JAX_LOCAL_DEVICE_IDS": str(index)} for index in range(processes)]
    return [Command(words, environment=common | one) for one in own]


def on_tpu_vm(run: Run, options: argparse.Namespace, name: str) -> Command:
    """https://cloud.google.com/sdk/gcloud/reference/compute/tpus/tpu-vm/ssh; JAX finds the hosts of a pod itself."""
    if not re.fullmatch(r"[a-zA-Z][-\w]*", name):
        raise InputError(f"--on tpu-vm={name}: a TPU VM's name begins with a letter; letters, digits and dashes follow")
    where = [f"--zone={options.zone}"] if options.zone else []
    folder = f"cd {_home_path(options.folder)} && " if options.folder else ""
    # The shell of such a command has not read the profile that knows where pip puts scripts.
    train = f"{folder}{_home_path(options.python)} {shlex.join(['-m', 'sora_jax', *run.arguments])}"
    return Command(["gcloud", "compute", "tpus", "tpu-vm", "ssh", name, *where, "--worker=all", f"--command={train}"])


def _home_path(path: str) -> str:
    """A path for the shell of a host, which knows what ~ is there."""
    return f"~/{shlex.quote(path[2:])}" if path.startswith("~/") and path[2:] else shlex.quote(path)


def on_slurm(run: Run, options: argparse.Namespace) -> Command:
    """https://slurm.schedmd.com/sbatch.html and srun.html; JAX finds the tasks itself and gives each of them one GPU.

    SIGTERM comes before the time is up, so that the run is saved; a requeued job goes on from there.
    """
    if options.grace > _SLURM_SIGNAL // 2:
        raise InputError(
            f"--grace {options.grace}: Slurm signals at most {_SLURM_SIGNAL} s before the end; half is ours"
        )
    gpus = [f"--gpus-per-node={options.gpus_per_node}"] if options.gpus_per_node else []
    settings = [
        f"--job-name={run.name}",
        f"--nodes={options.nodes}",
        f"--ntasks-per-node={options.gpus_per_node or 1}",
        *gpus,
        f"--output={f'{options.runs}/{run.name}'.replace('%', '%%')}-%j.out",
        "--open-mode=append",
        "--requeue",
        f"--signal=TERM@{2 * options.grace}",
        *[f"--{setting.lstrip('-')}" for setting in options.sbatch],
    ]
    lines = [f"#SBATCH {_sbatch_word(setting)}\n" for setting in settings]
    srun = shlex.join(["srun", "--kill-on-bad-exit=1", "sora-jax", *run.arguments])
    # srun does not take over the cores of a task from sbatch (since 22.05).
    cores = "export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}"
    return Command(["sbatch"], "#!/bin/bash\n" + "".join(lines) + f"\n{cores}\n{srun}\n")


def _sbatch_word(setting: str) -> str:
    """An option as sbatch reads it in a script: outside of quotes, space ends it and # begins a comment."""
    name, equals, value = setting.partition("=")
    if "\n" in setting:
        raise InputError(f"--sbatch {setting!r}: an option is one line")
    if re.search(r"[^\w./:,=+@%-]", value):
        value = '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'
    return f"{name}{equals}{value}"


def on_gke(run: Run, options: argparse.Namespace) -> Command:
    """A JobSet with a pod on each host of a TPU slice, as JSON, which kubectl reads like YAML.

    https://cloud.google.com/kubernetes-engine/docs/how-to/tpu-multislice has the node selectors and the limits,
    https://jobset.sigs.k8s.io/docs/concepts the rest. GKE tells JAX the names of the hosts.
    """
    if not options.image or not options.claim:
        raise InputError("--on gke needs --image and --claim, a volume claim that is mounted at --runs")
    if not options.runs.startswith("/"):
        raise InputError(f"--on gke needs --runs from the root on, such as /mnt/runs, not {options.runs}")
    chips = math.prod(int(side) for side in options.topology.split("x"))
    if chips % options.chips_per_host:
        raise InputError(f"--topology {options.topology} has {chips} chips; {options.chips_per_host} are on a host")
    hosts = chips // options.chips_per_host
    container = {
        "name": "train",
        "image": options.image,
        "command": ["sora-jax", *run.arguments],
        "ports": [{"containerPort": 8471}],  # TPU hosts talk to one another here
        "resources": {"limits": {"google.com/tpu": options.chips_per_host}},
        "volumeMounts": [{"name": "runs", "mountPath": options.runs}],
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": options.grace,
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": options.tpu,
            "cloud.google.com/gke-tpu-topology": options.topology,
        },
        "containers": [container],
        "volumes": [{"name": "runs", "persistentVolumeClaim": {"claimName": options.claim}}],
    }
    job = {
        "completionMode": "Indexed",
        "parallelism": hosts,
        "completions": hosts,
        "backoffLimit": 0,  # one pod that fails ends all; the set starts them again
        "template": {"spec": pod},
    }
    manifest = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": kubernetes_name(run.name),
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {"maxRestarts": options.restarts},
            "replicatedJobs": [{"name": "slice", "replicas": 1, "template": {"spec": job}}],
        },
    }
    return Command(["kubectl", "apply", "-f", "-"], json.dumps(manifest, indent=2) + "\n")


def kubernetes_name(name: str) -> str:
    """A letter, then lower-case letters, digits and dashes, short enough for the names of pods made from it."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not re.match("[a-z]", plain):
        plain = f"run-{plain}".strip("-")
    if len(plain) <= 40 and plain == re.sub("[_=]", "-", name):
        return plain
    # What was left out may be all that tells two runs apart.
    return f"{plain[:33].strip('-')}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
