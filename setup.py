"""What pyproject.toml cannot say: the wheel carries a list of its parts (PEP 770, CycloneDX 1.6)."""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent
MODELS = ROOT / "edge_sd" / "models"


class WheelWithParts(bdist_wheel):
    def egg2dist(self, egginfo_path: str, distinfo_path: str) -> None:
        super().egg2dist(egginfo_path, distinfo_path)
        folder = Path(distinfo_path) / "sboms"
        folder.mkdir(exist_ok=True)
        document = parts(self.distribution)
        (folder / "edge-sd.cdx.json").write_text(json.dumps(document, indent=1) + "\n", "utf-8")


def parts(distribution: Any) -> dict[str, Any]:
    """The package, what it requires in the versions that were tested, and the models inside with their hashes."""
    name, version = distribution.get_name(), distribution.get_version()
    own = f"pkg:pypi/{name}@{version}"
    required = [required_part(each) for each in distribution.install_requires]
    models = [model_part(path) for path in sorted(MODELS.glob("*/edge_sd.json"))]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        # The same for the same package, so that builds can be compared.
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, own)}",
        "version": 1,
        "metadata": {
            "component": {
                "type": "library", "bom-ref": own, "name": name, "version": version, "purl": own,
                "licenses": [{"license": {"id": "Apache-2.0"}}],
            },
        },
        "components": [*required, *models],
        "dependencies": [{"ref": own, "dependsOn": [each["bom-ref"] for each in (*required, *models)]}],
    }  # fmt: skip


def required_part(requirement: str) -> dict[str, Any]:
    """A requirement as a component; its version is that of constraints.txt, its range a property."""
    name = re.match(r"[\w.-]+", requirement)[0]  # type: ignore[index]
    tested = re.search(rf"(?im)^{re.escape(name).replace('_', '[-_]')}==(.+)$", (ROOT / "constraints.txt").read_text())
    purl = f"pkg:pypi/{name.lower().replace('_', '-')}" + (f"@{tested[1]}" if tested else "")
    found = {"type": "library", "bom-ref": purl, "name": name, "purl": purl, "scope": "required",
             "properties": [{"name": "edge-sd:requirement", "value": requirement}]}  # fmt: skip
    return {**found, "version": tested[1]} if tested else found


def model_part(manifest: Path) -> dict[str, Any]:
    """A model in the package. The hash is its manifest's, which has those of all its files."""
    document = json.loads(manifest.read_text("utf-8"))
    digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
    return {
        "type": "machine-learning-model", "bom-ref": f"model/{document['name']}", "name": document["name"],
        "hashes": [{"alg": "SHA-256", "content": digest}], "licenses": [{"license": {"name": document["license"]}}],
    }  # fmt: skip


setup(cmdclass={"bdist_wheel": WheelWithParts})
