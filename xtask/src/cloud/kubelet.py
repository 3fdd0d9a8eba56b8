"""What happens on the nodes of a control plane: the processes of its pods, started for real on this machine.

Each pod has an address of its own on the loopback network. Names of pods in arguments are replaced by those
addresses, for there is no DNS, and mounted paths by folders, for there are no containers; all else is what the
manifests say: commands, variables, volumes, probes, signals and their deadlines.
"""

import base64
import datetime
import os
import pathlib
import re
import secrets
import signal
import socket
import subprocess
import threading
import time

from control_plane import ApiError

NAMESPACE = "/api/v1/namespaces/default"
BEAT = 1.0  # seconds
LOOK = 0.15


def now():
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


class Kubelets:
    """All nodes at once, in one thread."""

    def __init__(self, api, nodes, folder, programs):
        self.api, self.folder, self.programs = api, pathlib.Path(folder), pathlib.Path(programs)
        self.alive, self.beaten = {node: True for node in nodes}, {}
        self.network = f"127.{secrets.randbelow(200) + 20}"
        self.addresses, self.containers, self.gone = {}, {}, set()
        self.ends = []  # (pod, exit code or minus the signal, seconds since it was asked to stop or None)
        self.lock, self.ending, self.error = threading.Lock(), False, None
        for node in nodes:
            resources = {"cpu": "16", "memory": "64Gi", "pods": "20"}
            self.api.post("/api/v1/nodes", {"apiVersion": "v1", "kind": "Node", "metadata": {"name": node, "labels": {"kubernetes.io/hostname": node}}})
            self.api.patch(f"/api/v1/nodes/{node}/status", {"status": {"capacity": resources, "allocatable": resources}})
        self.thread = threading.Thread(target=self._live, daemon=True)
        self.thread.start()

    def kill_node(self, node):
        """The machine is gone: its processes too, and nobody says so."""
        with self.lock:
            self.alive[node] = False
            for container in self.containers.values():
                if container.node == node:
                    container.kill()

    def close(self):
        self.ending = True
        self.thread.join()
        for container in self.containers.values():
            container.kill()

    def address(self, pod):
        if pod not in self.addresses:
            number = len(self.addresses) + 1
            self.addresses[pod] = f"{self.network}.{number // 250}.{number % 250 + 1}"
        return self.addresses[pod]

    def _live(self):
        try:
            while not self.ending:
                with self.lock:
                    self._beat()
                    self._look()
                time.sleep(LOOK)
        except Exception as error:  # Told to whoever waits for something.
            self.error = error
            raise

    def _beat(self):
        for node, alive in self.alive.items():
            if alive and time.monotonic() - self.beaten.get(node, -BEAT) >= BEAT:
                condition = {"type": "Ready", "status": "True", "reason": "Test", "message": "", "lastHeartbeatTime": now()}
                self.api.patch(f"/api/v1/nodes/{node}/status", {"status": {"conditions": [condition]}})
                self.beaten[node] = time.monotonic()

    def _look(self):
        pods = {pod["metadata"]["uid"]: pod for pod in self.api.get(f"{NAMESPACE}/pods")["items"]}
        for uid, pod in pods.items():
            if not self.alive.get(pod["spec"].get("nodeName"), False) or uid in self.gone:
                continue
            try:
                self._see_to(uid, pod)
            except ApiError as error:
                if error.status not in (404, 409):  # Deleted or changed just now: the next look tells.
                    raise

    def _see_to(self, uid, pod):
        container = self.containers.get(uid)
        name, meta = pod["metadata"]["name"], pod["metadata"]
        if container is None:
            if "deletionTimestamp" in meta:
                self._confirm(uid, name)
            elif pod["status"].get("phase") in (None, "Pending"):
                self.containers[uid] = Container(self, pod)
                self._report(pod, self.containers[uid])
            return
        code = container.process.poll()
        if "deletionTimestamp" in meta and code is None:
            container.ask_to_stop(meta["deletionGracePeriodSeconds"])
        elif code is None:
            if container.ready != container.probe():
                container.ready = not container.ready
                self._report(pod, container)
        else:
            asked = container.asked and time.monotonic() - container.asked
            self.ends.append((name, code, asked))
            if "deletionTimestamp" not in meta and pod["spec"]["restartPolicy"] == "Always":
                self.containers[uid] = Container(self, pod, container.restarts + 1)
                self._report(pod, self.containers[uid])
                return
            self.gone.add(uid)
            self._report(pod, container)
            if "deletionTimestamp" in meta:
                self._confirm(uid, name)

    def _confirm(self, uid, name):
        self.gone.add(uid)
        self.api.call("DELETE", f"{NAMESPACE}/pods/{name}", {"gracePeriodSeconds": 0, "preconditions": {"uid": uid}})

    def _report(self, pod, container):
        code = container.process.poll()
        if code is None:
            phase, state = "Running", {"running": {"startedAt": container.started}}
        else:
            phase = "Succeeded" if code == 0 else "Failed"
            terminated = {"exitCode": code if code >= 0 else 128 - code, "startedAt": container.started, "finishedAt": now()}
            state = {"terminated": terminated}
        ready = "True" if container.ready and code is None else "False"
        conditions = [{"type": kind, "status": status} for kind, status in
                      [("PodScheduled", "True"), ("Initialized", "True"), ("ContainersReady", ready), ("Ready", ready)]]
        status = {"phase": phase, "podIP": container.address, "podIPs": [{"ip": container.address}], "conditions": conditions,
                  "startTime": container.started,
                  "containerStatuses": [{"name": container.spec["name"], "image": container.spec["image"], "imageID": "", "state": state,
                                         "ready": ready == "True", "restartCount": container.restarts}]}
        self.api.patch(f"{NAMESPACE}/pods/{pod['metadata']['name']}/status", {"status": status, "metadata": {"uid": pod["metadata"]["uid"]}})

    def mounts(self, pod):
        """Where the paths of its only container lie on this machine."""
        folder, places = self.folder / pod["metadata"]["uid"], {}
        for volume in pod["spec"].get("volumes", []):
            if "hostPath" in volume:
                places[volume["name"]] = volume["hostPath"]["path"]
                continue
            place = folder / volume["name"]
            place.mkdir(parents=True, exist_ok=True)
            places[volume["name"]] = str(place)
            for source in volume.get("projected", {}).get("sources", []) or [volume]:
                self._fill(place, source)
        mounts = pod["spec"]["containers"][0].get("volumeMounts", [])
        return {mount["mountPath"]: places[mount["name"]] for mount in mounts}

    def _fill(self, place, source):
        if "configMap" in source:
            for key, text in self.api.get(f"{NAMESPACE}/configmaps/{source['configMap']['name']}")["data"].items():
                (place / key).write_text(text)
        if "secret" in source:
            secret = source["secret"]
            data = self.api.get(f"{NAMESPACE}/secrets/{secret.get('secretName', secret.get('name'))}")["data"]
            for item in secret["items"]:
                (place / item["path"]).write_bytes(base64.b64decode(data[item["key"]]))


