"""A real Slurm cluster on this machine, below one folder: munged, slurmctld, and a slurmd for each node.

Two partitions of the same nodes: jobs of `main` take nodes from jobs of `spot`, which get the signal that
they asked for, ten seconds, SIGTERM, and are requeued. Needs root: slurmd starts other people's processes.
"""

import os
import pathlib
import signal
import socket
import subprocess
import time

PATIENCE = 40  # seconds


class SlurmCluster:
    def __init__(self, folder, nodes):
        self.folder = pathlib.Path(folder)
        self.nodes, self.daemons = [f"n{number + 1}" for number in range(nodes)], {}
        for name in ("run", "log", "state", "spool", "munge", "dev"):
            (self.folder / name).mkdir(parents=True)
        self.environment = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf"),
                            "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}
        try:
            self._start_munge()
            self._write_settings(free_ports(nodes + 1))
            self._spawn("slurmctld", "slurmctld", "-D", "-f", self.environment["SLURM_CONF"])
            for node in self.nodes:
                self.start_node(node)
            self.wait("all nodes are idle", lambda: set(self.idle()) == set(self.nodes))
        except BaseException:
            self.close()
            raise

    def _start_munge(self):
        (self.folder / "munge").chmod(0o711)
        key = self.folder / "munge/key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        munge = self.folder / "munge"
        self._spawn("munged", "munged", "--foreground", "--force", f"--socket={munge}/socket", f"--key-file={key}",
                    f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed")
        self.wait("munged answers", (munge / "socket").exists)

    def _write_settings(self, ports):
        for number in (0, 1):  # Slurm wants device files for what it counts as GPUs.
            os.mknod(self.folder / f"dev/gpu{number}", 0o666 | 0o020000, os.makedev(1, 3))
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/dev/gpu[0-1]\n")
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        host = socket.gethostname().split(".")[0]
        settings = {
            "ClusterName": "test", "SlurmctldHost": f"{host}(127.0.0.1)", "SlurmctldPort": ports[0],
            "SlurmUser": "root", "SlurmdUser": "root",
            "AuthType": "auth/munge", "CredType": "cred/munge",
            # Requeued jobs may start as soon as credentials of before are void.
            "AuthInfo": f"socket={self.folder}/munge/socket,cred_expire=6",
            "CommunicationParameters": "NoCtldInAddrAny,NoInAddrAny",
            "StateSaveLocation": self.folder / "state", "SlurmdSpoolDir": f"{self.folder}/spool/%n",
            "SlurmctldPidFile": self.folder / "run/slurmctld.pid", "SlurmdPidFile": f"{self.folder}/run/%n.pid",
            "SlurmctldLogFile": self.folder / "log/slurmctld.log", "SlurmdLogFile": f"{self.folder}/log/%n.log",
            "ProctrackType": "proctrack/linuxproc", "TaskPlugin": "task/none", "SwitchType": "switch/none",
            "JobAcctGatherType": "jobacct_gather/none", "AccountingStorageType": "accounting_storage/none",
            "MpiDefault": "none", "MailProg": "/bin/true", "ReturnToService": 2,
            "SlurmdTimeout": 6, "SlurmctldTimeout": 10, "MessageTimeout": 5, "KillWait": 8, "InactiveLimit": 0,
            "JobRequeue": 1, "SlurmdParameters": "config_overrides", "GresTypes": "gpu",
            "SchedulerType": "sched/backfill",
            "SchedulerParameters": "sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=2,defer_batch=no,preempt_send_user_signal",
            "SelectType": "select/cons_tres", "SelectTypeParameters": "CR_Core_Memory",
            "PreemptType": "preempt/partition_prio", "PreemptMode": "REQUEUE",
        }
        lines = [f"{name}={value}" for name, value in settings.items()]
        for node, port in zip(self.nodes, ports[1:]):
            lines.append(f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=4000 Gres=gpu:2 State=UNKNOWN")
        lines.append("PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF")
        lines.append("PartitionName=spot Nodes=ALL MaxTime=INFINITE PriorityTier=1 GraceTime=10")
        (self.folder / "slurm.conf").write_text("\n".join(lines) + "\n")

    def _spawn(self, name, *command):
        log = open(self.folder / "log" / f"{name}.out", "ab")
        self.daemons[name] = subprocess.Popen(list(map(str, command)), env=self.environment, stdin=subprocess.DEVNULL,
                                              stdout=log, stderr=log, start_new_session=True)

    def start_node(self, node):
        (self.folder / "spool" / node).mkdir(exist_ok=True)
        self._spawn(node, "slurmd", "-D", "-N", node, "-f", self.environment["SLURM_CONF"])

    def kill_node(self, node):
        """The machine is gone, and with it all that ran there."""
        daemon = self.daemons.pop(node)
        daemon.kill()
        daemon.wait()
        self._kill_jobs(node)

    def _kill_jobs(self, node=None):
        """What Slurm has started, on one node or on all, and the daemons that look after it."""
        ours = {f"SLURM_CONF={self.environment['SLURM_CONF']}".encode()}
        if node is not None:
            ours.add(f"SLURMD_NODENAME={node}".encode())
        daemons, jobs = set(), set()
        for entry in pathlib.Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                variables = set((entry / "environ").read_bytes().split(b"\0"))
                named = any(variable.startswith(b"SLURMD_NODENAME=") for variable in variables)
                if ours <= variables and named:
                    jobs.add(int(entry.name))
                    parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                    if pathlib.Path(f"/proc/{parent}/comm").read_text().startswith("slurmstepd"):
                        daemons.add(parent)
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue  # It has just ended, or is none of ours.
        for process in [*daemons, *jobs]:  # A daemon that sees its job die would still tell.
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                pass  # It has just ended.

    def run(self, *command, check=True):
        done = subprocess.run(list(map(str, command)), env=self.environment, capture_output=True, text=True)
        if check and done.returncode != 0:
            raise AssertionError(f"{command[0]} failed: {done.stderr}{done.stdout}")
        return done.stdout

    def idle(self):
        return self.run("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N", check=False).split()

    def jobs(self):
        """(job, state, node) of all that have not ended; an array's tasks one by one."""
        lines = self.run("squeue", "-h", "-r", "-o", "%i|%T|%N").splitlines()
        return [tuple(line.split("|")) for line in lines]

    def wait(self, what, holds, patience=PATIENCE):
        deadline = time.monotonic() + patience
        while not (found := holds()):
            if time.monotonic() > deadline:
                logs = [log.read_text(errors="replace")[-2000:] for log in sorted(self.folder.glob("log/slurmctld.*"))]
                raise AssertionError(f"did not come about: {what}\n" + "\n".join(logs))
            time.sleep(0.2)
        return found

    def close(self):
        self._kill_jobs()
        for daemon in reversed(list(self.daemons.values())):
            daemon.terminate()
        for daemon in reversed(list(self.daemons.values())):
            try:
                daemon.wait(8)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._kill_jobs()


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
