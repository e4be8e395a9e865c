"""The reason of a failed rank in one line, where a launcher shows it last.

``torchrun`` (and ``accelerate launch``, which uses it) ends a failed launch with a report of its
own, far below the traceback of the rank, with "traceback: To enable traceback see" where a reason
might be. It shows what a rank has left in the file that ``TORCHELASTIC_ERROR_FILE`` names.
"""

from __future__ import annotations

import contextlib
import json
import os
import time

from distclip.common.foreign import in_one_line

ERROR_FILE_VARIABLE = "TORCHELASTIC_ERROR_FILE"
LONGEST_REASON = 1000
"""Characters of a reason that are kept."""


def leave(reason: str) -> None:
    """Leave the reason for the launcher, unless the script has left its own."""
    path = os.environ.get(ERROR_FILE_VARIABLE)
    if path is None or os.path.exists(path):
        return
    # The form that torch's own `record` writes, without a traceback: that is shown instead.
    extra = {"timestamp": str(int(time.time()))}
    record = {"message": {"message": in_one_line(reason, LONGEST_REASON), "extraInfo": extra}}
    with contextlib.suppress(OSError):  # the launcher then shows what it would without
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            json.dump(record, file)


def reason_of(error: BaseException) -> str:
    """An exception in one line, as the last line of its traceback has it."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
