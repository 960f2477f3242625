"""What pip needs in a build to work as it does here: one configuration file, and the local files
and folders that it names. Prints the options that mount them, for buildah. Names no host itself.
"""

from __future__ import annotations

import ast
import configparser
import subprocess
import sys
from pathlib import Path

PLACE = "/etc/pip.conf"  # where pip reads the configuration of the whole system


def read_settings() -> configparser.RawConfigParser:
    """pip's settings from all its files and from the environment, which wins."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    settings = configparser.RawConfigParser()
    # Sorted so that the environment, ":env:", comes last.
    for line in sorted(listed.splitlines(), key=lambda line: line.startswith(":env:")):
        name, _, value = line.partition("=")
        section, _, key = name.rpartition(".")
        section = "global" if section == ":env:" else section
        settings.read_dict({section: {key: ast.literal_eval(value)}})
    return settings


def find_paths(settings: configparser.RawConfigParser) -> list[Path]:
    """The files and folders of this machine that the settings name."""
    values = [value for section in settings.values() for value in section.values()]
    paths: set[Path] = set()
    for word in " ".join(values).split():
        path = Path(word.removeprefix("file://"))
        if path.is_absolute() and path.exists():
            # The pages of an index point to files beside it.
            paths.add(path.parent if word.startswith("file://") else path)
    return sorted(paths)


def main(file: Path) -> None:
    settings = read_settings()
    with file.open("w") as stream:
        settings.write(stream)
    mounts = [(str(path), str(path)) for path in find_paths(settings)]
    for here, there in [(str(file), PLACE), *mounts]:
        print(f"--volume={here}:{there}:ro")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
