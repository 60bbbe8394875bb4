"""The commands of `python -m model`, a file each; they may import anything, and torch only when they run."""
