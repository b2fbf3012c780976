"""A tool gets the numbers of the tests that it starts."""

from pathlib import Path

import pytest

import campaign as tool
from campaign import Campaign, CampaignError

TEST = """\
import json, os
import pytest

@pytest.mark.parametrize("case", json.loads(os.environ["TEST_CAMPAIGN"])["sums"]["cases"])
def test_a_sum(case):
    with open(os.environ["TEST_CAMPAIGN_REPORT"], "a") as report:
        report.write(json.dumps({"case": case, "sum": sum(case)}) + "\\n")
    assert sum(case) > 0
"""


@pytest.fixture
def test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_sums.py").write_text(TEST)
    return "test_sums.py"


def test_the_numbers_of_every_case_come_back_those_of_failed_tests_too(test: str) -> None:
    campaign = Campaign(name="sums", test=test, options={"cases": [[1, 2], [1, -2]]})
    assert list(campaign) == [{"case": [1, 2], "sum": 3}, {"case": [1, -2], "sum": -1}]
    assert campaign.has_failed


def test_tests_that_do_not_run_are_an_error(test: str) -> None:
    with pytest.raises(CampaignError, match="pytest ended with 4"):
        list(Campaign(name="sums", test="test_products.py", options={}))


def test_both_ends_of_a_campaign_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other end is in tests/support, which nothing here imports."""
    text = (Path(__file__).parents[2] / "tests" / "support" / "campaigns.py").read_text()
    (tmp_path / "other_end.py").write_text(text)
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = .\n")
    (tmp_path / "test_other_end.py").write_text(
        "from other_end import hand_back, options_of\n"
        "def test_it():\n"
        "    assert options_of('others') is None\n"
        "    hand_back(**options_of('ours'))\n"
    )
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    options = {"models": ["a*"], "count": 2}
    campaign = Campaign(name="ours", test="test_other_end.py", options=options)
    assert list(campaign) == [options]
    assert not campaign.has_failed
