"""The SLURM scripts of docs/slurm, run by bash: `srun` and `scontrol` are stood in for by two lines of shell."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

SLURM = Path(__file__).resolve().parents[2] / "docs" / "slurm"
SCRIPTS = sorted(path.name for path in SLURM.glob("*.sbatch"))

# What srun does for these scripts: drop its own options, start every task with its numbers, return the worst status.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
pids=()
for ((i = 0; i < SLURM_NTASKS; i++)); do SLURM_PROCID=$i SLURM_LOCALID=0 "$@" & pids+=($!); done
status=0
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit $status
"""
SCONTROL = """#!/bin/bash
echo "$@" >> "$SCONTROL_LOG"
[[ $1 == show ]] && echo localhost
exit 0
"""


@pytest.fixture
def run_script(tmp_path):
    """Function that runs a script as a job of two nodes with one process each."""
    commands = tmp_path / "bin"
    commands.mkdir()

    def run(script: str, *arguments, srun: str = SRUN) -> subprocess.CompletedProcess:
        for name, text in (("srun", srun), ("scontrol", SCONTROL)):
            (commands / name).write_text(text)
            (commands / name).chmod(0o755)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "2"}
        environment = {
            **os.environ,
            **job,
            "SLURM_GPUS_ON_NODE": "1",
            "MASTER_PORT": str(port),
            "SCONTROL_LOG": str(tmp_path / "scontrol.log"),
            "PATH": f"{commands}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HF_DATASETS_OFFLINE": "1",
        }
        command = ["bash", str(SLURM / script), *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, cwd=tmp_path)

    return run


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_script_trains_on_two_nodes(script, run_script, on_tiny_model, logged_metrics, tmp_path):
    config = tmp_path / "config.yaml"
    OmegaConf.save(on_tiny_model("llama3_3/70B_gmt_multinode", tmp_path / "out"), config)
    job = run_script(script, config, "batch_size=1")
    assert job.returncode == 0, job.stdout[-2000:] + job.stderr[-4000:]
    assert len(logged_metrics(tmp_path / "out")) == 2
    assert "requeue" not in (tmp_path / "scontrol.log").read_text()


@pytest.mark.parametrize(("status", "returned", "requeued"), [(138, 0, True), (1, 1, False), (0, 0, False)])
def test_job_queues_again_only_when_it_was_told_to_stop(status, returned, requeued, run_script, tmp_path):
    srun = f"#!/bin/bash\nexit {status}\n"
    assert run_script("gmt_full_finetune.sbatch", "llama2/7B_gmt", srun=srun).returncode == returned
    assert ("requeue 7" in (tmp_path / "scontrol.log").read_text()) == requeued


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_asks_for_a_config(script, run_script):
    job = run_script(script)
    assert job.returncode != 0 and "the first argument must be a config" in job.stderr
