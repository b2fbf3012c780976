"""Campaigns: tests that a tool starts with many more cases than the suite has, for their numbers.

A tool names its campaign, and what to try, in the environment of pytest. The tests take their cases
from there and write a line of JSON for each (tests/support/campaigns.py is the other end), so tools
and tests import nothing of each other.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class CampaignError(Exception):
    """Pytest did not run the tests."""


@dataclass(kw_only=True)
class Campaign:
    """The numbers of the cases of a test, each as soon as it is done.

    What pytest prints, the failures too, goes to standard error.
    """

    name: str
    """As the test knows it."""
    test: str
    """By its path in the checkout, or by its id."""
    options: dict[str, Any]
    """The options that the test gets."""
    timeout: float = 0
    """Seconds for one test; 0 for any number."""
    on_gpu: bool = False
    """Whether the tests see the GPUs."""
    has_failed: bool = field(default=False, init=False)
    """Whether a test has failed, known at the end."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Run the test and yield the numbers of its cases.

        Raises:
            CampaignError: Pytest ended with another code than 0, or 1 for a failed test.
        """
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", f"--timeout={self.timeout}"]
        environment = os.environ | {"TEST_CAMPAIGN": json.dumps({self.name: self.options})}
        if not self.on_gpu:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        with tempfile.TemporaryDirectory(prefix="campaign-") as directory:
            report = Path(directory) / "report.jsonl"
            report.touch()
            process = subprocess.Popen(
                [*command, "-p", "no:cacheprovider", self.test],
                cwd=ROOT,
                env=environment | {"TEST_CAMPAIGN_REPORT": str(report)},
                stdout=sys.stderr,
            )
            try:
                with report.open() as lines:
                    has_ended = False
                    while not has_ended:
                        # Asked before the file is read, so that its last lines are read too.
                        has_ended = process.poll() is not None
                        yield from map(json.loads, lines)
                        time.sleep(0 if has_ended else 0.2)
            finally:
                process.terminate()
                code = process.wait()
        if code not in (0, 1):
            raise CampaignError(f"pytest ended with {code}")
        self.has_failed = code == 1
