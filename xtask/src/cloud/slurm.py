"""A run on a real Slurm cluster: submitted, a node lost, a worker preempted and back, the coordinator requeued to
another address; and at the end the bits of a run that nothing disturbed.

usage: slurm.py PROGRAMS
"""

import json
import pathlib
import subprocess
import sys
import tempfile
import time

from slurm_cluster import SlurmCluster

STEPS = 160
RECIPE = {"max_steps": STEPS, "virtual_ranks": 4, "batch_size": 2, "evaluate_every_epochs": 0, "checkpoint.every_steps": 20,
          "elastic.max_recovery": "4s", "schedule.warmup_epochs": 0}
PATIENCE = 150  # seconds for anything


class Play:
    def __init__(self, programs, folder):
        self.percheron, self.folder, self.dir = programs / "percheron", folder, folder / "run"
        self.recipe = folder / "recipe.toml"
        self.recipe.write_text(subprocess.run([self.percheron, "recipe", "show", "digits", *self.sets()], check=True,
                                              capture_output=True, text=True).stdout)
        self.cluster = SlurmCluster(folder / "slurm", nodes=5)

    def sets(self):
        return [word for key, value in RECIPE.items() for word in ("--set", f"{key}={value}")]

    def status(self):
        asked = subprocess.run([self.percheron, "status", "--json", "--run-dir", self.dir], capture_output=True, text=True)
        return json.loads(asked.stdout) if asked.returncode == 0 else {}

    def wait(self, what, holds):
        try:
            return self.cluster.wait(what, holds, PATIENCE)
        except AssertionError as error:
            logs = [f"--- {log.name}\n{log.read_text(errors='replace')[-1500:]}" for log in sorted(self.dir.glob("logs/*.log"))]
            raise AssertionError(f"{error}\n{self.status()}\n{self.cluster.jobs()}\n" + "\n".join(logs)) from error

    def train_with(self, count, without=()):
        """Waits until `count` workers train, of which none is one of `without`; returns their names."""
        def holds():
            members = {member["name"] for member in self.status().get("members", [])}
            return members if len(members) == count and not members & set(without) else None
        return self.wait(f"{count} workers train without {list(without)}", holds)


def node_of(worker):
    return worker.split("-")[0]


def play(test):
    cluster, seconds = test.cluster, {}

    def lap(name, since):
        seconds[name] = round(time.monotonic() - since, 1)
        print(f"slurm: {name}: {seconds[name]} s, step {test.status().get('step')}", flush=True)

    began = time.monotonic()
    submitted = json.loads(cluster.run(test.percheron, "slurm", "submit", "--json", "--run-dir", test.dir, "--recipe", test.recipe,
                                       "--nodes", "2-3", "--partition", "spot", "--coordinator-partition", "main",
                                       "--cpus-per-worker", "2", "--sbatch=--mem=500"))
    members = test.train_with(3)
    assert len({node_of(member) for member in members}) == 3, members
    lap("submitted, three nodes train", began)

    began = time.monotonic()
    lost = sorted(members)[0]
    cluster.kill_node(node_of(lost))
    members = test.train_with(3, without=[lost])
    lap("a node dead, its place requeued", began)
    assert test.status()["repeated_steps"] <= 1, "more than the step in flight was repeated"

    began = time.monotonic()
    repeated = test.status()["repeated_steps"]
    preempted = sorted(members)[0]
    other = cluster.run("sbatch", "--parsable", "--partition=main", f"--nodelist={node_of(preempted)}", "--exclusive",
                        "--output=/dev/null", "--wrap=sleep 600").strip()
    test.train_with(2, without=[preempted])
    assert test.status()["repeated_steps"] == repeated, "a preemption has cost steps"
    lap("one preempted, two go on", began)
    began = time.monotonic()
    cluster.run("scancel", other)
    members = test.train_with(3, without=[preempted])
    lap("the preempted one is back", began)

    began = time.monotonic()
    before = (test.dir / "coordinator.address").read_text()
    cluster.run("scontrol", "requeue", submitted["coordinator"])
    test.wait("the coordinator has moved", lambda: (test.dir / "coordinator.address").read_text() != before)
    lap("the coordinator is requeued to another address", began)

    began = time.monotonic()
    status = test.wait("the run is finished", lambda: (lambda s: s if s.get("state") == "finished" else None)(test.status()))
    test.wait("no job is left", lambda: not cluster.jobs())
    lap("to the end, and no job is left", began)
    audit = cluster.run(test.percheron, "audit", test.dir)
    assert f"steps 1 to {STEPS} of {STEPS} adopted once each, in order" in audit, audit
    return status, seconds


def play_refused(test):
    """A place whose worker is refused is not requeued."""
    refused = test.folder / "refused"
    test.cluster.run(test.percheron, "slurm", "submit", "--dry-run", "--run-dir", refused, "--recipe", test.recipe, "--nodes", "1",
                     "--cpus-per-worker", "1", "--sbatch=--mem=500")
    coordinator = test.cluster.run("sbatch", "--parsable", refused / "slurm/coordinator.sh").strip()
    test.wait("its coordinator listens", lambda: (refused / "coordinator.address").exists())
    (refused / "token").chmod(0o600)
    right = (refused / "token").read_text()
    (refused / "token").write_text("wrong\n")
    workers = test.cluster.run("sbatch", "--parsable", refused / "slurm/workers.sh").strip()
    test.wait("the refused one ends", lambda: not any(job.startswith(f"{workers}_") for job, *_ in test.cluster.jobs()))
    shown = test.cluster.run("scontrol", "show", "job", f"{workers}_1")
    assert "ExitCode=2:0" in shown and "Restarts=0" in shown, shown
    said = "".join(log.read_text() for log in refused.glob("logs/workers-*.log"))
    assert "refused: not requeued" in said and right not in said, said
    test.cluster.run("scancel", coordinator)


def undisturbed(test):
    """The final state of a run on which nothing happens."""
    words = [test.percheron, "up", "--recipe", test.recipe, "--workers", "1", "--run-dir", test.folder / "undisturbed", "--json"]
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])["state_sha256"]


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="ps") as folder:
        test = Play(pathlib.Path(sys.argv[1]), pathlib.Path(folder))
        try:
            status, seconds = play(test)
            play_refused(test)
        finally:
            test.cluster.close()
        wanted = undisturbed(test)
        assert status["state_sha256"] == wanted, f"{status['state_sha256']} and not {wanted}"
    print(json.dumps({"state_sha256": wanted, "steps": STEPS, "repeated_steps": status["repeated_steps"],
                      "seconds": {**seconds, "all": round(time.monotonic() - began, 1)}}))


if __name__ == "__main__":
    main()
