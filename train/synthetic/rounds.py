"""The file of finished rounds, a JSON line each: a killed command goes on behind the last whole line."""

import json
import os
from pathlib import Path

from data.config import DataError

ROUNDS = "rounds.jsonl"
SETTINGS = "settings.json"


class RoundLog:
    """Finished rounds of a folder, read when it is opened and appended one by one.

    A line that a kill has cut short is removed. Errors (DataError): a line before the last that is no round.
    """

    def __init__(self, folder: Path):
        self.path = folder / ROUNDS
        self.rounds: list[dict] = []
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines()):
            try:
                found = json.loads(line)
            except ValueError:
                found = None
            if not isinstance(found, dict) or found.get("round") != number:
                raise DataError(f"{self.path}:{number + 1} is not the line of round {number}: the file is damaged; remove the "
                                "folder, or this line and all behind it")  # fmt: skip
            self.rounds.append(found)
        if whole != content:
            os.truncate(self.path, len(whole))

    def append(self, row: dict) -> None:
        """Write a finished round, to the disk."""
        with self.path.open("ab") as file:
            file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
        self.rounds.append(row)


def claim_folder(folder: Path, settings: dict) -> None:
    """Make the folder of a command, or check that it has one of equal settings.

    Errors (DataError): files of something else in it; other settings, with the first that differs.
    """
    path = folder / SETTINGS
    if not path.is_file():
        leftovers = {f".{SETTINGS}"}  # of a command that was killed while it wrote its first file
        if folder.exists() and not (folder.is_dir() and {each.name for each in folder.iterdir()} <= leftovers):
            raise DataError(f"--out {folder} is there already, and not of this command: nothing is overwritten. "
                            "Give another --out")  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
        return
    try:
        began = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        began = None
    if not isinstance(began, dict):
        raise DataError(f"{path} is damaged: give another --out")
    for name in dict.fromkeys([*began, *settings]):
        if began.get(name) != settings.get(name):
            raise DataError(
                f"--out {folder} began with other settings, {name} = {began.get(name)!r:.80}, and now it is "
                f"{settings.get(name)!r:.80}: the same ones go on, others need another --out"
            )


def write_whole(path: Path, text: str) -> None:
    """Write a file by a temporary one that is renamed."""
    making = path.with_name(f".{path.name}")
    making.write_text(text, encoding="utf-8")
    making.replace(path)
