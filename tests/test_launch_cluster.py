"""Real training on two nodes, and the ready files for clusters, with srun and scontrol faked."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from training_world import ROOT, free_ports, write_dataset, write_model

LAUNCHER = ROOT / "run_scripts" / "run_mcore_qwen.sh"
SBATCH = ROOT / "run_scripts" / "slurm.sbatch"
PYTORCHJOB = ROOT / "run_scripts" / "k8s-pytorchjob.yaml"
CLUSTER = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT", "KUBERNETES_CONTAINER_RESOURCE_GPU", "NPROC_PER_NODE")
# Starts what follows its own options once a node, as tasks of Slurm do, and passes its SIGTERM on.
SRUN = """#!/bin/sh
shift
trap 'kill -TERM $tasks' TERM
for node in 0 1; do SLURM_NODEID=$node "$@" & tasks="${tasks:-} $!"; done
for task in $tasks; do
    wait "$task" || code=$?
    while kill -0 "$task" 2>/dev/null; do wait "$task" || code=$?; done
done
exit "${code:-0}"
"""
SCONTROL = """#!/bin/sh
[ "$1" != show ] || printf 'node-a\\nnode-b\\n'
[ "$1" != requeue ] || echo "requeue $2" >>"$REQUEUED"
"""


def environment(**variables: str) -> dict[str, str]:
    keep = {name: value for name, value in os.environ.items() if name not in CLUSTER}
    return keep | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | variables


class Training:
    """Runs of the launcher on a tiny model at TP 2, each with its own output folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = write_model(folder / "model", num_hidden_layers=2)
        self.data = write_dataset(folder / "data", self.model, rows=60)

    def start(self, env: str, out: str, *, steps: int = 3, **variables: str) -> subprocess.Popen[str]:
        line = (
            f"{env} auto 2 8 1e-3 1e-4 64 64 fp32 2 1 1 true true true true false false 2 "
            f"{self.data} {self.data} {self.model} {steps} 1 {self.folder / out}"
        )
        command = ["sh", str(LAUNCHER), *shlex.split(line)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment(**variables), stdout=pipe, stderr=subprocess.STDOUT, text=True)

    def start_nodes(self, out: str, *, steps: int = 3) -> list[subprocess.Popen[str]]:
        (port,) = free_ports(1)
        cluster = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "NPROC_PER_NODE": "2"}
        cluster["SILENCE_TIMEOUT"] = "5"
        return [self.start("dlc", out, steps=steps, RANK=str(rank), **cluster) for rank in range(2)]

    def losses(self, out: str) -> list[float]:
        (metrics,) = (self.folder / out).glob("checkpoint/*/metrics.jsonl")
        return [step["loss"] for step in map(json.loads, metrics.read_text().splitlines()) if "loss" in step]


