"""The files for Compose and Kubernetes fit the command line, the image and torchrun. That the image
runs like this is tested in `container/`.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
from typing import Any

import pytest
from test_dockerfile import EXAMPLES, GAUGES, ROOT, arguments, entrypoint, load_yaml
from torch.distributed.elastic.multiprocessing.api import PContext
from torch.distributed.run import get_args_parser

from minidcp.cli import build_parser

HOME = "/home/minidcp"
HUB = f"{HOME}/.cache/huggingface"
# What torchrun gives its processes after SIGTERM, where its version has no option for that.
TORCHRUN_TIMEOUT = inspect.signature(PContext.close).parameters["timeout"].default


def parse(command: list[str]) -> argparse.Namespace:
    """The arguments after the image's name."""
    return build_parser().parse_args([*entrypoint(), *command])


def find(documents: list[Any], kind: str) -> Any:
    (found,) = (document for document in documents if document["kind"] == kind)
    return found


def read_deployment(name: str) -> tuple[list[Any], Any, Any]:
    """All documents of a file, and the specs of its Deployment's pods and of their container."""
    documents = load_yaml(name)
    spec = find(documents, "Deployment")["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    return documents, spec, container


def read_group() -> tuple[Any, list[Any]]:
    """The LeaderWorkerSet's template, and the pods' specs: the leader's and the worker's."""
    group = find(load_yaml("kubernetes-two-nodes.yaml"), "LeaderWorkerSet")
    template = group["spec"]["leaderWorkerTemplate"]
    return template, [template[f"{role}Template"]["spec"] for role in ("leader", "worker")]


def all_pods() -> list[Any]:
    deployments = [read_deployment(f"kubernetes{end}.yaml")[1] for end in ("", "-replicas")]
    return [*deployments, *read_group()[1]]


def documented_tmpfs() -> set[str]:
    """What docs/operations.md mounts where the root file system is read-only."""
    (command,) = re.findall(
        r"docker run .* --read-only .*", (ROOT / "docs/operations.md").read_text()
    )
    return set(re.findall(r"--tmpfs (\S+)", command))


def seconds_of_pre_stop(container: Any) -> int:
    command = container["lifecycle"]["preStop"]["exec"]["command"]
    assert command[0] == "sleep"
    return int(command[1])


def test_compose() -> None:
    (document,) = load_yaml("compose.yaml")
    service = document["services"]["minidcp"]
    args = parse(service["command"])
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert device["count"] == args.tp_size
    assert service["ports"] == [f"{args.port}:{args.port}"]
    assert float(service["stop_grace_period"].removesuffix("s")) > args.shutdown_timeout
    assert service["user"].endswith(":0") and service["cap_drop"] == ["ALL"]
    assert service["read_only"] and set(service["tmpfs"]) == documented_tmpfs()
    assert service["volumes"] == [f"{name}:{HUB}" for name in document["volumes"]]


@pytest.mark.parametrize("pod", all_pods(), ids=["one node", "replicas", "leader", "worker"])
def test_pods_have_no_rights_and_find_what_they_write_to(pod: Any) -> None:
    user = pod["securityContext"]
    assert user["runAsNonRoot"] and user["runAsUser"] > 0
    assert user["runAsGroup"] == user["fsGroup"] == 0  # of all that the image lets others write to
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }

    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert len(mounts) == len(volumes)
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    written = {path for path, volume in mounts.items() if "emptyDir" in volume} - {"/dev/shm"}
    assert written == {path.split(":")[0] for path in documented_tmpfs()}


