"Packaging: every fact comes from settings.ini."
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

parser = ConfigParser(delimiters=["="])
parser.read("settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
lines = lambda name: [o for o in cfg[name].split("\n") if o]


class BuildPy(build_py):
    "What a run needs and a clone has beside the package travels in the wheel, where datasets.repo_path finds it"

    def run(self):
        super().run()
        if self.editable_mode: return
        shipped = Path(self.build_lib)/cfg["lib_path"]/"shipped"
        shutil.rmtree(shipped, ignore_errors=True)
        for folder in lines("shipped"):
            shutil.copytree(folder, shipped/folder, ignore=shutil.ignore_patterns(".*", "__pycache__"))


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    packages=find_packages(include=[cfg["lib_path"], cfg["lib_path"] + ".*"]),
    package_data={cfg["lib_path"]: ["models/*/*"]},
    python_requires=">=" + cfg["min_python"],
    install_requires=lines("requirements"),
    extras_require={k.removesuffix("_requirements"): lines(k) for k in cfg if k.endswith("_requirements")},
    entry_points={
        "console_scripts": lines("console_scripts"),
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
    cmdclass={"build_py": BuildPy},
)
