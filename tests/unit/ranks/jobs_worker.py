"""Does what each job says, as a worker of ``megasft.ranks.jobs`` may.

Usage: -m tests.unit.ranks.jobs_worker JOBS.json, a list of {"act": ..., "output": FILE}.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    for job in json.loads(Path(sys.argv[1]).read_text()):
        act, output = job["act"], Path(job["output"])
        if act == "refuse":
            output.with_suffix(".error").write_text("there is no store")
            continue
        if act == "raise":
            raise ValueError("this job fails")
        if act == "be killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if act == "hang":
            time.sleep(600)
        for step in range(20 * (act == "take long")):
            output.with_suffix(".progress").write_text("." * step)
            time.sleep(0.5)
        output.write_text(str(os.getpid()))
