"""A release of the chart on a real API server, with real coordinators and workers as its pods: evicted, cut off
with their node, more, fewer, without their leader; and at the end the bits of a run that nothing disturbed.

usage: kube.py CHART PROGRAMS CONTROL_PLANE HELM_4 HELM_3
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from control_plane import ApiError, ControlPlane
from kubelet import NAMESPACE, Kubelets

STEPS = 160
RECIPE = {"max_steps": STEPS, "virtual_ranks": 4, "batch_size": 2, "evaluate_every_epochs": 0, "checkpoint.every_steps": 20,
          "elastic.max_recovery": "4s", "schedule.warmup_epochs": 0}
NODES = ["node-1", "node-2", "node-3", "node-4", "node-5"]
NODE_LOST = 12  # seconds without a word
PATIENCE = 150  # seconds for anything
# This API server is older than what the chart asks for: it drops what it does not know, such as podFailurePolicy.
OLD_CLUSTER = ["--disable-openapi-validation", "--server-side=false"]


class Play:
    """One run of the test: what it is played on, and what is asked of it."""

    def __init__(self, arguments, folder):
        chart, programs, control_plane, helm_4, helm_3 = map(pathlib.Path, arguments)
        self.folder, self.programs, self.helm_4, self.helm_3 = folder, programs, helm_4, helm_3
        self.shared = folder / "shared"
        self.shared.mkdir()
        self.chart = old_clusters_may(chart, folder)
        self.cluster = ControlPlane(folder / "cluster", control_plane, NODE_LOST)
        self.api = self.cluster.api()
        self.environment = {**os.environ, "KUBECONFIG": str(self.cluster.kubeconfig)}
        for name in ("HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"):
            self.environment[name] = str(folder / name.lower())
        self.recipe = folder / "recipe.toml"
        sets = [word for key, value in RECIPE.items() for word in ("--set", f"{key}={value}")]
        self.recipe.write_text(self.percheron("recipe", "show", "digits", *sets))
        (folder / "pods").mkdir()
        self.kubelets = Kubelets(self.cluster.api(), NODES, folder / "pods", programs)

    def close(self):
        if hasattr(self, "kubelets"):
            self.kubelets.close()
        self.cluster.close()

    def percheron(self, *words):
        return subprocess.run([self.programs / "percheron", *map(str, words)], check=True, capture_output=True, text=True).stdout

    def helm(self, which, *words, namespace="default"):
        command = [which / "helm", *map(str, words), "--namespace", namespace]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise AssertionError(f"helm {words[0]} failed: {done.stderr}{done.stdout}")
        return done.stdout

    def values(self, workers_min, workers_max):
        location = str(self.shared)
        mount = json.dumps([{"name": "shared", "mountPath": location}])
        volume = json.dumps([{"name": "shared", "hostPath": {"path": location}}])
        return ["--set-file", f"run.recipe={self.recipe}", "--set", "run.name=toy", "--set", f"run.log={location}/log",
                "--set", f"run.checkpoints={location}/run", "--set", "auth.existingSecret=token",
                "--set", f"workers.min={workers_min}", "--set", f"workers.max={workers_max}",
                "--set", "workers.completionMode=NonIndexed", "--set", "workers.nodeLostSeconds=1", "--set", "probes.kind=tcp",
                "--set-json", f"extraVolumes={volume}", "--set-json", f"extraVolumeMounts={mount}"]

    def wait(self, what, holds):
        deadline = time.monotonic() + PATIENCE
        while True:
            if self.kubelets.error is not None:
                raise AssertionError("the nodes have failed") from self.kubelets.error
            found = holds()
            if found:
                return found
            if time.monotonic() > deadline:
                raise AssertionError(f"did not come about: {what}\n{self.describe()}")
            time.sleep(0.2)

    def describe(self):
        lines = [json.dumps(self.status()), f"ends: {self.kubelets.ends}"]
        for pod in self.pods():
            lines.append(f"{pod['metadata']['name']} on {pod['spec'].get('nodeName')}: {pod['status'].get('phase')}")
        for log in sorted((self.folder / "pods").glob("*.log")):
            lines += [f"--- {log.name}", *log.read_text(errors="replace").splitlines()[-12:]]
        return "\n".join(lines)

    def status(self):
        if not (self.shared / "log").exists():
            return {}
        asked = subprocess.run([self.programs / "percheron", "status", "--json", "--run-dir", self.shared / "log"],
                               capture_output=True, text=True)
        return json.loads(asked.stdout) if asked.returncode == 0 else {}

    def pods(self, component=None):
        selector = f"?labelSelector=app.kubernetes.io/component={component}" if component else ""
        return self.api.get(f"{NAMESPACE}/pods{selector}")["items"]

    def workers(self):
        """The workers that are there to stay, by name, with their nodes."""
        is_there = lambda pod: pod["status"].get("phase") == "Running" and "deletionTimestamp" not in pod["metadata"]
        return {pod["metadata"]["name"]: pod["spec"]["nodeName"] for pod in self.pods("worker") if is_there(pod)}

    def train_with(self, count, without=()):
        """Waits until `count` workers train, of which none is one of `without`; returns their names."""
        def holds():
            members = {member["name"] for member in self.status().get("members", [])}
            there = self.workers()
            return members if len(members) == count and members <= set(there) and not members & set(without) else None
        return self.wait(f"{count} workers train without {list(without)}", holds)

    def evict(self, pod):
        eviction = {"apiVersion": "policy/v1beta1", "kind": "Eviction", "metadata": {"name": pod, "namespace": "default"}}
        self.api.post(f"{NAMESPACE}/pods/{pod}/eviction", eviction)

    def may_be_evicted(self, workers):
        """Waits until the disruption budget says that so many workers may go."""
        path = "/apis/policy/v1beta1/namespaces/default/poddisruptionbudgets/demo-percheron-workers"
        self.wait(f"{workers} workers may be evicted", lambda: self.api.get(path).get("status", {}).get("disruptionsAllowed") == workers)

    def forget_node(self, node):
        """What a cloud does when a machine is gone for good."""
        self.api.delete(f"/api/v1/nodes/{node}")
        for pod in self.pods():
            if pod["spec"].get("nodeName") == node:
                self.api.delete(f"{NAMESPACE}/pods/{pod['metadata']['name']}", grace=0)

    def end_of(self, pod):
        return self.wait(f"{pod} ends", lambda: next((end for end in self.kubelets.ends if end[0] == pod), None))


def old_clusters_may(chart, folder):
    """The chart, without its bound on the cluster's version: this one is older."""
    copy = folder / "chart"
    shutil.copytree(chart, copy)
    file = copy / "Chart.yaml"
    file.write_text("".join(line for line in file.read_text().splitlines(True) if not line.startswith("kubeVersion:")))
    return copy


