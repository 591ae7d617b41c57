"""SWARMD_PROFILE: what is asked for, what is written, and that a full disk costs no answer."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from swarmd.node.serving import profile as module
from swarmd.node.serving.profile import Profile, profile_of


@pytest.mark.parametrize("wish", ["", "0"])
def test_off_costs_nothing_because_there_is_nothing(wish):
    assert profile_of("stage 0-3", wish) is None


def test_means_and_percentiles_in_the_log_and_as_json_lines(tmp_path: Path, caplog):
    caplog.set_level(logging.INFO, "swarmd.profile")
    profile = profile_of("stage 0-3", str(tmp_path / "new"))
    assert profile is not None
    for microseconds in range(1, 101):
        profile.add("compute", microseconds / 1e6)
        profile.end_step(rows=2)
    profile.report()
    (file,) = (tmp_path / "new").iterdir()
    (line,) = map(json.loads, file.read_text().splitlines())
    assert (line["stage"], line["steps"], line["rows"]) == ("stage 0-3", 100, 200)
    assert list(line["us"]) == ["compute"]  # what was never measured is not shown as 0
    assert line["us"]["compute"]["mean"] == pytest.approx(50.5)
    assert line["us"]["compute"]["p95"] == pytest.approx(96)
    assert "profile of stage 0-3: 100 steps, 200 rows" in caplog.text
    assert "compute 50/96" in caplog.text


def test_a_report_begins_a_new_window_and_nothing_is_reported_twice(caplog):
    caplog.set_level(logging.INFO, "swarmd.profile")
    profile = profile_of("stage 0-3", "1")
    assert profile is not None
    profile.add("compute", 1.0)
    profile.end_step(1)
    profile.report()
    profile.report()
    assert caplog.text.count("profile of") == 1


def test_reports_come_by_themselves_when_a_window_is_over(caplog, monkeypatch):
    caplog.set_level(logging.INFO, "swarmd.profile")
    monkeypatch.setattr(module, "REPORT_SECONDS", 0.0)
    profile = Profile("stage 0-3", None)
    profile.add("compute", 1.0)
    profile.end_step(1)
    assert "1 steps, 1 rows" in caplog.text


def test_a_window_is_bounded():
    profile = Profile("stage 0-3", None)
    for _ in range(module.MAX_VALUES + 5):
        profile.add("compute", 1.0)
    assert len(profile._values["compute"]) == module.MAX_VALUES


def test_a_file_that_cannot_be_written_is_said_once(tmp_path: Path, caplog):
    profile = profile_of("stage 0-3", str(tmp_path))
    assert profile is not None
    tmp_path.rmdir()
    for _ in range(2):
        profile.add("compute", 1.0)
        profile.end_step(1)
        profile.report()
    assert caplog.text.count("cannot be written") == 1
