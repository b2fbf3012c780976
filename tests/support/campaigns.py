"""Campaigns: tests that a tool starts with many more cases than the suite has, for their numbers.

The tool names its campaign, and what to try, in the environment. The tests take their cases from
there and hand the numbers of each back (tools/campaign.py is the other end).
"""

import json
import os
from typing import Any


def options_of(campaign: str) -> dict[str, Any] | None:
    """Return what the tool of a campaign asks for; None in the suite and in other campaigns."""
    options: dict[str, Any] | None = json.loads(os.environ.get("TEST_CAMPAIGN", "{}")).get(campaign)
    return options


def hand_back(**numbers: Any) -> None:
    """Give the tool the numbers of a case; without a tool, do nothing."""
    if report := os.environ.get("TEST_CAMPAIGN_REPORT"):
        with open(report, "a") as file:
            file.write(json.dumps(numbers) + "\n")
