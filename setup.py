# Everything about the package stands in settings.ini; this file hands it to setuptools.
# The first lines run on any Python 3, so that one too old is told so in one sentence.
import sys

if sys.version_info < (3, 11):
    sys.exit("clip475 needs Python 3.11 or newer and this is Python %d.%d: install a newer one, or name it, as in: make demo PYTHON=python3.12" % sys.version_info[:2])

import re
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).resolve().parent
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(here/"settings.ini", encoding="utf-8")
settings = config["DEFAULT"]
statuses = {"2": "2 - Pre-Alpha", "3": "3 - Alpha", "4": "4 - Beta", "5": "5 - Production/Stable"}


def absolute(readme):
    "The README with links and pictures that work outside of the repository, as on the package index."
    pages, files = (f"{settings['git_url']}/{kind}/{settings['branch']}/" for kind in ("blob", "raw"))
    readme = re.sub(r"(!\[[^]]*]\()(?!https?:|#)", rf"\g<1>{files}", readme)
    return re.sub(r"(?<=]\()(?!https?:|#)", pages, readme)


class BuildWithCourse(build_py):
    "A wheel holds the students' notebooks too: nbs/course/*.ipynb, as clip475/course. A checkout has them already."

    def run(self):
        super().run()
        if not getattr(self, "editable_mode", False):
            folder = Path(self.build_lib, "clip475", "course")
            folder.mkdir(parents=True, exist_ok=True)
            for notebook in sorted((here/"nbs"/"course").glob("*.ipynb")):
                shutil.copyfile(notebook, folder/notebook.name)


setup(
    cmdclass={"build_py": BuildWithCourse},
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=absolute((here/"README.md").read_text(encoding="utf-8")),
    long_description_content_type="text/markdown",
    keywords=settings["keywords"],
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    project_urls={
        "Course": settings["git_url"] + "#the-course",
        "Changes": settings["git_url"] + "/blob/main/CHANGELOG.md",
        "Issues": settings["git_url"] + "/issues",
    },
    # The tokenizer is made from OpenAI's table (MIT). The photographs are CC BY 2.0 or CC BY-SA 2.0, their captions CC BY 4.0.
    license_expression="Apache-2.0 AND MIT AND CC-BY-2.0 AND CC-BY-SA-2.0 AND CC-BY-4.0",
    license_files=["LICENSE", "clip475/builtin_text/LICENSE.openai-clip", "clip475/photos/LICENSES.md"],
    python_requires=">=" + settings["min_python"],
    install_requires=settings["requirements"].split(),
    extras_require={name: settings[f"{name}_requirements"].split() for name in ("dev", "photos", "heic", "faiss", "export", "browser", "instructors")},
    packages=find_packages(include=[settings["lib_path"], settings["lib_path"] + ".*"]),
    package_data={settings["lib_path"]: ["py.typed", "builtin_text/*", "photos/*", "photos/images/*", "photos_model/*"]},
    entry_points={"console_scripts": settings["console_scripts"].split()},
    classifiers=[
        "Development Status :: " + statuses[settings["status"]],
        "Intended Audience :: " + settings["audience"],
        "Natural Language :: " + settings["language"],
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    zip_safe=False,
)
