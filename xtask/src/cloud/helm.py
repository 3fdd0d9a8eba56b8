"""Checks the chart with real helm: lint, template over all values files, schemas, goldens, refusals.

usage: helm.py CHART [--update] HELM...
"""

import argparse
import difflib
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import yaml

import manifests

# What a person may get wrong, and a word of the message that says so.
REFUSED = {
    "no run is named": (["run.name="], "[a-z0-9._-]{0,58}"),
    "no secret is named": (["auth.existingSecret="], "existingSecret"),
    "a relative log": (["run.log=log"], "^(s3://"),
    "an unknown value": (["workers.count=3"], "count"),
    "more at least than at most": (["workers.min=9", "workers.max=8"], "min may not be above max"),
    "a JobSet that is not indexed": (["workers.kind=JobSet", "workers.completionMode=NonIndexed"], "Indexed"),
    "GPUs without a resource": (["workers.device=cuda", "workers.gpu.resource="], "workers.gpu.resource"),
    "a secret among the variables": (["store.env.AWS_SECRET_ACCESS_KEY=x"], "AWS_SECRET_ACCESS_KEY"),
    "a port of the system": (["coordinator.port=80"], "port"),
}


class Checks:
    def __init__(self):
        self.done, self.failed = 0, 0

    def expect(self, holds, what, detail=""):
        self.done += 1
        if not holds:
            self.failed += 1
            print(f"FAIL {what}{': ' if detail else ''}{detail}")


def helm(program, *arguments):
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True)


def normal(documents):
    """One text for what means the same, whichever helm wrote it."""
    ordered = sorted(documents, key=lambda document: (document["kind"], document["metadata"]["name"]))
    return yaml.safe_dump_all(ordered, sort_keys=True, width=110)


def check_values(checks, program, chart, values, update):
    golden = chart / "ci" / "golden" / values.name
    lint = helm(program, "lint", "--strict", chart, "--values", values)
    checks.expect(lint.returncode == 0, f"helm lint {values.name}", lint.stdout + lint.stderr)
    template = helm(program, "template", "demo", chart, "--namespace", "training", "--values", values)
    checks.expect(template.returncode == 0, f"helm template {values.name}", template.stderr)
    if template.returncode != 0:
        return
    documents = manifests.documents(template.stdout)
    for document in documents:
        found = manifests.problems(document) + manifests.rules(document)
        checks.expect(not found, f"{values.name}: {manifests.name(document)}", "; ".join(found))
    text = normal(documents)
    if update:
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    wanted = golden.read_text() if golden.exists() else ""
    lines = difflib.unified_diff(wanted.splitlines(), text.splitlines(), str(golden), "rendered", lineterm="")
    checks.expect(text == wanted, f"{values.name} is not its golden (--update writes it)", "\n" + "\n".join(lines))


def check_refusals(checks, program, chart, values):
    for what, (sets, word) in REFUSED.items():
        arguments = [part for pair in sets for part in ("--set", pair)]
        refused = helm(program, "template", "demo", chart, "--values", values, *arguments)
        checks.expect(refused.returncode != 0 and word in refused.stderr, f"{what} is not refused", refused.stderr)


def check_the_checks(checks):
    """A planted mistake of each kind is found."""
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "j"}}
    container = {"name": "c", "image": "i"}
    pod = {"restartPolicy": "Never", "containers": [container]}
    good = {**job, "spec": {"template": {"spec": pod}}}
    unknown = {**job, "spec": {"template": {"spec": pod}, "paralelism": 2}}
    wrong = {**job, "spec": {"template": {"spec": pod}, "parallelism": "two"}}
    replicated = {"name": "w", "template": {"spec": unknown["spec"]}}
    job_set = {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": {"name": "s"}}
    checks.expect(manifests.problems(good) == [], "a good Job is refused")
    for what, document in {
        "an unknown field": unknown,
        "a wrong type": wrong,
        "a missing field": {**job, "spec": {}},
        "an unknown kind": {**job, "kind": "Jub"},
        "an unknown field of a JobSet": {**job_set, "spec": {"replicatedJobs": [], "replicas": 1}},
        "an unknown field of a JobSet's Job": {**job_set, "spec": {"replicatedJobs": [replicated]}},
    }.items():
        checks.expect(manifests.problems(document) != [], f"{what} is not found")
    checks.expect("a pod may run as root" in manifests.rules({**job, "spec": {"template": {"spec": {"containers": []}}}}), "root")


def check_readme(checks, chart, update):
    """Each value has its line in the README, made of the comments of values.yaml."""
    readme = chart / "README.md"
    begin, end = "<!-- values -->\n", "<!-- end of values -->\n"
    head, rest = readme.read_text().split(begin)
    tail = rest.split(end)[1]
    text = head + begin + table((chart / "values.yaml").read_text()) + end + tail
    if update:
        readme.write_text(text)
    checks.expect(readme.read_text() == text, "README.md is not made of values.yaml (--update writes it)")


def table(text):
    """A Markdown table of a values file: key, default, and the comment above it."""
    lines = ["| value | default | meaning |", "| --- | --- | --- |"]
    path, comment = [], []
    for line in text.splitlines():
        stripped = line.strip()
        if not stripped:
            comment = []
        elif stripped.startswith("#"):
            comment.append(stripped.lstrip("# "))
        elif ":" in stripped and not stripped.startswith("-"):
            key, _, default = stripped.partition(":")
            del path[(len(line) - len(line.lstrip())) // 2 :]
            path.append(key)
            if default.strip():
                cell = default.strip().replace("|", "\\|")
                lines.append(f"| `{'.'.join(path)}` | `{cell}` | {' '.join(comment)} |")
            elif comment:
                lines.append(f"| `{'.'.join(path)}` | | {' '.join(comment)} |")
            comment = []
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("chart", type=pathlib.Path)
    parser.add_argument("--update", action="store_true")
    parser.add_argument("helm", nargs="+")
    arguments = parser.parse_args()
    checks = Checks()
    check_the_checks(checks)
    check_readme(checks, arguments.chart, arguments.update)
    files = sorted(arguments.chart.glob("examples/*.yaml")) + sorted(arguments.chart.glob("ci/*.yaml"))
    with tempfile.TemporaryDirectory() as scratch:
        for variable in ("HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"):
            os.environ[variable] = scratch
        for number, program in enumerate(arguments.helm):
            for values in files:
                check_values(checks, program, arguments.chart, values, arguments.update and number == 0)
            check_refusals(checks, program, arguments.chart, files[0])
            package = helm(program, "package", arguments.chart, "--destination", scratch)
            checks.expect(package.returncode == 0, "helm package", package.stderr)
    goldens = {path.name for path in arguments.chart.glob("ci/golden/*.yaml")}
    checks.expect(goldens == {path.name for path in files}, "a golden without values, or values without a golden")
    versions = [helm(program, "version", "--short").stdout.strip().split("+")[0] for program in arguments.helm]
    print(json.dumps({"helm": versions, "values_files": len(files), "checks": checks.done, "failed": checks.failed}))
    return 1 if checks.failed else 0


if __name__ == "__main__":
    sys.exit(main())
