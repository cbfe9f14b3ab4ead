"""Worker processes of a run that load no model: one that works, and one that is killed on its first job."""

import os
import time
from typing import Any

from jobs import Report


def work_or_die(jobs: Any, settings: Any, device: str, tasks: Any, reports: Any) -> None:
    """Report an empty result for each job; as device "dies", end with status 9 on the first."""
    while (index := tasks.get()) is not None:
        reports.put((os.getpid(), index, None))
        if device == "dies":
            reports.close()
            reports.join_thread()
            os._exit(9)
        time.sleep(0.5)  # so that the other gets a job too
        reports.put((os.getpid(), index, Report(jobs[index], {})))