def play(test):
    seconds = {}
    def lap(name, since):
        seconds[name] = round(time.monotonic() - since, 1)
        print(f"kube: {name}: {seconds[name]} s, step {test.status().get('step')}", flush=True)

    token = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "token"}, "stringData": {"token": os.urandom(32).hex()}}
    test.api.post(f"{NAMESPACE}/secrets", token)
    began = time.monotonic()
    test.helm(test.helm_4, "install", "demo", test.chart, *OLD_CLUSTER, *test.values(2, 3))
    members = test.train_with(3)
    lap("installed, three workers train", began)

    began = time.monotonic()
    evicted = sorted(members)[0]
    repeated = test.status()["repeated_steps"]
    test.may_be_evicted(1)
    test.evict(evicted)
    name, code, took = test.end_of(evicted)
    assert code == 75, f"an evicted worker ended with {code}"
    members = test.train_with(3, without=[evicted])
    assert test.status()["repeated_steps"] == repeated, "an eviction has cost steps"
    lap("one evicted and replaced", began)
    seconds["from SIGTERM to the end"] = round(took, 2)

    began = time.monotonic()
    victim = sorted(members)[0]
    dead = test.workers()[victim]
    test.kubelets.kill_node(dead)
    lost = [name for name, node in test.workers().items() if not test.kubelets.alive[node]]
    test.train_with(3, without=lost)
    lap("a node dead, its workers replaced", began)
    assert test.status()["repeated_steps"] <= repeated + 1, "more than the step in flight was repeated"
    test.forget_node(dead)

    began = time.monotonic()
    test.helm(test.helm_4, "upgrade", "demo", test.chart, *OLD_CLUSTER, *test.values(2, 4))
    test.train_with(4)
    lap("one more", began)
    began = time.monotonic()
    test.helm(test.helm_4, "upgrade", "demo", test.chart, *OLD_CLUSTER, *test.values(2, 2))
    members = test.train_with(2)
    lap("two fewer", began)
    test.may_be_evicted(0)
    try:
        test.evict(sorted(members)[0])
        raise AssertionError("the disruption budget lets a worker go that the run needs")
    except ApiError as error:
        assert error.status == 429, error

    began = time.monotonic()
    ends = len(test.kubelets.ends)
    leader = next(pod["metadata"]["name"] for pod in test.pods("coordinator") if leads(test, pod))
    with test.kubelets.lock:
        container = next(one for one in test.kubelets.containers.values() if one.name == leader and one.process.poll() is None)
        container.process.send_signal(signal.SIGKILL)
    test.wait("the leader is started again", lambda: any(end[0] == leader for end in test.kubelets.ends[ends:]))
    status = test.wait("the run is finished", lambda: (lambda s: s if s.get("state") == "finished" else None)(test.status()))
    lap("without its leader, and to the end", began)

    test.wait("the workers end", lambda: not test.workers())
    job = test.api.get("/apis/batch/v1/namespaces/default/jobs/demo-percheron-workers")["status"]
    assert job.get("succeeded", 0) >= 1, job
    assert len([pod for pod in test.pods("coordinator") if pod["status"]["phase"] == "Running"]) == 2
    audit = test.percheron("audit", test.shared / "log") if (test.shared / "log").exists() else ""
    assert f"steps 1 to {STEPS} of {STEPS} adopted once each, in order" in audit, audit
    test.helm(test.helm_4, "test", "demo")
    test.helm(test.helm_4, "uninstall", "demo")
    test.wait("nothing is left of the release", lambda: not test.pods() and not left_over(test))
    return status, seconds


