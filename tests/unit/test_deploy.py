"""What people copy to launch lockstep: the manifests fit their schemas, and every command names flags that exist."""

from __future__ import annotations

import ast
import copy
import functools
import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from referencing import Registry, Resource

from lockstep.cli.chat import ChatOptions
from lockstep.cli.flags import flag_names, parse
from lockstep.cli.generate import GenerateOptions
from lockstep.config.build import build_config, group_of
from lockstep.config.endpoint import for_endpoint
from lockstep.config.serve import ServeOptions
from lockstep.utils import env
from lockstep.version import __version__

ROOT = Path(__file__).parents[2]
SCHEMAS = Path(__file__).with_name("schemas")
MANIFESTS = sorted((ROOT / "deploy" / "kubernetes").glob("*.yaml"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SCRIPTS = [ROOT / "examples" / "multi_node.sh", ROOT / "deploy" / "run_cluster.sh"]
TEXTS = [*MANIFESTS, *EXAMPLES, *SCRIPTS, ROOT / "deploy" / "Dockerfile", ROOT / "docs" / "deployment.md", ROOT / "examples" / "README.md"]

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

OVER_HOSTS = {"--nnodes", "--node-rank", "--master-addr", "--master-port", "--headless"}
FLAGS = {"generate": {*flag_names(GenerateOptions), *OVER_HOSTS}, "chat": set(flag_names(ChatOptions))}
FLAGS["serve"] = set(flag_names(ServeOptions, sampling=False))
# Other verbs have flags of their own and are written out in full here.
FLAGS |= {"doctor": {"-tp", "--tensor-parallel-size"}, "verify": {"-tp", "--tensor-parallel-size"}, "version": set()}


@functools.cache
def registry() -> Registry[Any]:
    return Registry().with_resources((p.name, Resource.from_contents(json.loads(p.read_text()))) for p in SCHEMAS.glob("*.json"))


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def check(document: dict[str, Any]) -> None:
    """Raises jsonschema.ValidationError when the document is not what its kind's schema says."""
    schema = json.loads((SCHEMAS / f"{document['kind']}.json").read_text())
    jsonschema.Draft202012Validator(schema, registry=registry()).validate(document)


def found(node: Any, key: str) -> Iterator[Any]:
    """Every value under `key`, anywhere."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name == key:
                yield value
            yield from found(value, key)
    elif isinstance(node, list):
        for value in node:
            yield from found(value, key)


# Manifests


def test_there_is_something_to_check() -> None:
    assert [p.name for p in MANIFESTS] == ["kuberay.yaml", "leaderworkerset.yaml"]
    assert len(EXAMPLES) == 4


@pytest.mark.parametrize("path", sorted(SCHEMAS.glob("*.json")), ids=lambda p: p.stem)
def test_a_schema_is_one(path: Path) -> None:
    schema = json.loads(path.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$id"] == path.name
    for reference in found(schema, "$ref"):  # validation follows only those that a document needs
        registry().resolver(base_uri=path.name).lookup(reference)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.stem)
def test_a_manifest_fits_its_schema(path: Path) -> None:
    for document in documents(path):
        check(document)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.stem)
def test_a_pod_is_whole(path: Path) -> None:
    """What a schema cannot say: names agree within the pod, and shared memory is there."""
    templates = [t for d in documents(path) for key in ("template", "leaderTemplate", "workerTemplate") for t in found(d, key)]
    assert len(templates) == 2
    for template in templates:
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        for container in template["spec"]["containers"]:
            mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
            assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
            assert "LOCKSTEP_HOST_IP" in {variable["name"] for variable in container["env"]}
            assert container["image"].split(":")[1].removesuffix("-ray") == __version__


def test_pods_prove_a_secret_that_is_not_in_the_file() -> None:
    document = documents(MANIFESTS[1])[0]
    keys = [v for env in found(document, "env") for v in env if v["name"] == "LOCKSTEP_CLUSTER_KEY"]
    assert len(keys) == 2 and keys[0] == keys[1]
    secret = keys[0]["valueFrom"]["secretKeyRef"]
    assert not secret.get("optional"), "without it pods must not start"
    assert f"kubectl create secret generic {secret['name']} --from-literal={secret['key']}=" in MANIFESTS[1].read_text()
    for manifest in MANIFESTS:  # a server that listens for others asks its clients for a key
        text = manifest.read_text()
        (api_key,) = [v["valueFrom"]["secretKeyRef"] for env in found(documents(manifest)[0], "env") for v in env if "API_KEY" in v["name"]]
        assert re.search(rf"kubectl create secret generic {api_key['name']} .*--from-literal={api_key['key']}=", text), manifest
    assert documents(MANIFESTS[0])[0]["spec"]["authOptions"] == {"mode": "token"}, "on Ray the key travels by Ray, which has its own"


def test_leader_and_worker_say_the_same() -> None:
    document = documents(MANIFESTS[1])[0]
    template = document["spec"]["leaderWorkerTemplate"]
    leader, worker = (template[role]["spec"]["containers"][0] for role in ("leaderTemplate", "workerTemplate"))
    sizes = [dict(re.findall(r"(--(?:nnodes|master-port|[a-z]+-parallel-size)) (\S+)", c["args"][0])) for c in (leader, worker)]
    assert sizes[0] == sizes[1] and len(sizes[0]) == 4
    assert int(sizes[0]["--tensor-parallel-size"]) * int(sizes[0]["--pipeline-parallel-size"]) % template["size"] == 0
    assert int(sizes[0]["--master-port"]) in {port["containerPort"] for port in leader["ports"]}
    assert all(c["args"][0].startswith("exec lockstep serve ") for c in (leader, worker)), "signals are for the server, not for a shell"
    assert "--headless" in worker["args"][0] and "--headless" not in leader["args"][0]
    assert '--master-addr "$LWS_LEADER_ADDRESS"' in worker["args"][0] and "--node-rank 0" in leader["args"][0]


def test_the_leader_is_asked_what_the_server_says_of_itself() -> None:
    """Each probe has its own route, at the port that is served; and a start may take as long as the server gives it."""
    template = documents(MANIFESTS[1])[0]["spec"]["leaderWorkerTemplate"]["leaderTemplate"]["spec"]
    (leader,) = template["containers"]
    probes = {name: leader[f"{name}Probe"] for name in ("startup", "liveness", "readiness")}
    assert {name: p["httpGet"] for name, p in probes.items()} == {
        name: {"path": path, "port": "http"} for name, path in (("startup", "/startupz"), ("liveness", "/livez"), ("readiness", "/readyz"))
    }
    assert probes["startup"]["periodSeconds"] * probes["startup"]["failureThreshold"] > build_config(nnodes=2).start_limit_s
    assert template["terminationGracePeriodSeconds"] > ServeOptions().shutdown_timeout


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.stem)
def test_a_service_leads_to_the_server(path: Path) -> None:
    *others, service = documents(path)
    assert service["kind"] == "Service" and service["metadata"]["name"] not in {d["metadata"]["name"] for d in others}
    (port,) = service["spec"]["ports"]
    places = [c for d in others for containers in found(d, "containers") for c in containers if "API_KEY" in str(c.get("env"))]
    (http,) = [p for c in places for p in c["ports"] if p["name"] == port["targetPort"]]
    text = " ".join(str(t) for d in others for key in ("args", "entrypoint") for t in found(d, key))
    assert re.findall(r"--host 0\.0\.0\.0 --port (\d+)", text) == [str(http["containerPort"])]
    labels = [t["metadata"]["labels"] for t in found(others, "leaderTemplate")] or [
        {"ray.io/cluster": others[0]["metadata"]["name"], "ray.io/node-type": "head"}  # which KubeRay puts on the head's pod
    ]
    assert service["spec"]["selector"] == labels[0]


def test_ray_has_room_for_every_rank() -> None:
    cluster, job, _ = documents(MANIFESTS[0])
    assert job["spec"]["clusterSelector"]["ray.io/cluster"] == cluster["metadata"]["name"]
    assert f"ray[default]=={cluster['spec']['rayVersion']}" in (ROOT / "deploy" / "Dockerfile").read_text()
    ranks = 1
    for size in re.findall(r"--[a-z]+-parallel-size (\d+)", job["spec"]["entrypoint"]):
        ranks *= int(size)
    (workers,) = cluster["spec"]["workerGroupSpecs"]
    slots = [int(group["rayStartParams"]["num-cpus"]) for group in (cluster["spec"]["headGroupSpec"], workers)]
    assert slots[0] + slots[1] * workers["replicas"] == ranks == 4


LWS = "spec.leaderWorkerTemplate"
LEADER = f"{LWS}.leaderTemplate.spec.containers.0"
HEAD = "spec.headGroupSpec.template.spec"
DROP = object()


@pytest.mark.parametrize(
    ("name", "index", "where", "value"),
    [
        ("leaderworkerset", 0, "apiVersion", "leaderworkerset.x-k8s.io/v2"),
        ("leaderworkerset", 0, "metadata.name", "Lock_step"),
        ("leaderworkerset", 0, "spec.replica", 1),
        ("leaderworkerset", 0, "spec.startupPolicy", "WorkerReady"),
        ("leaderworkerset", 0, f"{LWS}.size", "2"),
        ("leaderworkerset", 0, f"{LWS}.size", 0),
        ("leaderworkerset", 0, f"{LWS}.workerTemplate", DROP),
        ("leaderworkerset", 0, f"{LWS}.restartPolicy", "Always"),
        ("leaderworkerset", 0, f"{LWS}.leaderTemplate.spec.containers", []),
        ("leaderworkerset", 0, f"{LEADER}.image", DROP),
        ("leaderworkerset", 0, f"{LEADER}.image", "lockstep"),
        ("leaderworkerset", 0, f"{LEADER}.command", "/bin/sh -c"),
        ("leaderworkerset", 0, f"{LEADER}.args.0", 1),
        ("leaderworkerset", 0, f"{LEADER}.env.0.value", "both"),
        ("leaderworkerset", 0, f"{LEADER}.env.0", {"name": "TP", "value": 2}),
        ("leaderworkerset", 0, f"{LEADER}.ports.0.containerPort", 70000),
        ("leaderworkerset", 0, f"{LEADER}.resources.limits.memory", "8 GB"),
        ("leaderworkerset", 0, f"{LEADER}.volumeMounts.0.path", "/x"),
        ("leaderworkerset", 0, f"{LEADER}.readinessProbe.httpGet", DROP),
        ("leaderworkerset", 0, f"{LEADER}.livenessProbe.httpGet.path", "livez"),
        ("leaderworkerset", 1, "spec.ports", []),
        ("leaderworkerset", 1, "spec.ports.0.targetPort", "Http"),
        ("leaderworkerset", 1, "spec.selectors", {"app": "lockstep"}),
        ("leaderworkerset", 1, "spec.selector", {}),
        ("leaderworkerset", 0, f"{LEADER}.readinessProbe.tcpSocket", {"port": 1}),
        ("leaderworkerset", 0, f"{LEADER}.startupProbe.failureThreshold", 0),
        ("leaderworkerset", 0, f"{LWS}.leaderTemplate.spec.volumes.0.emptyDir.medium", "memory"),
        ("kuberay", 0, "kind", "RayJob"),
        ("kuberay", 0, "spec.rayVersion", 2.6),
        ("kuberay", 0, "spec.authOptions.mode", "key"),
        ("kuberay", 0, "spec.headGroupSpec.rayStartParams.num-cpus", 2),
        ("kuberay", 0, "spec.headGroupSpec.rayStartParams", DROP),
        ("kuberay", 0, "spec.workerGroupSpecs.0.groupName", DROP),
        ("kuberay", 0, "spec.workerGroupSpecs.0.replicas", -1),
        ("kuberay", 0, f"{HEAD}.volumes.0.emptyDir", DROP),
        ("kuberay", 0, f"{HEAD}.container", []),
        ("kuberay", 1, "spec.entrypoint", DROP),
        ("kuberay", 1, "spec.clusterSelector", DROP),
        ("kuberay", 1, "spec.rayClusterSpec", {}),
        ("kuberay", 1, "spec.shutdownAfterJobFinishes", True),
    ],
)
def test_a_wrong_manifest_is_refused(name: str, index: int, where: str, value: Any) -> None:
    document = copy.deepcopy(documents(ROOT / "deploy" / "kubernetes" / f"{name}.yaml")[index])
    node: Any = document
    keys = [int(key) if key.isdigit() else key for key in re.split(r"\.(?!io/)", where)]
    for key in keys[:-1]:
        node = node[key]
    if value is DROP:
        del node[keys[-1]]
    else:
        node[keys[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        check(document)


# Commands


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """(verb, flags) of every `lockstep ...` command in a text, as far as its line and the lines it continues on go."""
    text = re.sub(r"\\\n\s*(#\s*)?", " ", text)
    for verb, rest in re.findall(r"\blockstep (generate|chat|serve|verify|bench|doctor|demo|version)\b([^\n`|;&]*)", text):
        yield verb, re.findall(r"(?:^|(?<=[\s\"']))--?[a-z][\w-]*", re.sub(r"\"[^\"]*\"|'[^']*'", "TEXT", rest))


@pytest.mark.parametrize("path", TEXTS, ids=lambda p: p.name)
def test_every_flag_exists(path: Path) -> None:
    text = path.read_text()
    if path in MANIFESTS:  # folded texts as they will be
        text = "\n".join(str(t) for d in documents(path) for key in ("args", "command", "entrypoint") for t in found(d, key))
    for verb, flags in commands(text):
        unknown = set(flags) - FLAGS.get(verb, set())
        assert not unknown, f"lockstep {verb} has no {unknown}"


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_every_flag_of_a_page_exists(path: Path) -> None:
    """Of the verbs whose flags are generated. (`serve`, say, is a word too: what follows it has no flags then.)"""
    for verb, flags in commands(path.read_text()):
        unknown = set(flags) - FLAGS[verb] - {"--help"} if verb in ("generate", "chat", "serve") else ()
        assert not unknown, f"lockstep {verb} has no {unknown}"


def test_the_servers_of_a_page_can_be_parsed() -> None:
    """Each with its values; and what they say of the endpoint goes together."""
    page = (ROOT / "docs" / "deployment.md").read_text()
    found = [line for block in re.findall(r"```console\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    served = [shlex.split(line)[2:] for line in found if line.startswith("lockstep serve ")]
    parsed = [parse("serve", argv, ServeOptions, max_tokens=None, description="", sampling=False) for argv in served]
    kept = [for_endpoint(p.config, p.options).parallel for p in parsed]
    assert sum(p.options.data_parallel_hybrid_lb for p in parsed) == 2
    assert sum(p.options.headless for p in parsed) == 1
    assert [k.data_parallel_rank for k in kept if k.data_parallel_rank is not None] == [0, 1, 2, 3]


def test_commands_are_found() -> None:
    lines = 'x && lockstep generate M --nnodes "$N" \\\n  --wrong=1 -tp 2 --prompt "a --b" && other --flag\n`lockstep doctor`'
    assert list(commands(lines)) == [("generate", ["--nnodes", "--wrong", "-tp", "--prompt"]), ("doctor", [])]
    counts = {path.name: len(list(commands(path.read_text()))) for path in TEXTS}
    assert counts["leaderworkerset.yaml"] == 2 and counts["multi_node.sh"] >= 4 and counts["kuberay.yaml"] == 1
    assert counts["deployment.md"] >= 5


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_every_keyword_of_an_example_is_a_setting(path: Path) -> None:
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call) and ast.unparse(n.func) == "LLM"]
    assert calls
    assert {keyword.arg for call in calls for keyword in call.keywords} <= set(group_of())


def test_every_variable_that_is_named_is_read() -> None:
    source = Path(env.__file__).read_text()
    for path in TEXTS:
        for name in set(re.findall(r"\b(?:LOCKSTEP|GLOO|NCCL)_[A-Z_]+\b", path.read_text())):
            assert name in source, f"{path.name}: {name}"


def test_links_of_the_pages_lead_somewhere() -> None:
    for page in (ROOT / "docs" / "deployment.md", ROOT / "examples" / "README.md"):
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert link.startswith("https://") or (page.parent / link).exists(), link
    for path in re.findall(r"\b(?:examples|deploy)/[\w/]+\.\w+", (ROOT / "docs" / "deployment.md").read_text()):
        assert (ROOT / path).exists(), path


def test_files_are_short_and_scripts_can_be_run() -> None:
    for path in [*TEXTS, *SCHEMAS.glob("*.json"), Path(__file__)]:
        assert len(path.read_text().splitlines()) <= 400, path
    assert all(os.access(path, os.X_OK) for path in SCRIPTS)
