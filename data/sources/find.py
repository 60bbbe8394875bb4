"""Find the files of an entry of --corpus: a file, a folder (links are followed) or a glob; and count the files left out.

Each real folder and file is listed once, however many links lead to it, so loops of links end. Links come last: a file in a
folder keeps its path there. Hidden names and other suffixes are skipped and counted: no text goes missing silently.
"""

import errno
import glob
import os
import stat
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from data.config import BUILT_IN, DataError
from data.messages import format_count, shorten_list
from data.sources.record_files import FORMATS, file_suffix, refuse_columnar

TEXT_SUFFIXES = (".txt", ".md", ".py")
SUFFIXES = (*TEXT_SUFFIXES, *FORMATS)
READABLE = f"read are {' '.join(SUFFIXES)}, each also with .gz"
MAX_LISTED = 8  # suffixes and names in a line


class FoundFiles(NamedTuple):
    """Files to read, and a line about the files left out."""

    files: dict[str, Path]  # real path -> path by which it is read
    left_out: str  # "" if there are none


def readable_suffix(path: Path) -> str | None:
    """Return the suffix that decides how a file is read, without .gz; None if it is not read. Errors: DataError for Arrow.

    >>> readable_suffix(Path("a/b.JSONL.gz")), readable_suffix(Path("photo.png"))
    ('.jsonl', None)
    """
    refuse_columnar(path)
    suffix = file_suffix(path)
    return suffix if suffix in SUFFIXES else None


def may_hold_records(entries: Iterable[str]) -> bool:
    """Return True unless every entry is a built-in corpus or has the suffix of a text.

    >>> may_hold_records(["stdlib-docs", "a/*.txt"]), may_hold_records(["a.md", "a.jsonl.gz"]), may_hold_records(["folder"])
    (False, True, True)
    """
    return any(entry not in (*BUILT_IN, "-") and file_suffix(entry) not in TEXT_SUFFIXES for entry in entries)


def find_files(entry: str, cache: Path) -> FoundFiles | None:
    """Return the files of one entry; None if nothing matches. `cache`: our own folder, which is skipped.

    Errors: DataError for an entry that exists and cannot be read.
    """
    path = expand_home(entry)
    if path.is_file():  # a file named explicitly may have no suffix, like text8
        if readable_suffix(path) is None and file_suffix(path):
            raise DataError(f"{path}: its suffix is not one that is read ({READABLE})")
        return FoundFiles({os.path.realpath(path): path}, "")
    search = FileSearch(cache.expanduser())
    if path.is_dir():
        search.add_folder(path)
    elif path.exists():
        raise DataError(f"{path}: neither a file nor a folder")
    elif path.is_symlink():
        raise DataError(f"{path}: a link to {os.readlink(path)}, and nothing is there")
    elif not search.add_matches(path):
        return None
    left_out = search.left_out.line(f"{path}{os.sep}" if path.is_dir() else str(path))
    if not search.files:
        raise DataError(f"{path}: holds no file that is read ({READABLE})" + (f"; {left_out}" if left_out else ""))
    return FoundFiles(search.files, left_out)


def expand_home(entry: str) -> Path:
    """Expand a leading ~ or ~user; without such a user it is part of a file's name."""
    try:
        return Path(entry).expanduser()
    except RuntimeError:
        return Path(entry)


@dataclass
class LeftOut:
    """Names and counts of the files that are not read."""

    suffixes: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)  # broken links
    special: list[str] = field(default_factory=list)  # pipes, sockets, devices
    hidden: Counter[str] = field(default_factory=Counter)  # "file", "folder": number of names with a leading dot

    def line(self, where: str) -> str:
        """Return one line about all of them; "" if there are none.

        >>> LeftOut(Counter({".pdf": 3, "": 1, ".html": 12}), ["a.txt"]).line("corpus/")
        'left out of corpus/: 12 files of .html, 3 of .pdf, 1 without a suffix; links that lead nowhere: a.txt'
        >>> LeftOut(hidden=Counter(file=2, folder=1)).line("corpus/")
        'left out of corpus/: 2 hidden files and 1 hidden folder'
        """
        suffixes = self.suffixes.most_common()
        files = [f"{count:,} {f'of {suffix}' if suffix else 'without a suffix'}" for suffix, count in suffixes[:MAX_LISTED]]
        if rest := suffixes[MAX_LISTED:]:
            files.append(f"{sum(count for _, count in rest):,} of {len(rest)} other suffixes")
        if files:
            files[0] = files[0].replace(" ", " files " if suffixes[0][1] > 1 else " file ", 1)
        parts = [", ".join(files)] if files else []
        hidden = [format_count(self.hidden[kind], f"hidden {kind}") for kind in ("file", "folder") if self.hidden[kind]]
        parts += [" and ".join(hidden)] if hidden else []
        for what, names in (("links that lead nowhere", self.broken), ("neither files nor folders", self.special)):
            if names:
                parts.append(f"{what}: {shorten_list(names, MAX_LISTED)}")
        return f"left out of {where}: {'; '.join(parts)}" if parts else ""


