"Installs the package. Names, version and requirements are read from settings.ini alone."

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

folder = Path(__file__).resolve().parent
# "=" alone: requirements contain colons.
parser = ConfigParser(delimiters=["="])
parser.read(folder / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(folder / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=settings["keywords"].split(),
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    license="Apache-2.0",
    packages=find_packages(include=[settings["lib_path"], settings["lib_path"] + ".*"]),
    package_data={settings["lib_name"]: ["py.typed"]},
    python_requires=">=" + settings["min_python"],
    install_requires=settings["requirements"].split(),
    extras_require={"dev": settings["dev_requirements"].split()},
)
