"""What drew each picture in `notebooks/images`: `made.json` beside them, which the site shows."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

IMAGES = Path(__file__).parent.parent.parent / "notebooks" / "images"
MADE = IMAGES / "made.json"


def record(path: Path, *, command: str, seconds: float, source: str) -> None:
    """Note the command that drew a picture, its seconds, and what it was drawn from."""
    made = json.loads(MADE.read_text("utf-8")) if MADE.is_file() else {}
    made[path.name] = {
        "command": command,
        "seconds": round(seconds),
        "from": source,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    MADE.write_text(json.dumps(dict(sorted(made.items())), indent=1) + "\n", "utf-8")
    print(f"{path}: {seconds:.0f} s")