class Container:
    """The one container of a pod, as a process."""

    def __init__(self, kubelets, pod, restarts=0):
        self.spec, self.node, self.restarts = pod["spec"]["containers"][0], pod["spec"]["nodeName"], restarts
        self.name, self.asked, self.started = pod["metadata"]["name"], None, now()
        self.address = kubelets.address(self.name)
        self.ready = "readinessProbe" not in self.spec
        mounts = kubelets.mounts(pod)
        fields = {"status.podIP": self.address, "metadata.name": self.name, "spec.nodeName": self.node}
        variables = {}
        for variable in self.spec.get("env", []):
            value = variable.get("value") if "value" in variable else fields[variable["valueFrom"]["fieldRef"]["fieldPath"]]
            value = re.sub(r"\$\((\w+)\)", lambda found: variables[found[1]], value)
            variables[variable["name"]] = in_places(value, mounts)
        words = [self._word(word, variables, mounts, kubelets) for word in self.spec["command"] + self.spec.get("args", [])]
        words[0] = str(kubelets.programs / words[0])
        log = open(kubelets.folder / f"{self.name}.log", "ab")
        inherited = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "HOME") if name in os.environ}
        self.process = subprocess.Popen(words, env={**inherited, **variables}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                        start_new_session=True)

    def _word(self, word, variables, mounts, kubelets):
        word = re.sub(r"\$\((\w+)\)", lambda found: variables[found[1]], word)
        word = re.sub(r"http://([a-z0-9-]+)\.[a-z0-9.-]+\.svc:", lambda found: f"http://{kubelets.address(found[1])}:", word)
        option, equals, value = word.partition("=")
        return option + equals + in_places(value, mounts) if equals else word

    def probe(self):
        probe = self.spec.get("readinessProbe")
        if probe is None:
            return True
        port = next(port["containerPort"] for port in self.spec["ports"] if port["name"] == probe["tcpSocket"]["port"])
        with socket.socket() as connection:
            connection.settimeout(1)
            return connection.connect_ex((self.address, port)) == 0

    def ask_to_stop(self, grace):
        if self.asked is None:
            self.asked = time.monotonic()
            self.process.send_signal(signal.SIGTERM)
        elif time.monotonic() - self.asked > grace:
            self.kill()

    def kill(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def in_places(value, mounts):
    """A path as it is on this machine: the longest mount that it is below of counts."""
    for mount in sorted(mounts, key=len, reverse=True):
        if value == mount or value.startswith(mount + "/"):
            return mounts[mount] + value[len(mount):]
    return value
