"""A real Kubernetes control plane on 127.0.0.1, below one folder: etcd, API server, controllers, scheduler.

There are no kubelets: whoever starts it says what happens on its nodes (`kubelet.py`).
"""

import http.client
import json
import pathlib
import secrets
import socket
import ssl
import subprocess
import time

START_MAX = 180  # seconds


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


class ControlPlane:
    """Runs until it is closed. A node that has not been heard of for `node_lost` seconds is given up."""

    def __init__(self, folder, programs, node_lost):
        self.folder, self.programs = pathlib.Path(folder), pathlib.Path(programs)
        self.token, self.processes = secrets.token_hex(16), []
        store, peers, self.port = free_port(), free_port(), free_port()
        self.folder.mkdir(parents=True, exist_ok=True)
        key = self.folder / "accounts.key"
        subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True)
        tokens = self.folder / "tokens.csv"
        tokens.write_text(f"{self.token},admin,admin,system:masters\n")
        tokens.chmod(0o600)
        try:
            self._start(store, peers, key, tokens, node_lost)
        except BaseException:
            self.close()
            raise

    def _start(self, store, peers, key, tokens, node_lost):
        peer = f"http://127.0.0.1:{peers}"
        self._spawn("etcd", "etcd", "--name=one", f"--data-dir={self.folder}/etcd", "--unsafe-no-fsync", "--logger=zap",
                    f"--listen-client-urls=http://127.0.0.1:{store}", f"--advertise-client-urls=http://127.0.0.1:{store}",
                    f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=one={peer}")
        issuer = "https://kubernetes.default.svc"
        self._spawn("apiserver", self.programs / "kube-apiserver", f"--etcd-servers=http://127.0.0.1:{store}",
                    "--bind-address=127.0.0.1", "--advertise-address=127.0.0.1", f"--secure-port={self.port}",
                    f"--cert-dir={self.folder}/certificates", f"--token-auth-file={tokens}", "--authorization-mode=RBAC",
                    "--anonymous-auth=false", f"--service-account-key-file={key}", f"--service-account-signing-key-file={key}",
                    f"--service-account-issuer={issuer}", f"--api-audiences={issuer}", "--service-cluster-ip-range=10.0.0.0/24",
                    "--endpoint-reconciler-type=none", "--disable-admission-plugins=ServiceAccount", "--profiling=false")
        self._wait("/readyz")
        certificate = self.folder / "certificates" / "apiserver.crt"
        self.kubeconfig = self.folder / "kubeconfig"
        self.kubeconfig.write_text(json.dumps({
            "apiVersion": "v1", "kind": "Config", "current-context": "one",
            "clusters": [{"name": "one", "cluster": {"server": f"https://127.0.0.1:{self.port}", "certificate-authority": str(certificate)}}],
            "users": [{"name": "admin", "user": {"token": self.token}}],
            "contexts": [{"name": "one", "context": {"cluster": "one", "user": "admin", "namespace": "default"}}],
        }))
        self.kubeconfig.chmod(0o600)
        self._spawn("controllers", self.programs / "kube-controller-manager", f"--kubeconfig={self.kubeconfig}", "--port=0",
                    "--secure-port=0", "--bind-address=127.0.0.1", "--leader-elect=false", "--use-service-account-credentials=true",
                    f"--service-account-private-key-file={key}", f"--node-monitor-grace-period={node_lost}s",
                    "--node-monitor-period=1s", f"--cert-dir={self.folder}/controllers",
                    "--controllers=*,-ttl,-bootstrapsigner,-tokencleaner")
        self._spawn("scheduler", self.programs / "kube-scheduler", f"--kubeconfig={self.kubeconfig}", "--port=0",
                    "--secure-port=0", "--bind-address=127.0.0.1", "--leader-elect=false")
        self._wait("/api/v1/namespaces/default")

    def _spawn(self, name, *command):
        log = open(self.folder / f"{name}.log", "wb")
        self.processes.append(subprocess.Popen(list(map(str, command)), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                               start_new_session=True))

    def _wait(self, path):
        deadline = time.monotonic() + START_MAX
        while True:
            try:
                if self.api().get(path, text=True) is not None:
                    return
            except (OSError, http.client.HTTPException, ApiError) as error:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"the API server does not come up; see {self.folder}/apiserver.log") from error
            if self.processes[-1].poll() is not None:
                raise RuntimeError(f"a server ended; see the logs in {self.folder}")
            time.sleep(0.1)

    def api(self):
        return Api(self.port, self.token)

    def close(self):
        for process in reversed(self.processes):
            process.terminate()
        for process in reversed(self.processes):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class ApiError(Exception):
    def __init__(self, status, body):
        super().__init__(f"{status}: {body[:300]}")
        self.status = status


class Api:
    """One connection to the API server; for one thread."""

    def __init__(self, port, token):
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # Our own process, on this machine.
        self.connection = http.client.HTTPSConnection("127.0.0.1", port, timeout=20, context=context)
        self.headers = {"Authorization": f"Bearer {token}"}

    def call(self, method, path, body=None, kind="application/json"):
        data = None if body is None else json.dumps(body)
        self.connection.request(method, path, data, {**self.headers, "Content-Type": kind})
        response = self.connection.getresponse()
        text = response.read().decode()
        if response.status >= 300:
            raise ApiError(response.status, text)
        return text

    def get(self, path, text=False):
        answer = self.call("GET", path)
        return answer if text else json.loads(answer)

    def post(self, path, body):
        return json.loads(self.call("POST", path, body))

    def patch(self, path, body):
        return self.call("PATCH", path, body, "application/strategic-merge-patch+json")

    def delete(self, path, grace=None):
        body = {} if grace is None else {"gracePeriodSeconds": grace}
        return self.call("DELETE", path, body)
