"""What calicoctl is made of and needs. Settings of the tools around it are in pyproject.toml."""

import os
import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "calicoctl/__init__.py").read_text()).group(1)


class BuildWithCommit(build_py):
    """Writes the commit, which setup/calicoctl passes in CALICOCTL_COMMIT, into the built copy of the package."""

    def run(self):
        super().run()
        commit = os.environ.get("CALICOCTL_COMMIT", "")
        if re.fullmatch("[0-9a-f]{7,40}(-dirty)?", commit) and not getattr(self, "editable_mode", False):
            file = Path(self.build_lib) / "calicoctl/__init__.py"
            file.write_text(file.read_text().replace('__commit__ = ""', f'__commit__ = "{commit}"'))


setup(
    name="calicoctl",
    version=version,
    description="Connects containers to a Calico network: flat, routed, policy-controlled",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    cmdclass={"build_py": BuildWithCommit},
    packages=find_packages(include=["calicoctl", "calicoctl.*"]),
    package_data={"calicoctl": ["diagnose/page/*"]},
    python_requires=">=3.9",
    # The floors are releases without known holes (osv.dev). For Python 3.9, there is none of urllib3 and requests; what
    # is open in these is not reached here: see docs/security.md.
    install_requires=[
        "docopt>=0.6.2,<0.7",
        "python-etcd>=0.4.5,<0.5",
        "urllib3>=2.8,<3; python_version>='3.10'",
        "urllib3>=2.6.3,<3; python_version<'3.10'",
        "netaddr>=1.2.1,<2",
        "pyroute2>=0.9.1,<0.10",
        "docker>=7.0,<8",
        "prettytable>=3.8,<4",
        "sdnotify>=0.3.2,<0.4",
        "prometheus_client>=0.16,<1",
        "tqdm>=4.66.3,<5",
        "pyyaml>=6.0.1,<7",
        # what the above bring along
        "requests>=2.33,<3; python_version>='3.10'",
        "requests>=2.32.4,<3; python_version<'3.10'",
        "certifi>=2024.7.4",
        "dnspython>=2.6.1,<3",
        "idna>=3.15,<4",
    ],
    extras_require={
        "test": ["pytest>=7", "pytest-xdist>=3", "hypothesis>=6"],
        "lint": ["ruff>=0.6,<1", "mypy>=1.8"],
    },
    entry_points={
        "console_scripts": [
            "calicoctl=calicoctl.cli.command_client:entry",
            "calico-cni=calicoctl.cli.command_client:cni",
        ]
    },
)