class FileSearch:
    """Collects the files of folders and globs, and counts those left out."""

    def __init__(self, cache: Path) -> None:
        self.files: dict[str, Path] = {}  # real path -> path by which it is read
        self.folders: set[str] = set()  # real paths of visited folders
        self.cache = os.path.realpath(cache)
        self.left_out = LeftOut()

    def add_matches(self, pattern: Path) -> bool:
        """Collect everything that a glob matches, folders recursively; return False if it matches nothing.

        An existing path is taken literally, brackets included. `**` is matched here: the library's follows loops of links for
        forty rounds.
        """
        parts = pattern.parts
        known = next(n for n in range(len(parts), -1, -1) if n == 0 or os.path.exists(Path(*parts[:n])))
        rest = parts[known:]
        depth = rest.index("**") if "**" in rest else len(rest)
        found = glob.glob(os.path.join(glob.escape(str(Path(*parts[:known]))), *rest[:depth]))
        for top in sorted(map(Path, found), key=lambda path: (path.is_symlink(), path)):
            if top.is_dir():
                self.add_folder(top, rest[depth:])
            elif depth == len(rest):
                self.add_file(top)
        return bool(found) if depth == len(rest) else bool(self.files or self.left_out.line(""))

    def add_folder(self, top: Path, pattern: tuple[str, ...] = ()) -> None:
        """Collect the files below a folder that match the parts of a glob and are not hidden; links last."""
        pending, links = [top], []
        while pending:
            for root, folders, names in os.walk(pending.pop(0), onerror=raise_unreadable):
                real = os.path.realpath(root)
                if real in self.folders or (real == self.cache and Path(root) != top):
                    folders.clear()
                    continue
                self.folders.add(real)
                if not pattern:  # as in a shell, a glob matches hidden files only by a dot of its own
                    self.left_out.hidden["file"] += len(names) - len(visible(names))
                    self.left_out.hidden["folder"] += len(folders) - len(visible(folders))
                folders[:] = visible(folders)
                pending += [Path(root, name) for name in folders if os.path.islink(os.path.join(root, name))]
                for path in [Path(root, name) for name in visible(names)]:
                    if pattern and not matches_glob(path.relative_to(top).parts, pattern):
                        continue
                    if os.path.islink(path):
                        links.append(path)
                    else:
                        self.add_file(path, os.path.join(real, path.name))
        for path in links:
            self.add_file(path)

    def add_file(self, path: Path, real: str | None = None) -> None:
        try:
            mode = path.stat().st_mode
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise DataError(f"{path}: cannot be read ({error.strerror})") from error
            if path.is_symlink():  # a file that is no link was deleted since it was listed
                self.left_out.broken.append(str(path))
            return
        if not stat.S_ISREG(mode):
            self.left_out.special.append(str(path))
        elif readable_suffix(path) is None:
            self.left_out.suffixes[file_suffix(path) + (".gz" if path.name.lower().endswith(".gz") else "")] += 1
        else:
            self.files.setdefault(real or os.path.realpath(path), path)


def visible(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if not name.startswith("."))


def raise_unreadable(error: OSError) -> None:
    """Raise DataError; os.walk would skip an unreadable folder silently."""
    raise DataError(f"{error.filename}: cannot be read ({error.strerror})")


def matches_glob(names: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    """Return True if a path, or a folder above it, matches the parts of a glob.

    >>> matches_glob(("a", "b", "c.txt"), ("**", "*.txt")), matches_glob(("a", "b"), ("**", "a"))
    (True, True)
    >>> matches_glob(("a", "b"), ("b", "**"))
    False
    """
    if not pattern:
        return True
    if pattern[0] == "**":
        return matches_glob(names, pattern[1:]) or (bool(names) and matches_glob(names[1:], pattern))
    return bool(names) and fnmatchcase(names[0], pattern[0]) and matches_glob(names[1:], pattern[1:])
