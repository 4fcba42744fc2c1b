"""Files that are there whole or not at all.

1. Write to a new file beside the old one; what is there stays until the new one is whole.
2. Have it stored by the disk, then put it in the old one's place in one step.
3. Whatever the disk or the folder refuses is said in one way, with the path and what to do.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from superscopes_tl.errors import describe


@contextlib.contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Give a path to write to, beside `target`, which replaces it when all went well.

    A writer that fails leaves what was there before and nothing else; one that is killed may also
    leave its hidden new file.

    Raises:
        OSError: the folder is missing or read-only, the disk is full, or `target` is a folder.
    """
    fresh = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        if target.is_dir():
            raise IsADirectoryError("it is a folder")
        yield fresh
        with fresh.open("rb+") as written:
            os.fsync(written.fileno())  # some disks say only now that they are full
        fresh.replace(target)
    except OSError as error:
        raise unwritable(target, error) from error
    finally:
        with contextlib.suppress(OSError):  # where it could not be made there is none
            fresh.unlink(missing_ok=True)


def write_tensors(target: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write tensors and a header to a safetensors file, whole or not at all.

    Raises:
        OSError: as `written_whole`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with written_whole(target) as fresh:
        try:
            save_file(dict(tensors), fresh, metadata=dict(header))
        except SafetensorError as error:  # its reason is a text: no space, no folder, no rights
            raise OSError(str(error)) from error


def unwritable(path: object, error: Exception) -> OSError:
    """Return (not raise) what to say of a file that cannot be opened or written."""
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return OSError(
        describe(
            "path",
            expected="a file that can be opened and written",
            got=f"{path} ({reason})",
            fix="check folder, rights, free space and other runs on this file; what was in it "
            "before is still whole",
        )
    )
