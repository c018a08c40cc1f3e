"""The Kubernetes manifest against the published schemas, and the Dockerfile by a linter. Neither is run here."""

import copy
import pathlib
import subprocess
import sys

import pytest
import yaml

from tests.whole import REPO

kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="requirements-dev.txt is not installed")
DOCUMENTS = list(yaml.safe_load_all((REPO / "scripts" / "kubernetes.yaml").read_text()))
JOB = DOCUMENTS[1]


@pytest.mark.parametrize("version", ["1.31", "1.34", "1.37"])
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document["kind"])
def test_the_manifest_is_what_kubernetes_takes(document, version):
    kubernetes_validate.validate(document, version, strict=True)  # strict: a field that does not exist is an error


def test_a_wrong_manifest_is_refused():
    wrong = copy.deepcopy(JOB)
    wrong["spec"]["podFailurePolicies"] = wrong["spec"].pop("podFailurePolicy")
    with pytest.raises(kubernetes_validate.ValidationError, match="podFailurePolicies"):
        kubernetes_validate.validate(wrong, "1.31", strict=True)


def test_the_parts_of_the_manifest_fit_together():
    """What no schema tells: names that must agree, and the time to save before the end."""
    service, spec = DOCUMENTS[0], JOB["spec"]
    pod = spec["template"]["spec"]
    [container] = pod["containers"]
    arguments = dict(argument.removeprefix("--").split("=", 1) for argument in container["args"])
    assert arguments["coordinator"].startswith(f"{JOB['metadata']['name']}-0.{service['metadata']['name']}:")
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": JOB["metadata"]["name"]}
    assert int(arguments["num_processes"]) == spec["completions"] == spec["parallelism"]
    assert float(arguments["stop_seconds"]) < pod["terminationGracePeriodSeconds"]
    [rule] = spec["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]


def test_the_dockerfile_passes_its_linter():
    program = pathlib.Path(sys.executable).parent / "hadolint"
    if not program.is_file():
        pytest.skip("hadolint is not installed: requirements-dev.txt")
    done = subprocess.run([program, REPO / "Dockerfile"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    wrong = subprocess.run([program, "-"], input="FROM python\nRUN cd /x\n", capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 1 and "DL3006" in wrong.stdout
