"""Strict checks of rendered Kubernetes manifests, without a cluster.

Kinds of Kubernetes itself are checked against its published schemas (package kubernetes-validate), the
three kinds of others against `schemas/*.json`, in which only what our chart may use is listed, and a JobSet's
Job once more as a Job. Unknown fields, wrong types, missing fields and unknown kinds are errors.
"""

import json
import pathlib

import jsonschema
import kubernetes_validate
import yaml

VERSION = "1.34"
SCHEMAS = pathlib.Path(__file__).parent / "schemas"


def documents(text):
    """The objects of a stream of YAML documents."""
    return [document for document in yaml.safe_load_all(text) if document]


def name(document):
    """What people call an object."""
    return f"{document.get('kind')}/{document.get('metadata', {}).get('name')}"


def own_schemas():
    """(apiVersion, kind) -> schema, of kinds that are not Kubernetes's own."""
    found = {}
    for path in sorted(SCHEMAS.glob("*.json")):
        schema = json.loads(path.read_text())
        properties = schema["properties"]
        found[properties["apiVersion"]["const"], properties["kind"]["const"]] = schema
    return found


def problems(document):
    """What is wrong with an object; nothing if all is well."""
    key = (document.get("apiVersion"), document.get("kind"))
    own = own_schemas().get(key)
    found = []
    if own is not None:
        for error in jsonschema.Draft202012Validator(own).iter_errors(document):
            found.append(f"{'.'.join(map(str, error.absolute_path)) or '.'}: {error.message}")
        for replicated in document["spec"].get("replicatedJobs", []) if key[1] == "JobSet" else []:
            job = {"apiVersion": "batch/v1", "kind": "Job", **replicated["template"]}
            found += [f"replicatedJobs.{replicated['name']}: {problem}" for problem in problems(job)]
        return found
    try:
        kubernetes_validate.validate(document, VERSION, strict=True)
    except kubernetes_validate.SchemaNotFoundError:
        found.append(f"no schema for {key[0]} {key[1]}")
    except kubernetes_validate.ValidationError as error:
        found.append(f"{'.'.join(map(str, error.path)) or '.'}: {error.message}")
    return found


def pods(document):
    """The pod specs in an object."""
    spec = document.get("spec", {})
    if document["kind"] == "Pod":
        yield spec
    elif document["kind"] == "JobSet":
        for replicated in spec["replicatedJobs"]:
            yield replicated["template"]["spec"]["template"]["spec"]
    elif "template" in spec:
        yield spec["template"]["spec"]


def rules(document):
    """What every pod of ours must be, beyond what any cluster asks for."""
    found = []
    if document["kind"] == "Secret":
        found.append("the chart makes no secrets")
    for pod in pods(document):
        if not pod.get("securityContext", {}).get("runAsNonRoot"):
            found.append("a pod may run as root")
        if pod.get("automountServiceAccountToken", True):
            found.append("a pod is given a token of the API server")
        for container in pod["containers"]:
            context = container.get("securityContext", {})
            if not context.get("readOnlyRootFilesystem"):
                found.append(f"{container['name']} may write to its root")
            if context.get("allowPrivilegeEscalation", True) or "ALL" not in context["capabilities"]["drop"]:
                found.append(f"{container['name']} may gain rights")
            if "memory" not in container["resources"].get("limits", {}):
                found.append(f"{container['name']} has no limit of memory")
            for variable in container.get("env", []):
                if "value" in variable and any(word in variable["name"] for word in ("SECRET", "TOKEN", "PASSWORD")):
                    found.append(f"{variable['name']} is in plain sight")
    return found
