"""Work for the tests of tilestack.bench.isolated: a module of its own, so that a child imports little."""

import os
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Job:
    implementation: str
    act: str


def act(job):
    if job.act == "raise":
        raise RuntimeError("cannot")
    if job.act == "die":
        os._exit(7)
    if job.act == "hang":
        time.sleep(600)
    return [job.act]
