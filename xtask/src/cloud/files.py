"""Checks Dockerfiles and the clouds' job templates: hadolint, schemas, and that every option that they, the chart
and the Slurm scripts give to our programs is one.

usage: files.py REPOSITORY PROGRAMS
"""

import copy
import json
import pathlib
import re
import subprocess
import sys
import tempfile

import jsonschema
import yaml

OURS = {
    "coordinator": ["percheron", "coordinator", "--help"],
    "guard": ["percheron", "guard", "--help"],
    "worker": ["percheron-worker", "--help"],
    "status": ["percheron", "status", "--help"],
}
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z-]*")
failed = []


def expect(holds, what):
    if not holds:
        failed.append(what)
        print(f"FAIL {what}")


def check_dockerfiles(root):
    files = sorted(root.glob("docker/*.Dockerfile"))
    expect(len(files) == 2, "there are two Dockerfiles")
    lint = subprocess.run(["hadolint", "--failure-threshold", "style", *files], capture_output=True, text=True)
    expect(lint.returncode == 0, f"hadolint: {lint.stdout}{lint.stderr}")
    with tempfile.NamedTemporaryFile("w", suffix=".Dockerfile") as planted:
        planted.write("FROM debian:latest\nRUN cd /x && sudo true\n")
        planted.flush()
        expect(subprocess.run(["hadolint", planted.name], capture_output=True).returncode != 0, "a planted fault is found")
    for file in files:
        text = file.read_text()
        final = text[text.rindex("\nFROM "):]
        expect(re.search(r"^USER [1-9]\d*:[1-9]\d*$", final, re.MULTILINE), f"{file.name} ends as no root")
        for line in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE):
            for source in line.split():
                expect((root / source).exists(), f"{file.name} copies {source}, which is not there")
    coordinator = (root / "docker/coordinator.Dockerfile").read_text()
    expect("--package worker" not in coordinator and "LD_LIBRARY_PATH" not in coordinator, "the coordinator has no torch")
    return len(files)


def check_templates(root):
    schemas = pathlib.Path(__file__).parent / "batch"
    templates = sorted(root.glob("batch/*.json"))
    for file in templates:
        schema = json.loads((schemas / f"{file.stem}.schema.json").read_text())
        validator = jsonschema.Draft202012Validator(schema)
        template = json.loads(file.read_text())
        problems = [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in validator.iter_errors(template)]
        expect(not problems, f"{file.name}: {problems}")
        for spoiled in spoil(template):
            expect(not validator.is_valid(spoiled), f"{file.name}: a planted fault is not found")
    expect(len(templates) == 2, "there are two job templates")
    return len(templates)


def spoil(template):
    """The template with a fault, of each kind."""
    unknown = copy.deepcopy(template)
    unknown["nodes"] = 3
    yield unknown
    for key in list(template):
        if isinstance(template[key], (dict, list)) and template[key]:
            wrong = copy.deepcopy(template)
            wrong[key] = "three"
            yield wrong


def command_lines(root):
    """(where, program, its words) of every command line of ours in files that others run."""
    for file in sorted(root.glob("batch/*.json")):
        for shell in re.findall(r'"((?:[^"\\]|\\.)*exec percheron(?:[^"\\]|\\.)*)"', file.read_text()):
            yield from of_shell(file.name, json.loads(f'"{shell}"'))
    for file in sorted(root.glob("cli/src/slurm/*.sh")):
        yield from of_shell(file.name, file.read_text().replace('"$program"', "percheron").replace("\\\n", " "))
    for file in sorted(root.glob("helm/percheron/ci/golden/*.yaml")):
        for document in yaml.safe_load_all(file.read_text()):
            for container in containers(document):
                yield from of_words(f"{file.name} {container['name']}", container["command"] + container.get("args", []))


def of_shell(where, text):
    for found in re.findall(r"percheron (coordinator|guard) ([^\n;]*)", text):
        yield from of_words(where, ["percheron", found[0], *found[1].split()])


def of_words(where, words):
    program, rest = words[1], words[2:]
    at = rest.index("--") if "--" in rest else len(rest)
    yield where, program, rest[:at]
    if program == "guard":
        yield where, "worker", rest[at + 1:]


def containers(document):
    if isinstance(document, dict):
        yield from document.get("containers", [])
    children = document.values() if isinstance(document, dict) else document if isinstance(document, list) else []
    for child in children:
        yield from containers(child)


def check_options(root, programs):
    known = {}
    for name, (program, *arguments) in OURS.items():
        shown = subprocess.run([programs / program, *arguments], capture_output=True, text=True, check=True)
        known[name] = set(OPTION.findall(shown.stdout))
    count = 0
    for where, program, words in command_lines(root):
        count += 1
        given = {option for word in words for option in OPTION.findall(word.split("=")[0])}
        expect(given, f"{where}: {program} is given no option")
        expect(given <= known[program], f"{where}: {program} has no {sorted(given - known[program])}")
    expect(count >= 12, f"only {count} command lines were found")
    return count


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    root, programs = map(pathlib.Path, sys.argv[1:])
    counts = {"dockerfiles": check_dockerfiles(root), "job_templates": check_templates(root),
              "command_lines": check_options(root, programs)}
    print(json.dumps({**counts, "failed": len(failed)}))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
