"""The files that start clusters are what Ray and KubeRay take, and safe as shipped."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import yaml

from tests.support import ROOT
from tests.support.cluster import import_ray

LAUNCHED = ["cluster.yaml", "deploy/on-prem.yaml"]


def read(name: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    return config


@pytest.mark.parametrize("name", LAUNCHED)
def test_rays_launcher_takes_the_file(name: str) -> None:
    import_ray()
    from ray.autoscaler._private.util import prepare_config, validate_config

    written = read(name)
    config = prepare_config(copy.deepcopy(written))
    validate_config(config)
    known = {*config, "min_workers"}
    assert set(written) <= known, "keys that Ray does not know"
    workers = [kind for kind in config["available_node_types"].values() if kind.get("max_workers")]
    assert workers and all(kind["min_workers"] <= kind["max_workers"] for kind in workers)
    # Ray fills in its defaults for what a file leaves out, and one of them opens the dashboard to everybody.
    assert "0.0.0.0" not in yaml.safe_dump(config)


def test_a_misspelt_key_would_be_found() -> None:
    import jsonschema

    import_ray()
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minuts"):
        validate_config(prepare_config({**read("cluster.yaml"), "idle_timeout_minuts": 5}))


@pytest.mark.parametrize("name", LAUNCHED)
def test_nothing_answers_without_the_token(name: str) -> None:
    config = read(name)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("chmod 600 ~/.ray/auth_token" in command for command in config["setup_commands"])
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        (start,) = [command for command in config[key] if "ray start" in command]
        assert "RAY_AUTH_MODE=token" in start.partition("ray start")[0]
        assert ("--dashboard-host=127.0.0.1" in start) == ("--head" in start)


@pytest.mark.parametrize("name", LAUNCHED)
def test_what_nodes_install_is_in_the_checkout_and_pinned(name: str) -> None:
    config = read(name)
    ours = [local for remote, local in config["file_mounts"].items() if remote.startswith("~/medlora/")]
    assert {"pyproject.toml", "constraints.txt", "medlora"} < set(ours)
    assert all((ROOT / local).exists() for local in ours)
    assert any("pip install --quiet -c constraints.txt ." in command for command in config["setup_commands"])


@pytest.mark.parametrize("name", [*LAUNCHED, "deploy/kuberay.yaml"])
def test_every_field_is_commented(name: str) -> None:
    """A key that begins a line of its own is explained at its end, above it, or by the key that it stands below."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    top = [i for i, line in enumerate(lines) if re.match(r"[a-z_]+:", line)]
    for here, following in zip(top, [*top[1:], len(lines)], strict=True):
        block = lines[here:following]
        if lines[here].split(":")[0] not in ("apiVersion", "kind", "metadata"):
            assert "#" in lines[here - 1] + "".join(block), f"{name}:{here + 1} is not explained"


def test_aws_starts_small_without_a_gpu_and_spot_is_the_users_choice() -> None:
    config = read("cluster.yaml")
    types = config["available_node_types"]
    assert "GPU" not in types[config["head_node_type"]]["resources"]
    gpus = {name: kind for name, kind in types.items() if kind["resources"].get("GPU")}
    assert gpus and all(kind["min_workers"] == 0 for kind in gpus.values())
    spot = {name: kind for name, kind in gpus.items() if "InstanceMarketOptions" in kind["node_config"]}
    assert spot and all(kind["max_workers"] == 0 and kind["labels"]["market"] == "spot" for kind in spot.values())


# The fields of the custom resource that the file uses, of KubeRay 1.6's API reference; no other is accepted.
TEXT, COUNT, SWITCH = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}


def fields(required: str = "", **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def items(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": schema, "minItems": 1}


TEXTS = {"type": "object", "additionalProperties": TEXT}
QUANTITIES = {
    "type": "object",
    "additionalProperties": {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?([KMGT]i?|m)?$"},
}
CONTAINER = fields(
    "name image resources",
    name=TEXT,
    image=TEXT,
    resources=fields("limits", limits=QUANTITIES, requests=QUANTITIES),
    volumeMounts=items(fields("name mountPath", name=TEXT, mountPath=TEXT)),
)
CLAIM = fields("name persistentVolumeClaim", name=TEXT, persistentVolumeClaim=fields("claimName", claimName=TEXT))
POD = fields("spec", spec=fields("containers", containers=items(CONTAINER), volumes=items(CLAIM), nodeSelector=TEXTS))
RAY_CLUSTER = fields(
    "rayVersion authOptions headGroupSpec workerGroupSpecs",
    rayVersion=TEXT,
    authOptions=fields("mode", mode={"enum": ["disabled", "token"]}, secretName=TEXT),
    enableInTreeAutoscaling=SWITCH,
    autoscalerOptions=fields(
        idleTimeoutSeconds=COUNT, upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]}
    ),
    headGroupSpec=fields("rayStartParams template", rayStartParams=TEXTS, template=POD),
    workerGroupSpecs=items(
        fields(
            "groupName minReplicas maxReplicas rayStartParams template",
            groupName=TEXT,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            rayStartParams=TEXTS,
            template=POD,
        )
    ),
)
RAY_JOB = fields(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=fields("name", name={"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]{0,45}[a-z0-9])?$"}),
    spec=fields(
        "entrypoint rayClusterSpec",
        entrypoint=TEXT,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        backoffLimit=COUNT,
        shutdownAfterJobFinishes=SWITCH,
        ttlSecondsAfterFinished=COUNT,
        rayClusterSpec=RAY_CLUSTER,
    ),
)


def test_kuberay_takes_the_job_and_it_asks_for_a_token() -> None:
    import jsonschema

    version = import_ray().__version__
    job = read("deploy/kuberay.yaml")
    jsonschema.validate(job, RAY_JOB)
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"]["mode"] == "token"
    assert cluster["rayVersion"] == version and f"rayproject/ray:{version}-" in (
        ROOT / "deploy" / "kuberay.yaml"
    ).read_text(encoding="utf-8")
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for pod in pods:
        spec = pod["template"]["spec"]
        mounted = {mount["name"] for container in spec["containers"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in spec["volumes"]}
    head, *workers = (pod["template"]["spec"]["containers"][0]["resources"]["limits"] for pod in pods)
    assert "nvidia.com/gpu" not in head and all("nvidia.com/gpu" in limits for limits in workers)
    assert all(group["minReplicas"] == 0 < group["maxReplicas"] for group in cluster["workerGroupSpecs"])


def test_the_jobs_command_line_is_one_that_the_job_takes() -> None:
    import shlex

    from medlora.cli.train import parse

    python, job, *arguments = shlex.split(read("deploy/kuberay.yaml")["spec"]["entrypoint"])
    assert (python, job) == ("python", "jobs/curriculum.py")
    (config,) = parse(arguments).config
    assert (ROOT / config).is_file()