def leads(test, pod):
    """Who listens leads: a coordinator that stands by refuses connections."""
    import socket
    with socket.socket() as connection:
        connection.settimeout(1)
        return connection.connect_ex((test.kubelets.address(pod["metadata"]["name"]), 7070)) == 0


def left_over(test):
    kinds = ["/apis/batch/v1/namespaces/default/jobs", "/apis/apps/v1/namespaces/default/statefulsets", f"{NAMESPACE}/configmaps",
             "/apis/networking.k8s.io/v1/namespaces/default/networkpolicies", f"{NAMESPACE}/serviceaccounts",
             "/apis/policy/v1beta1/namespaces/default/poddisruptionbudgets"]
    names = [item["metadata"]["name"] for kind in kinds for item in test.api.get(kind)["items"]]
    return [name for name in names if name.startswith("demo")]


def play_with_helm_3(test):
    """What the older helm does with the same chart, in a namespace without nodes."""
    test.api.post("/api/v1/namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "other"}})
    jobs = "/apis/batch/v1/namespaces/other/jobs"
    for verb, workers in (("install", 3), ("upgrade", 5)):
        test.helm(test.helm_3, verb, "demo", test.chart, OLD_CLUSTER[0], *test.values(2, workers), namespace="other")
        assert [job["spec"]["parallelism"] for job in test.api.get(jobs)["items"]] == [workers]
    test.helm(test.helm_3, "uninstall", "demo", namespace="other")
    assert test.api.get(jobs)["items"] == []


def undisturbed(test):
    """The final state of a run on which nothing happens."""
    words = ["up", "--recipe", test.recipe, "--workers", "1", "--run-dir", test.folder / "undisturbed", "--json"]
    return json.loads(test.percheron(*words).splitlines()[-1])["state_sha256"]


def main():
    if len(sys.argv) != 6:
        sys.exit(__doc__)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="pk") as folder:
        test = Play(sys.argv[1:], pathlib.Path(folder))
        try:
            status, seconds = play(test)
            play_with_helm_3(test)
        finally:
            test.close()
        wanted = undisturbed(test)
        assert status["state_sha256"] == wanted, f"{status['state_sha256']} and not {wanted}"
    print(json.dumps({"state_sha256": wanted, "steps": STEPS, "repeated_steps": status["repeated_steps"],
                      "seconds": {**seconds, "all": round(time.monotonic() - began, 1)}}))


if __name__ == "__main__":
    main()