@pytest.mark.parametrize("name", ["kubernetes.yaml", "kubernetes-replicas.yaml"])
def test_deployments_fit_the_command_line(name: str) -> None:
    documents, spec, container = read_deployment(name)
    args = parse(container["args"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == args.tp_size
    drained = seconds_of_pre_stop(container) + args.shutdown_timeout
    assert spec["terminationGracePeriodSeconds"] > drained

    (port,) = container["ports"]
    assert port["containerPort"] == args.port
    service = find(documents, "Service")["spec"]
    template = find(documents, "Deployment")["spec"]["template"]
    assert service["ports"][0]["targetPort"] == port["name"]
    assert service["selector"] == template["metadata"]["labels"]
    assert template["metadata"]["annotations"]["prometheus.io/port"] == str(args.port)


def check_probes(container: Any) -> None:
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        port = container["ports"][0]["name"]
        assert container[probe]["httpGet"] == {"path": "/health", "port": port}


def test_probes_ask_for_health() -> None:
    one_node, replicas, leader, worker = (pod["containers"][0] for pod in all_pods())
    for container in (one_node, replicas, leader):
        check_probes(container)
    assert not {"ports", "readinessProbe", "livenessProbe"} & set(worker)  # it has no HTTP server


def test_checkpoints_come_from_the_volume_that_is_claimed() -> None:
    names = ("kubernetes.yaml", "kubernetes-replicas.yaml", "kubernetes-two-nodes.yaml")
    for name, pod in zip(names, all_pods(), strict=False):
        claim = find(load_yaml(name), "PersistentVolumeClaim")
        volume = pod["volumes"][-1]
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        (container,) = pod["containers"]
        path = container["volumeMounts"][-1]["mountPath"]
        shared = claim["spec"]["accessModes"] == ["ReadWriteMany"]
        assert path == ("/model" if shared else HUB)
        assert (path in container.get("args", container.get("command"))) == shared


def fill_in(command: list[str], index: int, leader: str = "minidcp-0.minidcp.default") -> list[str]:
    """A node's command with the variables that LeaderWorkerSet sets, put in as Kubernetes does."""
    variables = {
        "LWS_GROUP_SIZE": "2",
        "LWS_WORKER_INDEX": str(index),
        "LWS_LEADER_ADDRESS": leader,
    }
    return [re.sub(r"\$\((\w+)\)", lambda name: variables[name[1]], word) for word in command]


def read_torchrun(command: list[str]) -> argparse.Namespace:
    """A node's command as torchrun reads it."""
    init = json.loads(arguments("ENTRYPOINT")[-1])[:2]
    assert command[:3] == [*init, "torchrun"]
    return get_args_parser().parse_args(command[3:])


def test_two_nodes_are_one_torchrun_job() -> None:
    template, pods = read_group()
    size = template["size"]
    assert len(pods) == size == 2
    assert template["restartPolicy"] == "RecreateGroupOnPodRestart"
    containers = [pod["containers"][0] for pod in pods]
    commands = [fill_in(container["command"], i) for i, container in enumerate(containers)]
    nodes = [read_torchrun(command) for command in commands]
    assert [node.node_rank for node in nodes] == [0, 1]
    for pod, container, node in zip(pods, containers, nodes, strict=True):
        assert node.module and node.training_script == "minidcp"
        args = build_parser().parse_args(node.training_script_args)
        assert args.command == "serve" and args.model == "/model"
        assert args.host == "0.0.0.0"
        assert args.tp_size == args.dcp_size == int(node.nnodes) * int(node.nproc_per_node)
        assert container["resources"]["limits"]["nvidia.com/gpu"] == int(node.nproc_per_node)
        assert args.shutdown_timeout < TORCHRUN_TIMEOUT
        ended = seconds_of_pre_stop(container) + TORCHRUN_TIMEOUT
        assert pod["terminationGracePeriodSeconds"] > ended
    assert containers[0]["ports"] == [{"name": "http", "containerPort": args.port}]


def test_only_the_leader_is_reached_from_outside() -> None:
    documents = load_yaml("kubernetes-two-nodes.yaml")
    group = find(documents, "LeaderWorkerSet")["metadata"]["name"]
    service = find(documents, "Service")
    assert service["metadata"]["name"] != group  # LeaderWorkerSet makes one with that name
    own = {"leaderworkerset.sigs.k8s.io/name": group}
    assert service["spec"]["selector"] == own | {"leaderworkerset.sigs.k8s.io/worker-index": "0"}

    policy = find(documents, "NetworkPolicy")["spec"]
    among_themselves, from_anywhere = policy["ingress"]
    assert policy["podSelector"]["matchLabels"] == own
    assert among_themselves == {"from": [{"podSelector": {"matchLabels": own}}]}
    assert from_anywhere == {"ports": [{"port": service["spec"]["ports"][0]["targetPort"]}]}


def test_the_balancer_finds_the_replicas_and_their_metrics() -> None:
    text = (EXAMPLES / "kubernetes-replicas.yaml").read_text()
    documents, _, container = read_deployment("kubernetes-replicas.yaml")
    deployment = find(documents, "Deployment")
    assert deployment["spec"]["replicas"] > 1
    # The chart's release names the pool. It has port 8000 and vLLM's metric names by default.
    installed = re.search(r"helm install (\S+) .*modelServers\.matchLabels\.(\w+)=(\S+)", text)
    assert installed is not None
    pool, label, value = installed.groups()
    assert deployment["spec"]["template"]["metadata"]["labels"] == {label: value}
    assert parse(container["args"]).port == 8000

    route = find(documents, "HTTPRoute")["spec"]
    assert route["parentRefs"] == [{"name": find(documents, "Gateway")["metadata"]["name"]}]
    ((backend,),) = (rule["backendRefs"] for rule in route["rules"])
    assert (backend["kind"], backend["name"]) == ("InferencePool", pool)
    read = set(re.findall(r"vllm:\w+", text))
    assert len(read) == 3 and read <= GAUGES
