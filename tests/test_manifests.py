"""Manifests of examples/cluster: valid to the schemas of Kubernetes, and true of this program."""

from __future__ import annotations

import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from penstock.gateway.cold import OPEN_PATHS
from penstock.verbs.serve import app

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed (extra `dev`)")
ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "cluster"
VERSION = "1.33"
MANIFESTS = sorted(FOLDER.glob("*.yaml"))


class Strict(yaml.SafeLoader):  # type: ignore[misc, name-defined]
    """A key that stands twice is an error."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"twice in one mapping, {node.start_mark}: {keys}"
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.load_all(path.read_text(), Loader=Strict))


def of_kind(path: Path, kind: str) -> dict[str, Any]:
    (found,) = [each for each in documents(path) if each["kind"] == kind]
    return found


def pods(thing: Any) -> Iterator[dict[str, Any]]:
    """Every template of a pod in it."""
    if isinstance(thing, dict):
        for name, value in thing.items():
            if name == "template" and "spec" in value:
                yield value
            else:
                yield from pods(value)
    elif isinstance(thing, list):
        for each in thing:
            yield from pods(each)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_kubernetes_would_take_it(path: Path) -> None:
    """Also the pods inside of resources that it knows no schema of."""
    kubernetes = pytest.importorskip(
        "kubernetes_validate", reason="pip install kubernetes-validate"
    )
    for document in documents(path):
        if not document["apiVersion"].startswith("ray.io/"):
            kubernetes.validate(document, VERSION, strict=True)
        for number, pod in enumerate(pods(document)):
            whole = {
                "apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": f"p{number}"}, "template": pod,
            }  # fmt: skip
            kubernetes.validate(whole, VERSION, strict=True)


def test_a_mistake_would_be_found() -> None:
    kubernetes = pytest.importorskip(
        "kubernetes_validate", reason="pip install kubernetes-validate"
    )
    document = of_kind(FOLDER / "kubernetes.yaml", "Deployment")
    document["spec"]["template"]["spec"]["containers"][0]["readinessProb"] = {}
    with pytest.raises(Exception, match="readinessProb"):
        kubernetes.validate(document, VERSION, strict=True)


def printed(args: list[str]) -> dict[str, Any]:
    """The configuration that these arguments of `penstock serve` make."""
    result = CliRunner().invoke(app, [*args, "--print-config"])
    assert result.exit_code == 0, result.output
    return tomllib.loads(result.output)


def test_the_deployment_is_true_of_the_server(tmp_path: Path) -> None:
    path = FOLDER / "kubernetes.yaml"
    file = tmp_path / "penstock.toml"
    file.write_text(of_kind(path, "ConfigMap")["data"]["penstock.toml"])
    pod = of_kind(path, "Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["args"] == ["serve", "--config", "/etc/penstock/penstock.toml"]
    config = printed(["--config", str(file)])
    assert config["gateway"]["host"] == "0.0.0.0"
    assert config["gateway"]["port"] == container["ports"][0]["containerPort"]
    ready = container["startupProbe"]
    assert ready["periodSeconds"] * ready["failureThreshold"] >= config["serve"]["start_timeout_s"]
    wait_s = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > wait_s + config["serve"]["drain_timeout_s"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] in OPEN_PATHS, "a probe brings no key"
    assert container["livenessProbe"]["httpGet"]["path"] != "/health", "draining is not dying"
    mounts = {each["mountPath"]: each["name"] for each in container["volumeMounts"]}
    assert {each["name"] for each in pod["volumes"]} == set(mounts.values())


def test_the_ray_job_is_true_of_the_server() -> None:
    job = of_kind(FOLDER / "ray.yaml", "RayJob")
    spec = job["spec"]["rayClusterSpec"]
    assert set(job["spec"]) == {
        "entrypoint",
        "shutdownAfterJobFinishes",
        "submissionMode",
        "rayClusterSpec",
    }
    assert set(spec) == {"rayVersion", "headGroupSpec", "workerGroupSpecs"}
    program, verb, *args = shlex.split(job["spec"]["entrypoint"])
    assert (program, verb) == ("penstock", "serve")
    config = printed(args)
    (workers,) = spec["workerGroupSpecs"]
    assert config["fleet"][0]["replicas"] <= workers["replicas"] <= workers["maxReplicas"]
    assert config["serve"]["ray"]["address"] == "auto"
    (head,) = spec["headGroupSpec"]["template"]["spec"]["containers"]
    ports = {each["name"]: each["containerPort"] for each in head["ports"]}
    assert ports["http"] == config["gateway"]["port"]
    grace = spec["headGroupSpec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > config["serve"]["drain_timeout_s"]
    labels = spec["headGroupSpec"]["template"]["metadata"]["labels"]
    assert labels == of_kind(FOLDER / "ray.yaml", "Service")["spec"]["selector"]


def test_the_image_is_made_of_what_is_here() -> None:
    """The Dockerfile copies what a wheel needs and asks for extras that there are, and for the Ray of ray.yaml."""
    lines = (FOLDER / "Dockerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY") for name in line.split()[1:-1]]
    assert all((ROOT / name).exists() for name in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"pyproject.toml", project["readme"], *project["license-files"], "penstock"} <= {*copied}
    (install,) = [shlex.split(line) for line in lines if line.startswith("RUN pip install")]
    (ours,) = [word for word in install if word.startswith(".[")]
    assert {*ours[2:-1].split(",")} <= project["optional-dependencies"].keys()
    assert install[install.index("-c") + 1] in copied
    (ray,) = [
        line for line in (ROOT / "constraints.txt").read_text().split() if line.startswith("ray==")
    ]
    version = of_kind(FOLDER / "ray.yaml", "RayJob")["spec"]["rayClusterSpec"]["rayVersion"]
    assert ray == f"ray=={version}"