def test_two_nodes_of_two_ranks_train_as_one_node_of_four(tmp_path: Path) -> None:
    training = Training(tmp_path)
    nodes = training.start_nodes("cluster")
    said = [node.communicate(timeout=100)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "".join(said)
    assert "nodes    2 x 2 ranks, this is node 1; node 0 answers at localhost" in said[1]
    assert "done: " in said[0] and "done: " not in said[1]
    machine = training.start("dsw", "machine", NPROC_PER_NODE="4")
    said = machine.communicate(timeout=100)
    assert machine.returncode == 0, said
    assert len(training.losses("cluster")) == 3
    assert training.losses("cluster") == training.losses("machine")


@pytest.mark.full
@pytest.mark.parametrize("victim", [0, 1])
def test_a_pair_that_lost_a_node_goes_on_from_its_last_checkpoint(tmp_path: Path, victim: int) -> None:
    training, steps = Training(tmp_path), 20
    nodes = training.start_nodes("cluster", steps=steps)
    deadline = time.monotonic() + 100
    while not list((tmp_path / "cluster").glob("checkpoint/*/iter_*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    nodes[victim].kill()
    said = nodes[1 - victim].communicate(timeout=100)[0]
    assert nodes[1 - victim].returncode == 75 and f"node {victim} (" in said and "fell silent" in said
    nodes = training.start_nodes("cluster", steps=steps)
    said = [node.communicate(timeout=200)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0] and "going on from" in said[0]
    machine = training.start("dsw", "machine", steps=steps, NPROC_PER_NODE="4")
    assert machine.communicate(timeout=200) and machine.returncode == 0
    assert len(training.losses("machine")) == steps
    assert training.losses("cluster") == training.losses("machine")


class TestSlurm:
    """The batch script with a fake srun and scontrol, on two nodes."""

    @pytest.fixture(autouse=True)
    def tools(self, tmp_path: Path) -> None:
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (tmp_path / name).write_text(text)
            (tmp_path / name).chmod(0o755)
        self.requeued = tmp_path / "requeued"
        self.variables = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}", "REQUEUED": str(self.requeued), "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_GPUS_ON_NODE": "8",
        }  # fmt: skip

    def start(self, *line: str, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["sh", str(SBATCH), *line], env=environment(**self.variables, **variables), cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def test_syntax_and_options(self) -> None:
        subprocess.run(["sh", "-n", str(SBATCH)], check=True)
        head = SBATCH.read_text().split("set -eu")[0]
        for option in ("--ntasks-per-node=1", "--requeue", "--signal=B:TERM@120"):
            assert f"#SBATCH {option}\n" in head

    def test_every_node_gets_its_number_and_words_stay_whole(self, tmp_path: Path) -> None:
        script = tmp_path / "show.sh"
        script.write_text('echo "$RANK/$WORLD_SIZE $MASTER_ADDR:$MASTER_PORT [$1]"\n')
        out, _ = self.start(str(script), "a b").communicate(timeout=20)
        assert sorted(out.splitlines()) == [f"{rank}/2 node-a:23456 [a b]" for rank in range(2)]
        assert not self.requeued.exists()

    @pytest.mark.parametrize(("code", "again"), [(75, True), (3, False)])
    def test_only_75_goes_back_to_the_queue(self, tmp_path: Path, code: int, again: bool) -> None:
        (tmp_path / "end.sh").write_text(f"exit {code}\n")
        assert self.start(str(tmp_path / "end.sh")).wait(20) == code
        assert self.requeued.exists() == again
        if again:
            assert self.requeued.read_text() == "requeue 123456\n"

    def test_the_time_limit_lets_the_launchers_save(self, tmp_path: Path) -> None:
        script = tmp_path / "save.sh"
        script.write_text('trap "sleep 1; exit 75" TERM\ntouch "$UP/up-$RANK"\nwhile :; do sleep 0.1; done\n')
        job = self.start(str(script), UP=str(tmp_path))
        deadline = time.monotonic() + 20
        while len(list(tmp_path.glob("up-*"))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        job.send_signal(signal.SIGTERM)
        assert job.wait(20) == 75 and self.requeued.read_text() == "requeue 123456\n"

    def test_it_derives_the_line_that_kubernetes_does(self, tmp_path: Path) -> None:
        yaml = pytest.importorskip("yaml")
        job = yaml.safe_load(PYTORCHJOB.read_text())
        replicas = job["spec"]["pytorchReplicaSpecs"]
        assert job["kind"] == "PyTorchJob" and "nprocPerNode" not in job["spec"]
        shared = shared_folder(tmp_path)
        pods = [pod_line(replicas[role], shared, rank) for rank, role in enumerate(("Master", "Worker"))]
        container = replicas["Worker"]["template"]["spec"]["containers"][0]
        launcher = [*container["command"][1:], *rebased(container["args"], shared)]
        out, err = self.start(*launcher, DRY_RUN="1").communicate(timeout=60)
        lines = [shlex.split(line) for line in sorted(out.splitlines(), key=lambda line: "--node-rank=1" in line)]
        assert len(lines) == 2, err
        for rank, (here, there) in enumerate(zip(lines, pods, strict=True)):
            assert {"--nnodes=2", f"--node-rank={rank}", "--nproc-per-node=8"} <= set(here) & set(there)
            assert here[here.index("-m") :] == there[there.index("-m") :]
            assert "--master-addr=node-a" in here and "--master-addr=temper-master-0" in there


def shared_folder(tmp_path: Path) -> Path:
    """What the job's paths lead to: a 7B model's config and an empty dataset."""
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064,
        "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "torch_dtype": "bfloat16",
        "max_position_embeddings": 32768,
    }  # fmt: skip
    shared = tmp_path / "shared"
    (shared / "qwen").mkdir(parents=True)
    (shared / "qwen" / "config.json").write_text(json.dumps(config))
    for ending in (".bin", ".idx"):
        (shared / f"chats_text_document{ending}").touch()
    return shared


def rebased(line: list[str], shared: Path) -> list[str]:
    return [re.sub("^/shared", str(shared), word) for word in line]


def pod_line(replica: dict[str, Any], shared: Path, rank: int) -> list[str]:
    """Run a pod's command with the operator's variables and return the torchrun line that it prints."""
    (container,) = replica["template"]["spec"]["containers"]
    variables = {item["name"]: item["value"] for item in container["env"]}
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(variables["KUBERNETES_CONTAINER_RESOURCE_GPU"])
    operator = {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "temper-master-0", "MASTER_PORT": "23456"}
    done = subprocess.run(
        [*container["command"], *rebased(container["args"], shared)],
        env=environment(DRY_RUN="1", **variables, **operator),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)
