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


def read_settings() -> dict[str, str]:
    """pip's settings from all its files and from the environment, which wins."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    from_files: dict[str, str] = {}
    from_environment: dict[str, str] = {}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        settings = from_environment if name.startswith(":env:.") else from_files
        settings[name.rpartition(".")[2]] = ast.literal_eval(value)
    return from_files | from_environment


def find_paths(settings: dict[str, str]) -> list[Path]:
    """The files and folders of this machine that the settings name."""
    paths: set[Path] = set()
    for value in settings.values():
        for word in value.split():
            path = Path(word.removeprefix("file://"))
            if not path.is_absolute() or not path.exists():
                continue
            # The pages of an index point to files beside it.
            paths.add(path.parent if word.startswith("file://") else path)
    return sorted(paths)


def main(file: Path) -> None:
    settings = read_settings()
    written = configparser.RawConfigParser()
    written["global"] = settings
    with file.open("w") as stream:
        written.write(stream)
    mounts = [(str(path), str(path)) for path in find_paths(settings)]
    for here, there in [(str(file), PLACE), *mounts]:
        print(f"--volume={here}:{there}:ro")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
